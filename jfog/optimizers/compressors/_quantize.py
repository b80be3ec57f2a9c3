"""Quantizing compressors: `quantize` and `sign`, with packed codes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog import _validation
from jfog.optimizers.compressors import _base
from jfog.optimizers.compressors._base import Compressor, with_repr


@with_repr
def quantize(bits: int) -> Compressor:
  """Rounds every element stochastically to one of `2^bits - 1` levels.

  With `M = max|v|`, `s = 2^(bits - 1) - 1` and `U` uniform on [0, 1),

      code = floor(s v / M + U)
      C(v) = M code / s

  where `U` is `jax.random.uniform` with the leaf's key. Unbiased with `omega <=
  d/(4 s^2)`, with an error below `M/s` in each element; `C(0) = 0`.

  Args:
    bits: number of bits of a code, from 2 to 16.

  Returns:
    A `Compressor`. For each leaf a message holds `M`, of 4 bytes (8 for a
    float64 leaf), and `ceil(bits d / 8)` bytes with the numbers `code + s`,
    packed in little-endian order: element 0 is in the lowest bits of the first
    byte.

  Raises:
    ValueError: if `bits` is out of range.
    TypeError: if `bits` is not an int; in `init` and `encode`, for a leaf that
      is not real floating-point.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.quantize(2)
    >>> v = jnp.array([0.0, 4.0, 0.0, -4.0])
    >>> message, _ = compressor.encode(jax.random.key(0), v, compressor.init(v))
    >>> message  # 1 + 4 * 2 + 16 * 1 + 64 * 0
    ((Array(4., dtype=float32), Array([25], dtype=uint8)),)
    >>> compressor.decode(message, v)
    Array([ 0.,  4.,  0., -4.], dtype=float32)

  Source: Alistarh et al., "QSGD: communication-efficient SGD via gradient
  quantization and encoding", 2017, with the largest modulus as the norm.
  """
  bits = _validation.as_int(bits, "quantize: bits")
  if not 2 <= bits <= 16:
    raise ValueError(
      f"quantize: bits={bits} is not in 2..16; use sign() for one bit, or "
      f"identity() for more."
    )
  levels = 2 ** (bits - 1) - 1

  def encode_leaf(key: Any, index: int, x: jax.Array) -> Any:
    v = _base.widen(x.ravel())
    # initial=0 for empty leaves; a zero leaf is divided by 1 instead of M.
    scale = jnp.max(jnp.abs(v), initial=0)
    noise = jax.random.uniform(_base.leaf_key(key, index), v.shape, v.dtype)
    exact = levels * (v / jnp.where(scale == 0, jnp.ones_like(scale), scale))
    below = jnp.floor(exact)
    # floor(exact + noise), without the rounding error of that sum: it is one
    # above floor(exact) if noise reaches 1 - frac(exact).
    code = below + (noise >= 1 - (exact - below))
    return scale, _pack((code + levels).astype(jnp.int32), bits)

  def decode_leaf(
    part: Any, index: int, like: jax.ShapeDtypeStruct
  ) -> jax.Array:
    del index
    scale, packed = part
    code = _unpack(packed, bits, like.size) - levels
    c = code.astype(scale.dtype) / levels * scale
    return c.reshape(like.shape).astype(like.dtype)

  return _base.leafwise(
    "quantize", encode_leaf, decode_leaf, _base.require_real
  )


@with_repr
def sign() -> Compressor:
  """Sends one bit per element, and the mean modulus of each leaf.

      C(v) = ||v||_1 / d sign(v)        with sign(0) = 1

  Contractive: `||C(v) - v||^2 = ||v||^2 - ||v||_1^2 / d`.

  Returns:
    A `Compressor`. For each leaf a message holds the mean modulus, of 4 bytes
    (8 for a float64 leaf), and `ceil(d / 8)` bytes with one bit per element, 1
    where it is not negative: element 0 is the lowest bit of the first byte.

  Raises:
    TypeError: in `init` and `encode`, for a leaf that is not real
      floating-point.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> compressor = jfog.optimizers.sign()
    >>> v = jnp.array([1.0, -2.0, 0.0])
    >>> message, _ = compressor.encode(None, v, compressor.init(v))
    >>> message
    ((Array(1., dtype=float32), Array([5], dtype=uint8)),)
    >>> compressor.decode(message, v)
    Array([ 1., -1.,  1.], dtype=float32)

  Source: Bernstein et al., "signSGD", 2018; Karimireddy et al., "Error feedback
  fixes SignSGD and other gradient compression schemes", 2019.
  """

  def encode_leaf(key: Any, index: int, x: jax.Array) -> Any:
    del key, index
    v = _base.widen(x.ravel())
    scale = jnp.sum(jnp.abs(v)) / max(1, x.size)
    return scale, _pack((v >= 0).astype(jnp.int32), 1)

  def decode_leaf(
    part: Any, index: int, like: jax.ShapeDtypeStruct
  ) -> jax.Array:
    del index
    scale, packed = part
    c = jnp.where(_unpack(packed, 1, like.size) == 1, scale, -scale)
    return c.reshape(like.shape).astype(like.dtype)

  return _base.leafwise("sign", encode_leaf, decode_leaf, _base.require_real)


# Bit packing: `group` codes of `bits` bits fill `width` bytes exactly. The
# lowest bit of code e of a group is `bits e - 8 w` places above that of byte w:
# the code is shifted left by that number, or right if it is negative, and cut
# to 8 bits.


def _pack(codes: jax.Array, bits: int) -> jax.Array:
  """Packs codes into `ceil(bits d / 8)` bytes, element 0 in the lowest bits."""
  left, right = _places(bits)
  size, group = codes.size, len(left)
  codes = (codes & (2**bits - 1)).astype(jnp.uint32)
  codes = jnp.pad(codes, (0, -size % group)).reshape(-1, group, 1)
  pieces = codes << np.minimum(left, 8) >> np.minimum(right, 16) & 255
  packed = pieces.sum(axis=1, dtype=jnp.uint32).astype(jnp.uint8)
  return packed.ravel()[: -(-bits * size // 8)]


def _unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
  """Inverse of `_pack`, as int32."""
  left, right = _places(bits)
  width = left.shape[1]
  packed = jnp.pad(packed, (0, -packed.size % width)).reshape(-1, 1, width)
  pieces = packed.astype(jnp.uint32) << np.minimum(right, 16)
  pieces = pieces >> np.minimum(left, 8) & (2**bits - 1)
  codes = pieces.sum(axis=2, dtype=jnp.uint32).astype(jnp.int32)
  return codes.ravel()[:size]


def _places(bits: int) -> tuple[np.ndarray, np.ndarray]:
  """Left and right shifts of codes against bytes; shape (group, width)."""
  common = math.gcd(bits, 8)
  group, width = 8 // common, bits // common
  places = bits * np.arange(group)[:, None] - 8 * np.arange(width)
  left, right = np.maximum(places, 0), np.maximum(-places, 0)
  return left.astype(np.uint32), right.astype(np.uint32)
