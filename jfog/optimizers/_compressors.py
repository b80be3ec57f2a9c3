"""Compressors: small messages in the place of trees of arrays."""

import math
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


class Sparsifier(Compressor):
  """A compressor that sends a few elements and leaves out the others."""

  __slots__ = ()


def top_k(k: int | None = None, fraction: float | None = None) -> Compressor:
  """Sends the `k` elements of largest modulus of each leaf, and where they lie.

  Contractive with `delta >= k/d`, surely. Among equal moduli those of the lowest
  indices are sent, the order of `jax.lax.top_k`.

  Args:
    k: how many elements of each leaf, or
    fraction: which part of each leaf, in (0, 1]: `k = max(1, floor(fraction
      d))`.

  Returns:
    A `Compressor`. For each leaf a message holds the `k` values in the leaf's
    dtype, largest first, and their indices, uint16 if `d <= 65536` and else
    uint32. A leaf without elements sends nothing.

  Raises:
    ValueError: if not one of the two is given, or it is out of range; in `init`
      and `encode`, for a leaf of fewer than `k` elements.
    TypeError: if `k` is no int or `fraction` no number; in `init` and `encode`,
      for an integer or bool leaf.

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

  def encode_leaf(key, index, x):
    del key, index
    flat = x.ravel()
    modulus = jnp.abs(_widened(flat))
    _, indices = jax.lax.top_k(modulus, count(x.size))
    return flat[indices], indices.astype(_index_dtype(x.size))

  def decode_leaf(part, index, like):
    del index
    values, indices = part
    return _scattered(values, indices.astype(jnp.uint32), like)

  return _leafwise("top_k", encode_leaf, decode_leaf, check, Sparsifier)


def random_k(
  k: int | None = None,
  fraction: float | None = None,
  unbiased: bool = False,
) -> Compressor:
  """Sends `k` elements of each leaf that are drawn at random.

  They are those with the `k` largest of `d` numbers of `jax.random.uniform` in
  float32, drawn with the leaf's key, in the order of `jax.lax.top_k`. Indices do
  not travel: both ends draw them. Contractive with `delta = k/d`; or, with the
  values scaled by `d/k`, unbiased with `omega = d/k - 1`, and then not
  contractive.

  Args:
    k: how many elements of each leaf, or
    fraction: which part of each leaf, in (0, 1]: `k = max(1, floor(fraction
      d))`.
    unbiased: whether to scale the values.

  Returns:
    A `Compressor`. For each leaf a message holds the `k` values in the leaf's
    dtype, and the key, which does not travel. A leaf without elements sends
    nothing.

  Raises:
    ValueError: as in `top_k`.
    TypeError: as in `top_k`, or if `unbiased` is no bool.

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

  def draw(key, index, size):
    # Sorting them all, as jax.random.choice does, takes many times longer.
    lots = jax.random.uniform(_leaf_key(key, index), (size,), jnp.float32)
    return jax.lax.top_k(lots, count(size))[1]

  def encode_leaf(key, index, x):
    values = x.ravel()[draw(key, index, x.size)]
    if unbiased and x.size:
      scale = jnp.asarray(x.size / count(x.size), _scale_dtype(x.dtype))
      values = (scale * _widened(values)).astype(x.dtype)
    return values, _typed(key)

  def decode_leaf(part, index, like):
    values, key = part
    return _scattered(values, draw(key, index, like.size), like)

  return _leafwise("random_k", encode_leaf, decode_leaf, check, Sparsifier)


