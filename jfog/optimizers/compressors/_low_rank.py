"""Low-rank compression of matrices: `low_rank`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jfog import _validation
from jfog.optimizers.compressors import _base
from jfog.optimizers.compressors._base import Compressor, with_repr


@with_repr
def low_rank(rank: int) -> Compressor:
  """Sends a product of two thin matrices in place of each matrix.

  A leaf of two or more dimensions is a matrix `V` of shape `(m, n)`, with `m`
  the length of its axis 0. With `Q` of shape `(n, r)`, `r = min(rank, m, n)`,

      P = orth(V Q);  Q <- V^T P;  C(V) = P Q^T = P P^T V

  so each message takes one step of the power method from the last `Q`, which is
  kept in the state. The first `Q` is standard normal, the same on all ranks. If
  the last one is 0, because `V` was 0, a new one is drawn with the key.
  Contractive, as a projection: `||C(V) - V||^2 = ||V||^2 - ||C(V)||^2`.

  Args:
    rank: the number of columns of `P` and `Q`.

  Returns:
    A `Compressor`. For each matrix a message holds `P` and the new `Q` in the
    leaf's dtype, together `r (m + n)` elements; a leaf of fewer dimensions, or
    without elements, is sent unchanged. The state holds every `Q`, float32 for
    16-bit leaves.

  Raises:
    ValueError: if `rank < 1`.
    TypeError: if `rank` is not an int; in `init` and `encode`, for an integer
      or bool leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.low_rank(1)
    >>> v = jnp.outer(jnp.array([1.0, 2.0, 2.0]), jnp.array([3.0, 4.0]))
    >>> message, _ = compressor.encode(jax.random.key(0), v, compressor.init(v))
    >>> [part.shape for part in message[0]]
    [(3, 1), (2, 1)]
    >>> print(jnp.allclose(compressor.decode(message, v), v))
    True

  Source: Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient
  compression for distributed optimization", 2019.
  """
  rank = _validation.positive(rank, "low_rank: rank")

  def draw(key: Any, index: int, x: jax.Array) -> jax.Array:
    m, n = x.shape[0], x.size // x.shape[0]
    shape = (n, min(rank, m, n))
    return jax.random.normal(
      _base.leaf_key(key, index), shape, _base.widen(x).dtype
    )

  def init_fn(tree: Any) -> tuple:
    leaves, _ = _base.flatten(tree, "low_rank", _base.require_inexact)
    # In a `shard_map`, the added zeros mark Q as varying over ranks, as later
    # ones are.
    return tuple(
      draw(_base.threefry(0), i, x) + jnp.zeros_like(_base.widen(x).ravel()[0])
      for i, x in enumerate(leaves)
      if _is_matrix(x)
    )

  def encode_fn(key: Any, tree: Any, state: Any) -> tuple[Any, Any]:
    leaves, _ = _base.flatten(tree, "low_rank", _base.require_inexact)
    message, new, last = [], [], iter(state)
    for i, x in enumerate(leaves):
      if not _is_matrix(x):
        message.append(x)
        continue
      v, q = _base.widen(x).reshape(x.shape[0], -1), next(last)
      q = jnp.where(jnp.any(q != 0), q, draw(key, i, x))
      # One power iteration: P spans V Q, and P P^T V is the projection onto it.
      p = jnp.linalg.qr(_product(v, q))[0]
      q = _product(v.conj().T, p)
      message.append((p.astype(x.dtype), q.astype(x.dtype)))
      new.append(q)
    return tuple(message), tuple(new)

  def decode_fn(message: Any, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    decoded = []
    for part, x in zip(message, leaves, strict=True):
      x = _base.abstract(x)
      if _is_matrix(x):
        p, q = map(_base.widen, part)
        part = _product(p, q.conj().T)
      decoded.append(part.reshape(x.shape).astype(x.dtype))
    return structure.unflatten(decoded)

  return Compressor(init_fn, encode_fn, decode_fn)


def _is_matrix(x: Any) -> bool:
  return len(x.shape) >= 2 and math.prod(x.shape) > 0


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.matmul(left, right, precision="highest")
