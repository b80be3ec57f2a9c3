"""The `Compressor` contract, and the parts that all compressors share."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from jfog import _dtypes


class Compressor(NamedTuple):
  """Three pure functions that turn a tree into a small message, and back.

  `choco` and `deep_squeeze` send messages. The decoded value `C(v)` is the same
  on all ranks, the source included:

      state = compressor.init(v)
      message, state = compressor.encode(key, v, state)
      c = compressor.decode(message, v)

  A message is a pytree of arrays of static shapes. Leaves of a PRNG key dtype
  are not sent: such a leaf must be the `key` argument of `encode`, and every
  receiver replaces it by the source's key, which it can derive.

  A compressor is contractive if `E||C(v) - v||^2 <= (1 - delta) ||v||^2`, and
  unbiased if `E C(v) = v` and `E||C(v) - v||^2 <= omega ||v||^2`. Those of jfog
  work on each leaf separately, raveled to `d` elements, and draw the random
  numbers of the i-th leaf with `jax.random.fold_in(key, i)`.

  Attributes:
    init: `init(tree) -> state`, from a tree with the shapes of all later ones.
    encode: `encode(key, tree, state) -> (message, state)`; `key` is a PRNG key,
      typed or not; deterministic compressors ignore it.
    decode: `decode(message, like) -> tree`, with the shapes and dtypes of
      `like`.
  """

  init: Callable[[Any], Any]
  encode: Callable[[Any, Any, Any], tuple[Any, Any]]
  decode: Callable[[Any, Any], Any]

  def __repr__(self) -> str:
    # `with_repr` names the function after the call that made it.
    text = getattr(self.encode, "__qualname__", repr(self.encode))
    made = text.removesuffix(").encode")
    return f"{made})" if made != text else f"Compressor({text})"


P = ParamSpec("P")


def with_repr(factory: Callable[P, Compressor]) -> Callable[P, Compressor]:
  """The factory of compressors whose repr is the call that made them."""
  signature = inspect.signature(factory)

  @functools.wraps(factory)
  def make(*args: P.args, **kwargs: P.kwargs) -> Compressor:
    compressor = factory(*args, **kwargs)
    given = signature.bind(*args, **kwargs).arguments
    text = ", ".join(f"{name}={value!r}" for name, value in given.items())
    compressor.encode.__qualname__ = f"{factory.__name__}({text}).encode"
    return compressor

  return make


@with_repr
def identity() -> Compressor:
  """Sends every leaf unchanged.

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
  """Bytes of one message of a tree.

  A rank sends one message to each out-neighbor in a step. For 16-bit parameters
  `choco` and `deep_squeeze` compress float32 values; pass a float32 tree then.

  Args:
    compressor: the compressor.
    tree: a pytree of arrays or of `jax.ShapeDtypeStruct`; evaluated abstractly.

  Returns:
    The number of bytes, an int.

  Raises:
    TypeError: if `compressor` is not a `Compressor`, or raises one for the
      tree.
    ValueError: if the compressor raises one for the tree.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.top_k(fraction=0.01)
    >>> jfog.optimizers.message_bytes(compressor, jnp.zeros(10_000))
    600
  """
  require_compressor(compressor, "message_bytes")

  def encode(tree: Any) -> Any:
    state = compressor.init(tree)
    return compressor.encode(threefry(0), tree, state)[0]

  # Shapes depend on the tree alone, so one message stands for all.
  parts = jax.tree.leaves(jax.eval_shape(encode, tree))
  # Keys are not sent.
  return sum(x.size * x.dtype.itemsize for x in parts if not is_key(x))


def require_compressor(compressor: Any, name: str) -> None:
  """Checks that a value is a compressor.

  Raises:
    TypeError: with the type of the value.
  """
  if not isinstance(compressor, Compressor):
    raise TypeError(
      f"{name}: compressor={compressor!r} is {type(compressor).__name__}; pass "
      f"a jfog.optimizers.Compressor, for example top_k(fraction=0.01)."
    )


def is_key(x: Any) -> bool:
  """Whether a leaf of a message is a PRNG key, which is not sent."""
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def step_key(seed: int, step: jax.Array) -> jax.Array:
  """The common key of a step; a rank folds its number into it.

  A threefry key independently of the default: other generators may draw other
  values under `vmap` than without, and both ends of an edge must draw the same.
  """
  # A function of seed and step: all ranks have it without communication, and a
  # restored state continues with the same keys.
  return jax.random.fold_in(threefry(seed), step)


def leafwise(
  name: str,
  encode_leaf: Callable[[Any, int, jax.Array], Any],
  decode_leaf: Callable[[Any, int, jax.ShapeDtypeStruct], jax.Array],
  check: Callable[[jax.Array, str], None],
  kind: type[Compressor] = Compressor,
) -> Compressor:
  """A stateless compressor from the functions for the i-th leaf."""

  def init_fn(tree: Any) -> tuple:
    flatten(tree, name, check)
    return ()

  def encode_fn(key: Any, tree: Any, state: Any) -> tuple[Any, Any]:
    leaves, _ = flatten(tree, name, check)
    # The index distinguishes the keys of leaves of equal shape.
    parts = tuple(encode_leaf(key, i, x) for i, x in enumerate(leaves))
    return parts, state

  def decode_fn(message: Any, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(
      decode_leaf(part, i, abstract(x))
      for i, (part, x) in enumerate(zip(message, leaves, strict=True))
    )

  return kind(init_fn, encode_fn, decode_fn)


def flatten(
  tree: Any, name: str, check: Callable[[jax.Array, str], None]
) -> tuple[list[jax.Array], Any]:
  """The checked leaves as arrays, and the tree structure."""
  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves = []
  for path, leaf in paths:
    x = jnp.asarray(leaf)
    check(x, f"{name}: the leaf x{jax.tree_util.keystr(path)}")
    leaves.append(x)
  return leaves, structure


def abstract(x: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an array, a number or a `jax.ShapeDtypeStruct`."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def require_inexact(x: jax.Array, leaf: str) -> None:
  """Checks a leaf for a floating-point or complex dtype; `leaf` names it."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, expected floating-point or complex; cast it, "
      f"or exclude it with optax.masked."
    )


def require_real(x: jax.Array, leaf: str) -> None:
  """Checks a leaf for a real floating-point dtype."""
  require_inexact(x, leaf)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, expected a real floating-point one; use "
      f"top_k, random_k or low_rank, or a leaf each for real and imaginary part."
    )


def scale_dtype(dtype: Any) -> np.dtype:
  """Dtype of scales: float32, or float64 for float64 and complex128 leaves."""
  real = _dtypes.real(dtype)
  # A scale in 16 bits would lose more than the quantized values.
  return real if real.itemsize > 4 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
  """`x` in at least single precision."""
  return x.astype(jnp.promote_types(x.dtype, scale_dtype(x.dtype)))


def threefry(seed: int) -> jax.Array:
  """A threefry key, whatever the default generator is."""
  # The bits of other generators depend on the platform; ranks may run on
  # several.
  return jax.random.key(seed, impl="threefry2x32")


def typed_key(key: Any) -> jax.Array:
  """`key` as a typed PRNG key."""
  key = jnp.asarray(key)
  return key if is_key(key) else jax.random.wrap_key_data(key)


def leaf_key(key: Any, index: int) -> jax.Array:
  """The key of the i-th leaf."""
  return jax.random.fold_in(typed_key(key), index)