def quantize(bits: int) -> Compressor:
  """Rounds every element at random to one of `2^bits - 1` levels.

  With `M = max|v|`, `s = 2^(bits - 1) - 1` and `U` uniform on [0, 1),

      code = floor(s v / M + U)
      C(v) = M code / s

  where `U` is `jax.random.uniform` with the leaf's key. Unbiased with `omega <=
  d/(4 s^2)`, and off by less than `M/s` in each element; `v = 0` gives 0.

  Args:
    bits: the bits of a code, from 2 to 16.

  Returns:
    A `Compressor`. For each leaf a message holds `M`, of 4 bytes (8 for a
    float64 leaf), and `ceil(bits d / 8)` bytes with the numbers `code + s`,
    little-endian and without gaps: element 0 is in the lowest bits of the first
    byte.

  Raises:
    ValueError: if `bits` is out of range.
    TypeError: if `bits` is no int; in `init` and `encode`, for a leaf that is
      not of floats.

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
  bits = _integer(bits, "quantize: bits")
  if not 2 <= bits <= 16:
    raise ValueError(
      f"quantize: bits={bits} is not in 2..16; use sign() for one bit, and "
      f"identity() for more."
    )
  levels = 2 ** (bits - 1) - 1

  def encode_leaf(key, index, x):
    v = _widened(x.ravel())
    scale = jnp.max(jnp.abs(v), initial=0)
    noise = jax.random.uniform(_leaf_key(key, index), v.shape, v.dtype)
    exact = levels * (v / jnp.where(scale == 0, jnp.ones_like(scale), scale))
    below = jnp.floor(exact)
    # floor(exact + noise), without the rounding of that sum.
    code = below + (noise >= 1 - (exact - below))
    return scale, _pack((code + levels).astype(jnp.int32), bits)

  def decode_leaf(part, index, like):
    del index
    scale, packed = part
    code = _unpack(packed, bits, like.size) - levels
    c = code.astype(scale.dtype) / levels * scale
    return c.reshape(like.shape).astype(like.dtype)

  return _leafwise("quantize", encode_leaf, decode_leaf, _require_real)


def sign() -> Compressor:
  """Sends one bit for each element, and the mean modulus of each leaf.

      C(v) = ||v||_1 / d sign(v)        with sign(0) = 1

  Contractive: `||C(v) - v||^2 = ||v||^2 - ||v||_1^2 / d`.

  Returns:
    A `Compressor`. For each leaf a message holds the mean modulus, of 4 bytes (8
    for a float64 leaf), and `ceil(d / 8)` bytes with a bit for each element,
    1 where it is not negative: element 0 is the lowest bit of the first byte.

  Raises:
    TypeError: in `init` and `encode`, for a leaf that is not of floats.

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

  def encode_leaf(key, index, x):
    del key, index
    v = _widened(x.ravel())
    scale = jnp.sum(jnp.abs(v)) / max(1, x.size)
    return scale, _pack((v >= 0).astype(jnp.int32), 1)

  def decode_leaf(part, index, like):
    del index
    scale, packed = part
    c = jnp.where(_unpack(packed, 1, like.size) == 1, scale, -scale)
    return c.reshape(like.shape).astype(like.dtype)

  return _leafwise("sign", encode_leaf, decode_leaf, _require_real)


