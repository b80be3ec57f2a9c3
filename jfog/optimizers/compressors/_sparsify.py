"""Sparsifying compressors: `top_k` and `random_k`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog import _validation
from jfog.optimizers.compressors import _base
from jfog.optimizers.compressors._base import Compressor, with_repr


class Sparsifier(Compressor):
  """A compressor that sends a few elements; the others are decoded as 0."""

  __slots__ = ()


@with_repr
def top_k(k: int | None = None, fraction: float | None = None) -> Compressor:
  """Sends the `k` elements of largest modulus of each leaf, and their indices.

  Contractive with `delta >= k/d` for every input. Among equal moduli the lowest
  indices are sent, as by `jax.lax.top_k`.

  Args:
    k: the number of elements of each leaf, or
    fraction: the fraction of each leaf, in (0, 1]: `k = max(1, floor(fraction
      d))`.

  Returns:
    A `Compressor`. For each leaf a message holds the `k` values in the leaf's
    dtype, largest first, and their indices, uint16 if `d <= 65536` and else
    uint32. A leaf without elements sends nothing.

  Raises:
    ValueError: if not exactly one of them is given, or it is out of range; in
      `init` and `encode`, for a leaf of fewer than `k` elements.
    TypeError: if `k` is not an int or `fraction` not a number; in `init` and
      `encode`, for an integer or bool leaf.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.top_k(k=2)
    >>> v = jnp.array([1.0, -3.0, 2.0, 3.0])
    >>> message, _ = compressor.encode(None, v, compressor.init(v))
    >>> message
    ((Array([-3.,  3.], dtype=float32), Array([1, 3], dtype=uint16)),)
    >>> compressor.decode(message, v)
    Array([ 0., -3.,  0.,  3.], dtype=float32)

  Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", 2018.
  """
  count, check = _counted("top_k", k, fraction)

  def encode_leaf(key: Any, index: int, x: jax.Array) -> Any:
    del key, index
    flat = x.ravel()
    modulus = jnp.abs(_base.widen(flat))
    _, indices = jax.lax.top_k(modulus, count(x.size))
    return flat[indices], indices.astype(_index_dtype(x.size))

  def decode_leaf(
    part: Any, index: int, like: jax.ShapeDtypeStruct
  ) -> jax.Array:
    del index
    values, indices = part
    return _scattered(values, indices.astype(jnp.uint32), like)

  return _base.leafwise("top_k", encode_leaf, decode_leaf, check, Sparsifier)


@with_repr
def random_k(
  k: int | None = None,
  fraction: float | None = None,
  unbiased: bool = False,
) -> Compressor:
  """Sends `k` random elements of each leaf.

  The elements are those at the `k` largest of `d` numbers of
  `jax.random.uniform` in float32, drawn with the leaf's key, in the order of
  `jax.lax.top_k`. Indices are not sent: both ends draw them. Contractive with
  `delta = k/d`; with the values scaled by `d/k`, unbiased with `omega = d/k -
  1` and not contractive.

  Args:
    k: the number of elements of each leaf, or
    fraction: the fraction of each leaf, in (0, 1]: `k = max(1, floor(fraction
      d))`.
    unbiased: whether to scale the values.

  Returns:
    A `Compressor`. For each leaf a message holds the `k` values in the leaf's
    dtype, and the key, which is not sent. A leaf without elements sends
    nothing.

  Raises:
    ValueError: as in `top_k`.
    TypeError: as in `top_k`, or if `unbiased` is not a bool.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.random_k(fraction=0.5)
    >>> v = jnp.ones(1000)
    >>> message, _ = compressor.encode(jax.random.key(0), v, compressor.init(v))
    >>> print(compressor.decode(message, v).sum())
    500.0
    >>> jfog.optimizers.message_bytes(compressor, v)
    2000

  Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", 2018.
  """
  if not isinstance(unbiased, (bool, np.bool_)):
    raise TypeError(f"random_k: unbiased={unbiased!r} must be a bool.")
  count, check = _counted("random_k", k, fraction)

  def draw(key: Any, index: int, size: int) -> jax.Array:
    # top_k of uniform draws: jax.random.choice sorts all of them, which takes
    # many times longer.
    draws = jax.random.uniform(_base.leaf_key(key, index), (size,), jnp.float32)
    return jax.lax.top_k(draws, count(size))[1]

  def encode_leaf(key: Any, index: int, x: jax.Array) -> Any:
    values = x.ravel()[draw(key, index, x.size)]
    if unbiased and x.size:
      scale = jnp.asarray(x.size / count(x.size), _base.scale_dtype(x.dtype))
      # The product is rounded once, also for 16-bit leaves.
      values = (scale * _base.widen(values)).astype(x.dtype)
    return values, _base.typed_key(key)

  def decode_leaf(
    part: Any, index: int, like: jax.ShapeDtypeStruct
  ) -> jax.Array:
    # The same draw as in `encode_leaf`, from the source's key.
    values, key = part
    return _scattered(values, draw(key, index, like.size), like)

  return _base.leafwise("random_k", encode_leaf, decode_leaf, check, Sparsifier)


def _counted(
  name: str, k: Any, fraction: Any
) -> tuple[Callable[[int], int], Callable[[jax.Array, str], None]]:
  """The number of sent elements by the size of a leaf, and the leaf's check."""
  if (k is None) == (fraction is None):
    raise ValueError(
      f"{name}: got {k=} and {fraction=}; pass exactly one, for example "
      f"{name}(fraction=0.01)."
    )
  if k is not None:
    k = _validation.positive(k, f"{name}: k")
  else:
    real = isinstance(fraction, (int, float, np.integer, np.floating))
    if isinstance(fraction, bool) or not real:
      raise TypeError(f"{name}: fraction={fraction!r} must be a number.")
    if not 0 < fraction <= 1:
      raise ValueError(f"{name}: fraction={fraction} must be in (0, 1].")

  def count(size: int) -> int:
    wanted = k if k is not None else max(1, math.floor(fraction * size))
    return min(wanted, size)

  def check(x: jax.Array, leaf: str) -> None:
    _base.require_inexact(x, leaf)
    if k is not None and 0 < x.size < k:
      raise ValueError(
        f"{leaf} has {x.size} elements, fewer than k={k}; lower k, or use "
        f"{name}(fraction=...)."
      )

  return count, check


def _index_dtype(size: int) -> Any:
  return jnp.uint16 if size <= 2**16 else jnp.uint32


def _scattered(
  values: jax.Array, indices: jax.Array, like: jax.ShapeDtypeStruct
) -> jax.Array:
  """Zeros, with `values` at these indices of the raveled leaf."""
  flat = jnp.zeros_like(values, like.dtype, shape=math.prod(like.shape))
  flat = flat.at[indices].set(values.astype(like.dtype), unique_indices=True)
  return flat.reshape(like.shape)
