"""Compressors against NumPy with the same random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfog import optimizers
from jfog.optimizers import message_bytes

# Leaves of all kinds, compressed in one program.
LEAVES = {
  "a": ((), "float32"),
  "b": ((3, 5), "float64"),
  "c": ((0, 4), "float32"),
  "d": ((4, 6), "float32"),
  "e": ((17,), "bfloat16"),
  "f": ((2, 3, 4), "float16"),
}

COMPRESSORS = {
  "top_k": optimizers.top_k(fraction=0.3),
  "random_k": optimizers.random_k(fraction=0.3),
  "quantize": optimizers.quantize(3),
  "sign": optimizers.sign(),
  "low_rank": optimizers.low_rank(2),
  "identity": optimizers.identity(),
}


def kept(size):
  return min(size, max(1, int(np.floor(0.3 * size))))


def in_bytes(codes, bits):
  """Packs bit by bit, element 0 in the lowest bits."""
  each = (np.asarray(codes)[:, None] >> np.arange(bits)) & 1
  return np.packbits(each.astype(np.uint8).ravel(), bitorder="little")


def draws(key, size, index, dtype):
  """The random numbers of a leaf, by the documented rule."""
  leaf_key = jax.random.fold_in(key, index)
  return jax.random.uniform(leaf_key, (size,), dtype)


def run_all(key, tree):
  """Message, decoded value and random draws of every compressor."""
  results = {}
  for name, compressor in COMPRESSORS.items():
    state = compressor.init(tree)
    message, new = compressor.encode(key, tree, state)
    decoded = compressor.decode(message, tree)
    results[name] = message, decoded, (state, new)
  drawn = [
    [draws(key, x.size, i, dtype) for dtype in ("float32", "float64")]
    for i, x in enumerate(jax.tree.leaves(tree))
  ]
  return results, drawn


def is_key(x):
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def sent(message):
  return [x for x in jax.tree.leaves(message) if not is_key(x)]


def bytes_of(message):
  return sum(np.asarray(part).nbytes for part in sent(message))


def test_messages_and_values_are_those_of_numpy(rng, x64):
  tree = {
    name: jnp.asarray(rng.randn(*shape), dtype)
    for name, (shape, dtype) in LEAVES.items()
  }
  results, drawn = jax.jit(run_all)(jax.random.key(3), tree)
  for name, compressor in COMPRESSORS.items():
    message, decoded, _ = results[name]
    assert message_bytes(compressor, tree) == bytes_of(message)
    for leaf, c in decoded.items():
      assert (c.shape, c.dtype) == LEAVES[leaf]

  starts, lasts = map(iter, results["low_rank"][2])
  for i, (leaf, (shape, dtype)) in enumerate(LEAVES.items()):
    v = np.asarray(tree[leaf], float).ravel()
    size, k, norm = v.size, kept(v.size), (v**2).sum()
    uniform, wide_uniform = (np.asarray(u, float) for u in drawn[i])
    width = jnp.dtype(dtype).itemsize
    scale = jnp.promote_types(dtype, jnp.float32)
    # Tolerance against the float64 truth: some roundings to the leaf's dtype.
    near = 8 * float(jnp.finfo(dtype).eps)

    def check(name, expected, parts, i=i, leaf=leaf, near=near):
      """Compares the value and the parts of the message; returns the value."""
      message, decoded, _ = results[name]
      c = np.asarray(decoded[leaf], float).ravel()
      np.testing.assert_allclose(c, expected, rtol=near, atol=near)
      for part, (truth, dtype) in zip(sent(message[i]), parts, strict=True):
        assert part.dtype == dtype
        truth = np.reshape(truth, part.shape)
        np.testing.assert_allclose(
          np.asarray(part, float), truth, rtol=near, atol=near
        )
      return c

    order = np.argsort(-np.abs(v), kind="stable")[:k]
    expected = np.zeros(size)
    expected[order] = v[order]
    parts = [(v[order], dtype), (order, "uint16")]
    c = check("top_k", expected, parts)
    assert ((c - v) ** 2).sum() <= (1 - k / max(1, size)) * norm + 1e-9
    assert bytes_of(results["top_k"][0][i]) == k * (width + 2)

    order = np.argsort(-uniform, kind="stable")[:k]
    expected = np.zeros(size)
    expected[order] = v[order]
    check("random_k", expected, [(v[order], dtype)])
    assert bytes_of(results["random_k"][0][i]) == k * width

    greatest = np.abs(v).max(initial=0)
    noise = wide_uniform if dtype == "float64" else uniform
    s = 2 ** (3 - 1) - 1
    code = np.floor(s * v / (greatest or 1) + noise).astype(int)
    assert (np.abs(code) <= s).all()
    parts = [(greatest, scale), (in_bytes(code + s, 3), "uint8")]
    c = check("quantize", greatest * code / s, parts)
    assert (np.abs(c - v) < greatest / s * (1 + near)).all()
    total = scale.itemsize + -(-3 * size // 8)
    assert bytes_of(results["quantize"][0][i]) == total

    mean = np.abs(v).sum() / max(1, size)
    parts = [(mean, scale), (in_bytes(v >= 0, 1), "uint8")]
    c = check("sign", np.where(v >= 0, mean, -mean), parts)
    lost = norm - size * mean**2
    assert np.isclose(((c - v) ** 2).sum(), lost, rtol=near, atol=near * norm)
    assert bytes_of(results["sign"][0][i]) == scale.itemsize + -(-size // 8)

    check("identity", v, [(v, dtype)])
    if len(shape) < 2 or not size:
      check("low_rank", v, [(v, dtype)])
      continue
    start, last = next(starts), next(lasts)
    matrix = v.reshape(shape[0], -1)
    rank = min(2, *matrix.shape)
    assert start.shape == last.shape == (matrix.shape[1], rank)
    assert start.dtype == last.dtype == scale
    p = np.linalg.qr(matrix @ np.asarray(start, float))[0]
    # The signs of the columns of P are arbitrary and cancel in the product.
    p = p * np.sign(
      (p * np.asarray(results["low_rank"][0][i][0], float)).sum(0)
    )
    parts = [(p, dtype), (matrix.T @ p, dtype)]
    c = check("low_rank", (p @ p.T @ matrix).ravel(), parts)
    lost = norm - (c**2).sum()
    assert np.isclose(((c - v) ** 2).sum(), lost, rtol=near, atol=near * norm)
  assert next(starts, None) is None


def test_means_over_many_keys():
  """Unbiased, with the documented bound of the variance."""
  v = jnp.asarray(np.random.RandomState(1).randn(12), jnp.float32)
  count = 20_000
  compressors = {
    "unbiased": optimizers.random_k(k=3, unbiased=True),
    "random_k": optimizers.random_k(k=3),
    "2 bits": optimizers.quantize(2),
    "4 bits": optimizers.quantize(4),
  }
  steps = {"2 bits": 1, "4 bits": 7}  # s

  @jax.jit
  def sample(keys):
    def one(key):
      return {
        name: compressor.decode(compressor.encode(key, v, ())[0], v)
        for name, compressor in compressors.items()
      }

    return jax.vmap(one)(keys)

  x = np.asarray(v, float)
  norm = (x**2).sum()
  samples = sample(jax.random.split(jax.random.key(0), count))
  samples = {name: np.asarray(c, float) for name, c in samples.items()}
  errors = {name: ((c - x) ** 2).sum(1) for name, c in samples.items()}

  def within(sample, expected):
    deviation = sample.std(axis=0) / np.sqrt(count)
    assert (
      np.abs(sample.mean(axis=0) - expected) <= 5 * deviation + 1e-6
    ).all()

  omegas = {name: 12 / (4 * s**2) for name, s in steps.items()}
  omegas["unbiased"] = 12 / 3 - 1
  for name, omega in omegas.items():
    within(samples[name], x)
    assert errors[name].mean() <= omega * norm * 1.02
    # Scaled by 1/(1 + omega) it is contractive.
    scaled = samples[name] / (1 + omega)
    bound = (1 - 1 / (1 + omega)) * norm
    assert ((scaled - x) ** 2).sum(1).mean() <= bound * 1.02
  within(errors["unbiased"], omegas["unbiased"] * norm)
  within(errors["random_k"], (1 - 3 / 12) * norm)
  for name, s in steps.items():
    bound = np.abs(x).max() / s * (1 + 1e-6)
    assert (np.abs(samples[name] - x) < bound).all()
  # All elements have the same probability.
  within((samples["random_k"] != 0).astype(float), np.full(12, 3 / 12))


def test_codes_of_all_widths_fill_their_bytes(rng):
  """Values on levels are exact for every draw, so the bits are known."""
  sizes = (13,)
  widths = (2, 3, 4, 5, 7, 8, 11, 16)
  codes = {}
  for bits in widths:
    s = 2 ** (bits - 1) - 1
    codes[bits] = [rng.randint(-s, s + 1, size) for size in sizes]
    for code in codes[bits]:
      code[-1] = -s  # the largest modulus

  @jax.jit
  def run(codes):
    results = {}
    for bits, leaves in codes.items():
      compressor = optimizers.quantize(bits)
      v = [2.0 * leaf.astype(jnp.float32) for leaf in leaves]
      message, _ = compressor.encode(jax.random.key(1), v, ())
      results[bits] = message, compressor.decode(message, v)
    return results

  for bits, (message, decoded) in run(codes).items():
    s = 2 ** (bits - 1) - 1
    for code, (scale, packed), c in zip(
      codes[bits], message, decoded, strict=True
    ):
      assert packed.dtype == jnp.uint8
      assert scale == 2 * s
      got = np.unpackbits(np.asarray(packed), bitorder="little")
      truth = np.unpackbits(in_bytes(code + s, bits), bitorder="little")
      numbers = got[: code.size * bits].reshape(-1, bits) @ 2 ** np.arange(bits)
      # v/M s may round to just below a level and is then drawn down.
      assert (np.abs(numbers - (code + s)) <= 1).all()
      assert got.size == truth.size
      assert not got[code.size * bits :].any()
      np.testing.assert_allclose(c, 2 * (numbers - s), rtol=1e-6)
  for bits in range(2, 17):
    for size in (0, 1, 2, 7, 8, 1001):
      leaf = jax.ShapeDtypeStruct((size,), jnp.float32)
      wanted = 4 + int(np.ceil(bits * size / 8))
      assert message_bytes(optimizers.quantize(bits), leaf) == wanted


def test_ties_go_to_the_lowest_index():
  v = jnp.array([[1.0, -2.0, 2.0], [0.0, 2.0, -1.0]])
  compressor = optimizers.top_k(k=2)
  message, _ = compressor.encode(None, v, compressor.init(v))
  np.testing.assert_array_equal(message[0][1], [1, 2])
  c = compressor.decode(message, v)
  np.testing.assert_array_equal(c, [[0, -2, 2], [0, 0, 0]])


def test_indices_of_large_leaves_are_wide():
  for size, dtype in ((2**16, jnp.uint16), (2**16 + 1, jnp.uint32)):
    compressor = optimizers.top_k(k=1)
    v = jnp.zeros(size).at[-1].set(3)
    message, _ = compressor.encode(None, v, ())
    assert message[0][1].dtype == dtype
    np.testing.assert_array_equal(compressor.decode(message, v), v)
    leaf = jax.ShapeDtypeStruct((size,), jnp.float32)
    assert message_bytes(compressor, leaf) == 4 + dtype(0).itemsize


def test_zeros_stay_zeros_and_do_not_hold_low_rank_back(rng):
  """A zero factor is replaced by a new draw with the key."""
  v = jnp.asarray(rng.randn(4, 6), jnp.float32)
  best = np.linalg.svd(v)
  best = best[0][:, :2] * best[1][:2] @ best[2][:2]

  @jax.jit
  def run(v):
    zeros = {}
    for name, compressor in COMPRESSORS.items():
      x = jnp.zeros_like(v)
      message, _ = compressor.encode(jax.random.key(0), x, compressor.init(x))
      zeros[name] = compressor.decode(message, x)
    compressor = COMPRESSORS["low_rank"]
    _, stuck = compressor.encode(
      jax.random.key(0), jnp.zeros_like(v), compressor.init(v)
    )

    def again(state, key):
      message, state = compressor.encode(key, v, state)
      return state, compressor.decode(message, v)

    keys = jax.random.split(jax.random.key(5), 60)
    return zeros, stuck, jax.lax.scan(again, stuck, keys)[1]

  zeros, stuck, seen = run(v)
  for c in zeros.values():
    np.testing.assert_array_equal(c, np.zeros((4, 6)))
  assert not np.asarray(stuck[0]).any()
  error = ((np.asarray(seen) - np.asarray(v)) ** 2).sum((1, 2))
  assert error[0] < (np.asarray(v) ** 2).sum()
  assert (np.diff(error) < 1e-4).all()  # the warm start improves it
  np.testing.assert_allclose(seen[-1], best, rtol=1e-3, atol=1e-3)


def test_complex_leaves(rng):
  v = jnp.asarray(rng.randn(3, 4) + 1j * rng.randn(3, 4), jnp.complex64)
  names = ("top_k", "random_k", "low_rank", "identity")

  @jax.jit
  def run(v):
    decoded = {}
    for name in names:
      compressor = COMPRESSORS[name]
      message, _ = compressor.encode(jax.random.key(0), v, compressor.init(v))
      decoded[name] = compressor.decode(message, v)
    return decoded

  decoded = run(v)
  assert {c.dtype for c in decoded.values()} == {jnp.dtype("complex64")}
  x = np.asarray(v)
  greatest = np.sort(np.abs(x).ravel())[-3:]
  np.testing.assert_allclose(
    np.sort(np.abs(decoded["top_k"]).ravel())[-3:], greatest, rtol=1e-6
  )
  np.testing.assert_array_equal(decoded["identity"], x)
  norms = {name: np.linalg.norm(c) ** 2 for name, c in decoded.items()}
  error = np.linalg.norm(decoded["low_rank"] - x) ** 2
  assert np.isclose(error, norms["identity"] - norms["low_rank"], rtol=1e-4)
  assert np.linalg.matrix_rank(decoded["low_rank"], tol=1e-4) == 2
  for name in ("quantize", "sign"):
    with pytest.raises(TypeError, match=r"the leaf x\['w'\] .*complex64"):
      COMPRESSORS[name].init({"w": v})


def test_a_key_may_be_of_the_old_style():
  v = jnp.arange(6.0)
  compressor = COMPRESSORS["random_k"]
  old, _ = compressor.encode(jax.random.PRNGKey(4), v, ())
  new, _ = compressor.encode(jax.random.key(4), v, ())
  assert jnp.issubdtype(old[0][1].dtype, jax.dtypes.prng_key)
  np.testing.assert_array_equal(
    compressor.decode(old, v), compressor.decode(new, v)
  )


def test_a_nan_is_not_hidden():
  @jax.jit
  def run(v):
    decoded = []
    for name in ("top_k", "quantize", "sign"):
      compressor = COMPRESSORS[name]
      message, _ = compressor.encode(jax.random.key(0), v, ())
      decoded.append(compressor.decode(message, v))
    return decoded

  for c in run(jnp.array([1.0, jnp.nan, 2.0])):
    assert np.isnan(c).any()


def test_trees_and_leaves_without_elements():
  for compressor in COMPRESSORS.values():
    message, _ = compressor.encode(None, {}, compressor.init({}))
    assert compressor.decode(message, {}) == {}
    assert message_bytes(compressor, {}) == 0
  # An empty leaf has an empty message.
  assert message_bytes(optimizers.top_k(k=3), jnp.zeros(0)) == 0


SPARSIFIERS = pytest.mark.parametrize(
  "make", [optimizers.top_k, optimizers.random_k]
)


@SPARSIFIERS
@pytest.mark.parametrize(
  ("arguments", "error", "text"),
  [
    ({}, ValueError, "pass exactly one"),
    ({"k": 1, "fraction": 0.5}, ValueError, "pass exactly one"),
    ({"k": 0}, ValueError, "k=0 must be at least 1"),
    ({"k": -2}, ValueError, "k=-2"),
    ({"k": 1.0}, TypeError, "k=1.0 must be an int"),
    ({"k": True}, TypeError, "k=True"),
    ({"fraction": 0.0}, ValueError, r"fraction=0.0 must be in \(0, 1\]"),
    ({"fraction": 1.5}, ValueError, "fraction=1.5"),
    ({"fraction": float("nan")}, ValueError, "fraction=nan"),
    ({"fraction": "1"}, TypeError, "fraction='1'"),
    ({"fraction": True}, TypeError, "fraction=True"),
  ],
)
def test_how_many_elements_is_checked(make, arguments, error, text):
  with pytest.raises(error, match=f"{make.__name__}: .*{text}"):
    make(**arguments)


@SPARSIFIERS
def test_more_elements_than_a_leaf_has(make):
  compressor = make(k=4)
  tree = {"big": jnp.zeros(4), "small": jnp.zeros(3)}
  text = r"the leaf x\['small'\] has 3 elements, fewer than k=4"
  with pytest.raises(ValueError, match=text):
    compressor.init(tree)
  with pytest.raises(ValueError, match=text):
    compressor.encode(jax.random.key(0), tree, ())


@pytest.mark.parametrize(
  ("name", "arguments", "error", "text"),
  [
    ("quantize", (1,), ValueError, "bits=1 .*2..16; use sign"),
    ("quantize", (17,), ValueError, "bits=17"),
    ("quantize", (8.0,), TypeError, "bits=8.0 must be an int"),
    ("quantize", (True,), TypeError, "bits=True"),
    ("low_rank", (0,), ValueError, "rank=0"),
    ("low_rank", ("2",), TypeError, "rank='2'"),
    ("random_k", (1, None, 1), TypeError, "unbiased=1"),
    ("message_bytes", (optimizers.sign, 1.0), TypeError, "is function; pass"),
  ],
)
def test_other_arguments_are_checked(name, arguments, error, text):
  with pytest.raises(error, match=f"{name}: .*{text}"):
    getattr(optimizers, name)(*arguments)


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_leaves_without_fractions(compressor, dtype):
  tree = {"x": jnp.zeros(2), "n": jnp.zeros((2, 2), dtype)}
  text = rf"the leaf x\['n'\] has dtype {jnp.dtype(dtype)}"
  with pytest.raises(TypeError, match=text):
    compressor.init(tree)
  state = compressor.init({"x": tree["x"]})
  with pytest.raises(TypeError, match=text):
    compressor.encode(jax.random.key(0), tree, state)


def test_the_record_is_three_functions():
  assert optimizers.Compressor._fields == ("init", "encode", "decode")
  for compressor in COMPRESSORS.values():
    assert isinstance(compressor, optimizers.Compressor)
  double = optimizers.Compressor(*map(functools.partial, COMPRESSORS["sign"]))
  assert message_bytes(double, jnp.zeros(9)) == 4 + 2
