"""The `Compressor` contract, and the parts that all compressors share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Compressor(NamedTuple):
  """Three pure functions that turn a tree into a small message, and back.

  `choco` and `deep_squeeze` send messages; `C(v)`, what the receivers make of
  one, is the same on all ranks, the sender's own included:

      state = compressor.init(v)
      message, state = compressor.encode(key, v, state)
      c = compressor.decode(message, v)

  A message is a pytree of arrays of static shapes. All of them travel but those
  of a PRNG key dtype: such a leaf must be the `key` that `encode` was given,
  and every receiver puts the sender's key in its place, which it knows.

  A compressor is contractive if `E||C(v) - v||^2 <= (1 - delta) ||v||^2`, and
  unbiased if `E C(v) = v` and `E||C(v) - v||^2 <= omega ||v||^2`. Those of jfog
  work on every leaf by itself, ravelled to `d` elements, and draw what is random
  in the i-th leaf from `jax.random.fold_in(key, i)`.

  Attributes:
    init: `init(tree) -> state`, from anything of the shapes that will come.
    encode: `encode(key, tree, state) -> (message, state)`; `key` is a PRNG key,
      typed or not, and not looked at where nothing is random.
    decode: `decode(message, like) -> tree`, of the shapes and dtypes of `like`.
  """

  init: Callable[[Any], Any]
  encode: Callable[[Any, Any, Any], tuple[Any, Any]]
  decode: Callable[[Any, Any], Any]


def identity() -> Compressor:
  """Sends every leaf as it is.

  Returns:
    A `Compressor` with `C(v) = v`.

  Raises:
    TypeError: in `init` and `encode`, for an integer or bool leaf.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.optimizers.message_bytes(jfog.optimizers.identity(), jnp.ones(9))
    36
  """
  return leafwise(
    "identity",
    lambda key, index, x: x,
    lambda part, index, like: part.astype(like.dtype),
    require_inexact,
  )


def message_bytes(compressor: Compressor, tree: Any) -> int:
  """The bytes that one message of this tree takes.

  A rank sends one message to each out-neighbor in a step. For 16-bit parameters
  `choco` and `deep_squeeze` compress float32 values; give their tree then.

  Args:
    compressor: the compressor.
    tree: a pytree of arrays, or of `jax.ShapeDtypeStruct`; nothing is computed.

  Returns:
    The bytes, an int.

  Raises:
    TypeError: if `compressor` is no `Compressor`, or refuses the tree.
    ValueError: if it refuses the tree.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.top_k(fraction=0.01)
    >>> jfog.optimizers.message_bytes(compressor, jnp.zeros(10_000))
    600
  """
  require_compressor(compressor, "message_bytes")

  def encode(tree):
    state = compressor.init(tree)
    return compressor.encode(threefry(0), tree, state)[0]

  parts = jax.tree.leaves(jax.eval_shape(encode, tree))
  return sum(x.size * x.dtype.itemsize for x in parts if not is_key(x))


def require_compressor(compressor: Any, name: str) -> None:
  """Refuses what is no compressor.

  Raises:
    TypeError: naming what it is.
  """
  if not isinstance(compressor, Compressor):
    raise TypeError(
      f"{name}: compressor={compressor!r} is {type(compressor).__name__}; pass "
      f"a jfog.optimizers.Compressor, for example top_k(fraction=0.01)."
    )


def is_key(x: Any) -> bool:
  """Whether a leaf of a message is a PRNG key, which does not travel."""
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def step_key(seed: int, step: jax.Array) -> jax.Array:
  """The key that all ranks share in a step; a rank's is it with the rank folded.

  A threefry key whatever the default is: what other generators draw under `vmap`
  is not what they draw alone, and both ends must draw the same.
  """
  return jax.random.fold_in(threefry(seed), step)


def leafwise(
  name: str,
  encode_leaf: Callable[[Any, int, jax.Array], Any],
  decode_leaf: Callable[[Any, int, jax.ShapeDtypeStruct], jax.Array],
  check: Callable[[jax.Array, str], None],
  kind: type[Compressor] = Compressor,
) -> Compressor:
  """A compressor without a state, of what it does with the i-th leaf."""

  def init_fn(tree):
    flatten(tree, name, check)
    return ()

  def encode_fn(key, tree, state):
    leaves, _ = flatten(tree, name, check)
    parts = tuple(encode_leaf(key, i, x) for i, x in enumerate(leaves))
    return parts, state

  def decode_fn(message, like):
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(
      decode_leaf(part, i, abstract(x))
      for i, (part, x) in enumerate(zip(message, leaves, strict=True))
    )

  return kind(init_fn, encode_fn, decode_fn)


def flatten(tree, name, check):
  """The leaves as arrays, each of them checked, and the structure."""
  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves = []
  for path, leaf in paths:
    x = jnp.asarray(leaf)
    check(x, f"{name}: the leaf x{jax.tree_util.keystr(path)}")
    leaves.append(x)
  return leaves, structure


def abstract(x: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of what may be an array, a number or these two."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def require_inexact(x, leaf) -> None:
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, which holds no fractions; cast it to a "
      f"float dtype, or keep it out with optax.masked."
    )


def require_real(x, leaf) -> None:
  require_inexact(x, leaf)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, and codes are of real numbers; use top_k, "
      f"random_k or low_rank, or two leaves for its two parts."
    )


def scale_dtype(dtype: Any) -> np.dtype:
  """float32, and float64 for leaves of 64-bit floats (or a pair of them)."""
  real = jnp.finfo(dtype).dtype
  return real if real.itemsize > 4 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
  """`x` in float32 at least."""
  return x.astype(jnp.promote_types(x.dtype, scale_dtype(x.dtype)))


def threefry(seed: int) -> jax.Array:
  return jax.random.key(seed, impl="threefry2x32")


def typed_key(key: Any) -> jax.Array:
  key = jnp.asarray(key)
  return key if is_key(key) else jax.random.wrap_key_data(key)


def leaf_key(key: Any, index: int) -> jax.Array:
  return jax.random.fold_in(typed_key(key), index)
