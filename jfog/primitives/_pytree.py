"""Leaves of pytrees: checks, native dtypes and accumulation dtypes."""

from collections.abc import Sequence
from operator import index
from typing import Any

import jax
import jax.numpy as jnp

from jfog import _dtypes
from jfog.runtime import Communicator


def flatten(x: Any, operation: str) -> tuple[list[jax.Array], list[str], Any]:
  """Leaves as arrays, their names for error texts, and the tree's structure.

  Raises:
    TypeError: for a leaf other than an array of numbers.
  """
  paths, structure = jax.tree_util.tree_flatten_with_path(x)
  # As a user would index the argument: x['layer'][0].
  names = ["x" + jax.tree_util.keystr(path) for path, _ in paths]
  leaves = []
  for name, (_, leaf) in zip(names, paths, strict=True):
    try:
      array = jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
      raise TypeError(
        f"{operation}: the leaf {name} is {type(leaf).__name__}, and only "
        f"arrays travel; take it out of the tree."
      ) from error
    # Keys have no bytes of their own that a message could carry.
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
      raise TypeError(
        f"{operation}: the leaf {name} has dtype {array.dtype}; pass its bits, "
        f"jax.random.key_data(...)."
      )
    leaves.append(array)
  return leaves, names, structure


def require_inexact(
  leaves: Sequence[jax.Array], names: Sequence[str], operation: str
) -> None:
  """Refuses leaves without fractions where weights or a mean come in.

  Raises:
    TypeError: naming the first integer or bool leaf.
  """
  for leaf, name in zip(leaves, names, strict=True):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise TypeError(
        f"{operation} expects floating-point or complex leaves, but {name} has "
        f'dtype {leaf.dtype}; cast it, or use allreduce(..., op="sum").'
      )


def axis_sizes(
  leaf: jax.Array,
  name: str,
  sizes: Sequence[int] | None,
  comm: Communicator,
  operation: str,
) -> tuple[int, ...]:
  """The length of axis 0 of a leaf on every rank, checked.

  Raises:
    TypeError: for a length other than an int.
    ValueError: for another number of lengths than ranks, a negative one, or one
      that is not this rank's own.
  """
  own = leaf.shape[0]
  if sizes is None:
    return (own,) * comm.size
  try:
    lengths = tuple(index(size) for size in sizes)
  except TypeError as error:
    raise TypeError(
      f"{operation}: axis_sizes={sizes!r} must be ints, one for each rank."
    ) from error
  if len(lengths) != comm.size or min(lengths) < 0:
    raise ValueError(
      f"{operation}: axis_sizes={lengths} must be {comm.size} lengths, one for "
      f"each rank."
    )
  if comm.backend == "mesh":
    if set(lengths) != {own}:
      raise ValueError(
        f"{operation}: axis_sizes={lengths}, but on a mesh every rank has the "
        f"same shape, here {leaf.shape} of {name}; pad to one length first."
      )
  # Each rank checks its own entry; together all entries are checked.
  elif lengths[comm.rank] != own:
    raise ValueError(
      f"{operation}: axis_sizes says {lengths[comm.rank]} for rank {comm.rank}, "
      f"but {name} has {own} entries along axis 0."
    )
  return lengths


def to_native(
  leaves: Sequence[jax.Array], names: Sequence[str], operation: str
) -> list[jax.Array]:
  """Casts what the native core does not read to what it does.

  Raises:
    TypeError: for an integer type that has no native form.
  """
  out = []
  for leaf, name in zip(leaves, names, strict=True):
    try:
      dtype = _dtypes.wire(leaf.dtype)
    except TypeError as error:
      raise TypeError(f"{operation}: the leaf {name}: {error}") from None
    # astype outside of the primitive: JAX differentiates and batches it.
    if leaf.dtype != dtype:
      leaf = leaf.astype(dtype)
    out.append(leaf)
  return out


def cast_like(
  results: Sequence[jax.Array], leaves: Sequence[jax.Array]
) -> list[jax.Array]:
  """Casts results back to the dtypes of the leaves they came from."""
  return [y.astype(x.dtype) for y, x in zip(results, leaves, strict=True)]
