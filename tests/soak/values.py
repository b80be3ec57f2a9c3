"""Random pytrees of all ranks, and the comparison of a result with its truth.

A stacked tree has the ranks along axis 0 of each leaf. All floats are small
multiples of 1/4, which each dtype holds exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "float32", "float16", "bfloat16", "complex64")
WIDE_FLOATS = ("float64", "complex128")
INTEGERS = ("int32", "int8", "int16", "uint8", "uint16", "uint32", "bool")
WIDE_INTEGERS = ("int64", "uint64")

SHAPES = (
  *((), (0,), (1,), (3,), (2, 3), (2, 0, 3), (7,), (128,), (5, 2, 2)),
  *((1000,), (1000,), (15_361,), (40_003,)),
)
ROW_SHAPES = ((), (3,), (2, 3), (0,), (500,))
# An error of rounding in one operation, relative to the largest element.
ROUNDING = {
  "float16": 2e-3,
  "bfloat16": 1.6e-2,
  "float32": 4e-6,
  "complex64": 4e-6,
  "float64": 1e-14,
  "complex128": 1e-14,
}


def is_inexact(dtype):
  return jnp.issubdtype(dtype, jnp.inexact)


def is_complex(dtype):
  return jnp.issubdtype(dtype, jnp.complexfloating)


def dtypes(x64, inexact_only=False):
  """The names of dtypes to draw from."""
  names = FLOATS + (WIDE_FLOATS if x64 else ())
  if inexact_only:
    return names
  return names + INTEGERS + (WIDE_INTEGERS if x64 else ())


def leaf(rng, ranks, shape, dtype):
  """Random values of one leaf on all ranks."""
  shape = (ranks, *shape)
  if dtype == "bool":
    return rng.random(shape) < 0.5
  if is_inexact(dtype):
    values = rng.integers(-8, 9, shape) / 4
    if is_complex(dtype):
      values = values + 0.25j * rng.integers(-8, 9, shape)
    return values.astype(jnp.dtype(dtype))
  low = 0 if dtype.startswith("u") else -3
  return rng.integers(low, 4, shape).astype(dtype)


def structure(rng, leaves):
  """A random pytree of these leaves."""
  shape = rng.integers(5)
  if len(leaves) == 1 and shape < 3:
    return leaves[0]
  if shape == 0:
    return tuple(leaves)
  if shape == 1:
    return {f"leaf{k}": leaf for k, leaf in enumerate(leaves)}
  if shape == 2:
    return [*leaves, None]
  half = len(leaves) // 2
  return {"w": tuple(leaves[:half]), "b": [None, {"v": leaves[half:]}]}


def tree(rng, ranks, *, inexact, x64, rows):
  """A stacked tree.

  Args:
    rng: the generator of the program.
    ranks: the number of ranks.
    inexact: whether all leaves are floats or complex.
    x64: whether 64-bit dtypes occur.
    rows: the length of axis 0 of all leaves; 0 for any shapes.
  """
  count = rng.choice([0, 1, 1, 1, 2, 3, 5])
  shapes = ROW_SHAPES if rows else SHAPES
  leaves = []
  for _ in range(count):
    shape = shapes[rng.integers(len(shapes))]
    dtype = str(rng.choice(dtypes(x64, inexact)))
    leaves.append(leaf(rng, ranks, (rows, *shape) if rows else shape, dtype))
  return structure(rng, leaves)


def largest(stacked):
  """The largest absolute value of a stacked tree, 0 without elements."""
  return max(
    (
      float(np.abs(x.astype(np.complex128)).max())
      for x in jax.tree.leaves(stacked)
      if x.size and x.dtype != bool
    ),
    default=0.0,
  )


def wide(x):
  """The values in float64 or complex128; integers as they are."""
  if not is_inexact(x.dtype):
    return x
  return x.astype(np.complex128 if is_complex(x.dtype) else np.float64)


def difference(result, truth, depth):
  """How a result differs from the truth; "" if by no more than rounding.

  Elements whose truth is not finite are not compared: the products with zeros in
  the dense truth are NaN there.

  Args:
    result: a pytree of arrays of one rank.
    truth: the same in NumPy.
    depth: the number of operations, one after the other, behind the result.
  """
  got, want = jax.tree.structure(result), jax.tree.structure(truth)
  if got != want:
    return f"structure {got} instead of {want}"
  pairs = zip(jax.tree.leaves(result), jax.tree.leaves(truth), strict=True)
  for k, (x, y) in enumerate(pairs):
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.dtype != y.dtype:
      return f"leaf {k}: {x.dtype}{x.shape} instead of {y.dtype}{y.shape}"
    if not x.size:
      continue
    if not is_inexact(x.dtype):
      wrong = x != y
    else:
      finite = np.isfinite(wide(y))
      scale = max(1.0, largest(y[finite]))
      bound = ROUNDING[str(x.dtype)] * scale * depth
      # Of NaNs in the result, too: a comparison with one is false.
      wrong = finite & ~(np.abs(wide(x) - wide(y)) <= bound)
    if wrong.any():
      at = tuple(int(i) for i in np.argwhere(wrong)[0])
      return (
        f"leaf {k}, {x.dtype}{x.shape}: {wrong.sum()} of {x.size} elements are "
        f"wrong, at {at} {x[at]} instead of {y[at]}"
      )
  return ""