def low_rank(rank: int) -> Compressor:
  """Sends a product of two thin matrices in the place of each matrix.

  A leaf of two or more dimensions is a matrix `V` of shape `(m, n)`, with `m`
  the length of its axis 0. With `Q` of shape `(n, r)`, `r = min(rank, m, n)`,

      P = orth(V Q);  Q <- V^T P;  C(V) = P Q^T = P P^T V

  so one step of the power method in each message, from the last `Q` on, which
  lies in the state. The first `Q` is standard normal, the same on all ranks; if
  the last one is 0, because `V` was, another is drawn from the key. Contractive,
  for it is a projection: `||C(V) - V||^2 = ||V||^2 - ||C(V)||^2`.

  Args:
    rank: the number of columns of `P` and `Q`.

  Returns:
    A `Compressor`. For each matrix a message holds `P` and the new `Q` in the
    leaf's dtype, together `r (m + n)` elements; a leaf of fewer dimensions, or
    without elements, is sent as it is. The state holds every `Q`, float32 for
    16-bit leaves.

  Raises:
    ValueError: if `rank < 1`.
    TypeError: if `rank` is no int; in `init` and `encode`, for an integer or
      bool leaf.

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
  rank = _integer(rank, "low_rank: rank")
  if rank < 1:
    raise ValueError(f"low_rank: rank={rank} must be at least 1.")

  def draw(key, index, x):
    m, n = x.shape[0], x.size // x.shape[0]
    shape = (n, min(rank, m, n))
    return jax.random.normal(_leaf_key(key, index), shape, _widened(x).dtype)

  def init_fn(tree):
    leaves, _ = _flatten(tree, "low_rank", _require_inexact)
    # Where ranks are devices, the zeros say that Q differs between them.
    return tuple(
      draw(_threefry(0), i, x) + jnp.zeros_like(_widened(x).ravel()[0])
      for i, x in enumerate(leaves)
      if _is_matrix(x)
    )

  def encode_fn(key, tree, state):
    leaves, _ = _flatten(tree, "low_rank", _require_inexact)
    message, new, last = [], [], iter(state)
    for i, x in enumerate(leaves):
      if not _is_matrix(x):
        message.append(x)
        continue
      v, q = _widened(x).reshape(x.shape[0], -1), next(last)
      q = jnp.where(jnp.any(q != 0), q, draw(key, i, x))
      p = jnp.linalg.qr(_product(v, q))[0]
      q = _product(v.conj().T, p)
      message.append((p.astype(x.dtype), q.astype(x.dtype)))
      new.append(q)
    return tuple(message), tuple(new)

  def decode_fn(message, like):
    leaves, structure = jax.tree.flatten(like)
    decoded = []
    for part, x in zip(message, leaves, strict=True):
      x = _abstract(x)
      if _is_matrix(x):
        p, q = map(_widened, part)
        part = _product(p, q.conj().T)
      decoded.append(part.reshape(x.shape).astype(x.dtype))
    return structure.unflatten(decoded)

  return Compressor(init_fn, encode_fn, decode_fn)


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
  return _leafwise(
    "identity",
    lambda key, index, x: x,
    lambda part, index, like: part.astype(like.dtype),
    _require_inexact,
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
    return compressor.encode(_threefry(0), tree, state)[0]

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
  return jax.random.fold_in(_threefry(seed), step)


# What the compressors share.


def _leafwise(
  name: str,
  encode_leaf: Callable[[Any, int, jax.Array], Any],
  decode_leaf: Callable[[Any, int, jax.ShapeDtypeStruct], jax.Array],
  check: Callable[[jax.Array, str], None],
  kind: type[Compressor] = Compressor,
) -> Compressor:
  """A compressor without a state, of what it does with the i-th leaf."""

  def init_fn(tree):
    _flatten(tree, name, check)
    return ()

  def encode_fn(key, tree, state):
    leaves, _ = _flatten(tree, name, check)
    parts = tuple(encode_leaf(key, i, x) for i, x in enumerate(leaves))
    return parts, state

  def decode_fn(message, like):
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(
      decode_leaf(part, i, _abstract(x))
      for i, (part, x) in enumerate(zip(message, leaves, strict=True))
    )

  return kind(init_fn, encode_fn, decode_fn)


def _flatten(tree, name, check):
  """The leaves as arrays, each of them checked, and the structure."""
  paths, structure = jax.tree_util.tree_flatten_with_path(tree)
  leaves = []
  for path, leaf in paths:
    x = jnp.asarray(leaf)
    check(x, f"{name}: the leaf x{jax.tree_util.keystr(path)}")
    leaves.append(x)
  return leaves, structure


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of what may be an array, a number or these two."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  x = jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _require_inexact(x, leaf) -> None:
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, which holds no fractions; cast it to a "
      f"float dtype, or keep it out with optax.masked."
    )


def _require_real(x, leaf) -> None:
  _require_inexact(x, leaf)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(
      f"{leaf} has dtype {x.dtype}, and codes are of real numbers; use top_k, "
      f"random_k or low_rank, or two leaves for its two parts."
    )


def _integer(value: Any, label: str) -> int:
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{label}={value!r} must be an int.")
  return int(value)


def _counted(name: str, k: Any, fraction: Any):
  """From a leaf's size to how many elements are sent, and the leaf's check."""
  if (k is None) == (fraction is None):
    raise ValueError(
      f"{name}: got {k=} and {fraction=}; pass one of them, for example "
      f"{name}(fraction=0.01)."
    )
  if k is not None:
    k = _integer(k, f"{name}: k")
    if k < 1:
      raise ValueError(f"{name}: k={k} must be at least 1.")
  else:
    real = isinstance(fraction, (int, float, np.integer, np.floating))
    if isinstance(fraction, bool) or not real:
      raise TypeError(f"{name}: fraction={fraction!r} must be a number.")
    if not 0 < fraction <= 1:
      raise ValueError(f"{name}: fraction={fraction} must be in (0, 1].")

  def count(size: int) -> int:
    wanted = k if k is not None else max(1, math.floor(fraction * size))
    return min(wanted, size)

  def check(x, leaf):
    _require_inexact(x, leaf)
    if k is not None and 0 < x.size < k:
      raise ValueError(
        f"{leaf} has {x.size} elements, and k={k} of each leaf are wanted; "
        f"lower k, or use {name}(fraction=...)."
      )

  return count, check


def _scale_dtype(dtype: Any) -> np.dtype:
  """float32, and float64 for leaves of 64-bit floats (or a pair of them)."""
  real = jnp.finfo(dtype).dtype
  return real if real.itemsize > 4 else jnp.dtype(jnp.float32)


def _widened(x: jax.Array) -> jax.Array:
  """`x` in float32 at least."""
  return x.astype(jnp.promote_types(x.dtype, _scale_dtype(x.dtype)))


def _index_dtype(size: int) -> Any:
  return jnp.uint16 if size <= 2**16 else jnp.uint32


def _scattered(values, indices, like) -> jax.Array:
  """Zeros but for the values at these indices of the ravelled leaf."""
  flat = jnp.zeros_like(values, like.dtype, shape=math.prod(like.shape))
  flat = flat.at[indices].set(values.astype(like.dtype), unique_indices=True)
  return flat.reshape(like.shape)


def _is_matrix(x: Any) -> bool:
  return len(x.shape) >= 2 and math.prod(x.shape) > 0


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.matmul(left, right, precision="highest")


def _threefry(seed: int) -> jax.Array:
  return jax.random.key(seed, impl="threefry2x32")


def _typed(key: Any) -> jax.Array:
  key = jnp.asarray(key)
  return key if is_key(key) else jax.random.wrap_key_data(key)


def _leaf_key(key: Any, index: int) -> jax.Array:
  return jax.random.fold_in(_typed(key), index)


# Bits: `group` codes of `bits` bits fill `width` bytes, and so on. The lowest bit
# of code e of a group lies `bits e - 8 w` places above that of byte w.


def _pack(codes: jax.Array, bits: int) -> jax.Array:
  """Codes in `ceil(bits d / 8)` bytes, element 0 in the lowest bits."""
  left, right = _places(bits)
  size, group = codes.size, len(left)
  codes = (codes & (2**bits - 1)).astype(jnp.uint32)
  codes = jnp.pad(codes, (0, -size % group)).reshape(-1, group, 1)
  pieces = codes << np.minimum(left, 8) >> np.minimum(right, 16) & 255
  packed = pieces.sum(axis=1, dtype=jnp.uint32).astype(jnp.uint8)
  return packed.ravel()[: -(-bits * size // 8)]


def _unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
  """The inverse of `_pack`, as int32."""
  left, right = _places(bits)
  width = left.shape[1]
  packed = jnp.pad(packed, (0, -packed.size % width)).reshape(-1, 1, width)
  pieces = packed.astype(jnp.uint32) << np.minimum(right, 16)
  pieces = pieces >> np.minimum(left, 8) & (2**bits - 1)
  codes = pieces.sum(axis=2, dtype=jnp.uint32).astype(jnp.int32)
  return codes.ravel()[:size]


def _places(bits: int) -> tuple[np.ndarray, np.ndarray]:
  """By how much codes move to the left and right; shape (group, width)."""
  common = math.gcd(bits, 8)
  group, width = 8 // common, bits // common
  places = bits * np.arange(group)[:, None] - 8 * np.arange(width)
  left, right = np.maximum(places, 0), np.maximum(-places, 0)
  return left.astype(np.uint32), right.astype(np.uint32)
