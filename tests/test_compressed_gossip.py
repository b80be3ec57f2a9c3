"""Compressed averaging against dense iterations in float64."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.problems import RATE, Quadratic, row, tree

import jfog
from jfog import optimizers, topology

LEAVES = (slice(0, 1), slice(1, 5))  # of `tree`, the second of shape (2, 2)
GAMMA = 0.3
ETA = 0.5
SEED = 7
STEPS = 200  # compared
LONG = 500  # until all converge

COMPRESSORS = {
  "identity": optimizers.identity(),
  "low_rank": optimizers.low_rank(1),
  "quantize": optimizers.quantize(5),
  "random_k": optimizers.random_k(k=1),
  "sign": optimizers.sign(),
  "top_k": optimizers.top_k(k=1),
}
SQUEEZED = {"quantize": optimizers.quantize(8), "sign": optimizers.sign()}

# All methods in simulation; fewer elsewhere, as every rank compiles its own
# program. MPI covers all kinds of payloads: bytes, indices, factors and values.
PARTS = {
  "single": {"choco": ("top_k",)},
  "simulate-5": {
    "choco": tuple(COMPRESSORS),
    "deep_squeeze": ("quantize",),
    "plain": ("identity",),
  },
  "mesh-4": {"choco": ("random_k", "sign")},
  "mpi-4": {
    "choco": ("low_rank", "quantize", "sign"),
    "deep_squeeze": ("sign",),
  },
  "mpi-8": {"choco": ("random_k", "top_k")},
}
# With --soak. On 8 ranks low_rank normalizes differences at the level of
# rounding, so it is left out.
LONG_PARTS = {
  "mpi-4": {"choco": tuple(COMPRESSORS), "deep_squeeze": tuple(SQUEEZED)},
  "mpi-8": {
    "choco": ("identity", "quantize", "random_k", "sign", "top_k"),
    "deep_squeeze": tuple(SQUEEZED),
  },
}
PLAIN, SIGN = optax.sgd(RATE), optimizers.sign()

GRAPHS = {
  "choco": topology.star,  # degrees differ
  "deep_squeeze": topology.exponential,
  "plain": topology.ring,
}


def side_by_side(compressors):
  """A compressor of dicts that applies to each entry the one of its name."""

  def init(tree):
    return {name: compressors[name].init(part) for name, part in tree.items()}

  def encode(key, tree, state):
    results = {
      name: compressors[name].encode(key, part, state[name])
      for name, part in tree.items()
    }
    message, state = (
      {name: result[i] for name, result in results.items()} for i in range(2)
    )
    return message, state

  def decode(message, like):
    return {
      name: compressors[name].decode(message[name], part)
      for name, part in like.items()
    }

  return optimizers.Compressor(init, encode, decode)


def make(method, n):
  """A transformation of dicts, one entry per compressor."""
  inner, graph = optax.sgd(RATE), GRAPHS[method](n)
  if method == "deep_squeeze":
    compressor = side_by_side(SQUEEZED)
    return optimizers.deep_squeeze(inner, graph, compressor, ETA, seed=SEED)
  gamma = GAMMA if method == "choco" else 1.0
  compressor = side_by_side(COMPRESSORS)
  return optimizers.choco(inner, graph, compressor, gamma, seed=SEED)


def iterates(parts, n, steps, hessian, linear, start):
  """A scan of all methods from a rank's problem to its iterates."""
  known = {method: make(method, n) for method in parts}

  def update(carry, _):
    new = {}
    for method, (params, state) in carry.items():
      grads = {
        name: tree(hessian @ row(part) - linear)
        for name, part in params.items()
      }
      updates, state = known[method].update(grads, state, params)
      new[method] = optax.apply_updates(params, updates), state
    return new, {
      method: {name: row(part) for name, part in params.items()}
      for method, (params, _) in new.items()
    }

  carry = {}
  for method, names in parts.items():
    params = {name: tree(start) for name in names}
    carry[method] = params, known[method].init(params)
  return jax.lax.scan(update, carry, length=steps)[1]


@functools.cache
def simulated():
  """A problem of five ranks and all iterates until convergence."""
  problem = Quadratic(5, np.random.RandomState(0))
  run = functools.partial(iterates, PARTS["simulate-5"], 5, LONG)
  result = jax.jit(jfog.simulate(run, 5))(
    problem.hessian, problem.linear, problem.start
  )
  return problem, jax.tree.map(np.asarray, result)


@functools.cache
def random_numbers(n):
  """Random numbers of all leaves, steps and ranks, by the documented rule."""

  @jax.jit
  def draw():
    def one(step, rank):
      key = jax.random.fold_in(jax.random.key(SEED), step)
      key = jax.random.fold_in(key, rank)
      return {
        dtype: [
          jax.random.uniform(jax.random.fold_in(key, i), (size,), dtype)
          for i, size in enumerate((1, 4))
        ]
        for dtype in ("float32", "float64")
      }

    ranks = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(ranks, in_axes=(0, None))(jnp.arange(STEPS), jnp.arange(n))

  return jax.tree.map(np.asarray, draw())


class Dense:
  """NumPy version of a compressor, applied to the rows of all ranks."""

  def __init__(self, name, n, bits):
    self.compress = getattr(self, name)
    self.random = random_numbers(n)
    self.levels = 2 ** (bits - 1) - 1
    self.factors = {}  # low_rank's Q of every rank

  def __call__(self, v, step):
    c = np.zeros_like(v)
    for rank in range(len(v)):
      for i, leaf in enumerate(LEAVES):
        c[rank, leaf] = self.compress(v[rank, leaf], step, rank, i)
    return c

  def identity(self, v, step, rank, i):
    return v

  def sign(self, v, step, rank, i):
    return np.where(v >= 0, 1, -1) * np.abs(v).mean()

  def top_k(self, v, step, rank, i):
    return np.where(np.arange(len(v)) == np.argmax(np.abs(v)), v, 0)

  def random_k(self, v, step, rank, i):
    lots = self.random["float32"][i][step, rank]
    return np.where(np.arange(len(v)) == np.argmax(lots), v, 0)

  def quantize(self, v, step, rank, i):
    noise = self.random["float64"][i][step, rank]
    greatest = np.abs(v).max()
    code = np.floor(self.levels * v / greatest + noise)
    return greatest * code / self.levels

  def low_rank(self, v, step, rank, i):
    if i == 0:
      return v
    if rank not in self.factors:
      like = {"b": jnp.zeros(()), "w": jnp.zeros((2, 2))}
      first = COMPRESSORS["low_rank"].init(like)  # by the library
      self.factors[rank] = np.asarray(first[0], float)
    v = v.reshape(2, 2)
    p = v @ self.factors[rank]
    p = p / np.linalg.norm(p)
    self.factors[rank] = v.T @ p
    return (p @ p.T @ v).ravel()


def dense_choco(compress, matrix, gamma, gradient, x):
  hat, iterates = np.zeros_like(x), []
  for k in range(STEPS):
    h = x - RATE * gradient(x)
    hat = hat + compress(h - hat, k)
    x = h + gamma * (matrix @ hat - hat)
    iterates.append(x)
  return np.array(iterates)


def dense_deep_squeeze(compress, matrix, eta, gradient, x):
  e, iterates = np.zeros_like(x), []
  for k in range(STEPS):
    v = x - RATE * gradient(x) + e
    c = compress(v, k)
    e = v - c
    x = c + eta * (matrix @ c - c)
    iterates.append(x)
  return np.array(iterates)


def bytes_of_a_step(parts, n, rank):
  """Bytes that a rank sends in one update of all methods."""
  total, one = 0, tree(jnp.zeros(5))
  for method, names in parts.items():
    known = SQUEEZED if method == "deep_squeeze" else COMPRESSORS
    sizes = [optimizers.message_bytes(known[name], one) for name in names]
    total += sum(sizes) * len(GRAPHS[method](n).out_neighbors(rank))
  return total


def limit(problem, matrix):
  """The limit of `X <- W (X - a G)`: `(I - W (I - a H)) X = a W c`."""
  n, width = problem.start.shape
  blocks = np.zeros((n, width, n, width))
  for i in range(n):
    blocks[i, :, i] = problem.hessian[i]
  wide = np.kron(matrix, np.eye(width))
  eye = np.eye(n * width)
  system = eye - wide @ (eye - RATE * blocks.reshape(eye.shape))
  right = RATE * wide @ problem.linear.ravel()
  return np.linalg.solve(system, right).reshape(n, width)


@pytest.mark.places(*PARTS)
def test_iterates_are_those_of_the_dense_recursion(place, rng, x64, soak):
  """All compressors in one program; ranks have one neighbor or many."""
  n, parts = place.size, PARTS[place.name]
  if soak:
    parts = LONG_PARTS.get(place.name, parts)
  if place.name == "simulate-5":
    problem, result = simulated()
  else:
    problem = Quadratic(n, rng)
    if place.kind == "mpi":
      jfog.diagnostics.reset_counters()
    program = place.map(functools.partial(iterates, parts, n, STEPS), (0, 0, 0))
    result = jax.jit(program)(problem.hessian, problem.linear, problem.start)
  if place.kind == "mpi":
    counted = jfog.diagnostics.counters()
    assert counted["bytes_sent"] == STEPS * bytes_of_a_step(
      parts, n, jfog.rank()
    )
  dense: Any = {"choco": (dense_choco, GAMMA, 5), "plain": (dense_choco, 1, 5)}
  dense["deep_squeeze"] = dense_deep_squeeze, ETA, 8
  for method, names in parts.items():
    recursion, rate, bits = dense[method]
    matrix = reference.mixing(GRAPHS[method](n))
    for name in names:
      truth = recursion(
        Dense(name, n, bits), matrix, rate, problem.gradient, problem.start
      )
      expected = place.mine(truth.swapaxes(0, 1))
      compared = result[method][name][..., :STEPS, :]
      np.testing.assert_allclose(
        compared, expected, rtol=1e-10, atol=1e-10, err_msg=f"{method}, {name}"
      )


def test_without_compression_it_is_adapt_then_combine(x64):
  problem, result = simulated()
  atc = reference.adapt_then_combine(
    reference.sgd(RATE),
    [reference.mixing(topology.ring(5))],
    problem.gradient,
    problem.start,
    300,
  )
  plain = result["plain"]["identity"][:, :300]
  reference.assert_close(plain, atc.swapaxes(0, 1), 1e-12)


def test_the_limit_does_not_depend_on_the_compressor(x64):
  problem, result = simulated()
  matrix = reference.mixing(topology.star(5))
  truth = limit(problem, np.eye(5) + GAMMA * (matrix - np.eye(5)))
  for name in COMPRESSORS:
    last = result["choco"][name][:, -1]
    np.testing.assert_allclose(last, truth, rtol=0, atol=1e-12)


def test_deep_squeeze_of_many_bits_converges(x64):
  problem, result = simulated()
  eye, matrix = np.eye(5), reference.mixing(topology.exponential(5))
  truth = limit(problem, eye + ETA * (matrix - eye))
  late = result["deep_squeeze"]["quantize"][:, 300:]
  assert np.abs(late - truth[:, None]).max() < 0.02
  assert (
    np.abs(truth - problem.minimizer()).max() > 0.2
  )  # the scale of the errors above


@pytest.mark.places("mpi-4")
def test_what_travels_is_the_message_and_nothing_else(place):
  """Includes an empty leaf and a scalar."""
  like = {"e": (0, 3), "s": (), "w": (100, 100)}
  graph = topology.star(place.size)
  compressor = optimizers.top_k(fraction=0.01)
  inner = optax.sgd(RATE)
  counted = {}
  params = {key: jnp.ones(shape) for key, shape in like.items()}
  for name, tx in (
    ("all", optimizers.adapt_then_combine(inner, graph)),
    ("few", optimizers.choco(inner, graph, compressor, 0.2)),
  ):
    state, update = tx.init(params), jax.jit(tx.update)
    jfog.diagnostics.reset_counters()
    for _ in range(3):
      updates, state = update(params, state, params)
    assert {key: x.shape for key, x in updates.items()} == like
    assert all(np.isfinite(x).all() for x in updates.values())
    counted[name] = jfog.diagnostics.counters()["bytes_sent"]
  messages = 3 * len(graph.out_neighbors(jfog.rank()))
  assert counted["all"] == messages * 4 * 10_001
  assert counted["few"] == messages * optimizers.message_bytes(
    compressor, params
  )
  assert counted["few"] <= 0.03 * counted["all"]


@pytest.mark.places("simulate-5", "mpi-4")
def test_a_rank_alone_and_two_that_swap(place, rng):
  """Rows without a self weight, and rows with a self weight only."""
  matrix = np.eye(place.size)
  matrix[:2, :2] = [[0, 1], [1, 0]]
  graph = topology.Topology(matrix, connected=False)
  tx = optimizers.choco(
    optax.set_to_zero(), graph, optimizers.identity(), gamma=1
  )

  @jax.jit
  def program(x):
    updates, _ = tx.update(x, tx.init(x), x)
    return x + updates

  x = rng.randn(place.size, 3).astype(np.float32)
  result = place.run(program, x)
  np.testing.assert_allclose(result, place.mine(matrix @ x), atol=1e-6)


# One step, and the state.


def test_what_does_not_travel_is_kept(rng):
  """`c + e = v`, with `c` as decoded by all ranks."""
  compressor = side_by_side({**SQUEEZED, "top_k": COMPRESSORS["top_k"]})
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    tx = optimizers.deep_squeeze(
      optax.sgd(1.0), topology.ring(3), compressor, 1.0, seed=SEED
    )

  def program(x, g):
    state: Any = tx.init(x)
    state = state._replace(e=g, step=jnp.asarray(4))
    e: Any = tx.update(g, state, x)[1]
    key = jax.random.fold_in(jax.random.key(SEED), 4)
    key = jax.random.fold_in(key, jfog.rank())
    # v = x - g + e = x up to rounding.
    v = jax.tree.map(lambda x, g: (x - g) + g, x, g)
    message, _ = compressor.encode(key, v, compressor.init(v))
    return v, compressor.decode(message, v), e[-1]

  x, g = (
    {name: rng.randn(3, 33).astype(np.float32) for name in (*SQUEEZED, "top_k")}
    for _ in range(2)
  )
  v, c, e = jax.jit(jfog.simulate(program, 3))(x, g)
  for name in v:
    np.testing.assert_allclose(c[name] + e[name], v[name], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(c["top_k"] + e["top_k"], v["top_k"])


def test_states_are_arrays_and_can_be_restored(rng):
  names = ("low_rank", "random_k")
  tx = optimizers.choco(
    optax.sgd(RATE), topology.ring(3), side_by_side(COMPRESSORS), GAMMA
  )
  x, g = (
    {name: rng.randn(3, 4, 3).astype(np.float32) for name in names}
    for _ in range(2)
  )
  state: Any = jax.jit(jfog.simulate(tx.init, 3))(x)
  assert isinstance(state, optimizers.ChocoState)
  assert state.step.dtype == jnp.int32
  assert all(len(leaf) == 3 for leaf in jax.tree.leaves(state))
  update = jax.jit(jfog.simulate(tx.update, 3))
  straight = packed = state
  for _ in range(3):
    expected, straight = update(g, straight, x)
    leaves, structure = jax.tree.flatten(packed)
    saved = [np.asarray(leaf) for leaf in leaves]
    result, packed = update(g, jax.tree.unflatten(structure, saved), x)
    for one, other in zip(
      jax.tree.leaves((result, packed)),
      jax.tree.leaves((expected, straight)),
      strict=True,
    ):
      np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(packed.step, np.full(3, 3))
  assert jax.tree.structure(packed) == jax.tree.structure(state)


def test_half_parameters_have_float32_buffers(rng):
  graph, sign = topology.ring(3), optimizers.sign()
  choco = optimizers.choco(optax.sgd(0.5), graph, sign, GAMMA)
  deep_squeeze = optimizers.deep_squeeze(optax.sgd(0.5), graph, sign, ETA)

  def program(x, g):
    results = []
    for tx in (choco, deep_squeeze):
      updates, state = tx.update(g, tx.init(x), x)
      results.append((updates, state, optax.apply_updates(x, updates)))
    return results

  x, g = jnp.asarray(rng.randn(2, 3, 40), jnp.bfloat16)
  first, second = jax.jit(jfog.simulate(program, 3))(x, g)
  x, g = np.asarray(x, float), np.asarray(g, float)
  h = x - 0.5 * g
  c = np.where(h >= 0, 1, -1) * np.abs(h).mean(axis=1, keepdims=True)
  moved = reference.mean(3) @ c - c
  for (updates, state, new), truth in (
    (first, h + GAMMA * moved),
    (second, c + ETA * moved),
  ):
    assert updates.dtype == jnp.float32
    assert new.dtype == jnp.bfloat16
    kept = state[3:]
    assert {buffer.dtype for buffer in kept} == {jnp.dtype("float32")}
    np.testing.assert_allclose(updates, truth - x, rtol=1e-5, atol=1e-5)


@pytest.mark.places("mesh")
def test_wrapped_by_other_transformations(place, rng):
  def choco(rate):
    compressor = side_by_side({"b": optimizers.sign(), "w": optimizers.sign()})
    graph = topology.ring(place.size)
    return optimizers.choco(optax.sgd(rate), graph, compressor, GAMMA)

  known = {
    "plain": choco(RATE),
    "chained": optax.chain(optax.scale(2.0), choco(RATE / 2)),
    "masked": optax.masked(choco(RATE), {"b": False, "w": True}),
    "several": optax.MultiSteps(choco(RATE), 2).gradient_transformation(),
  }

  @jax.jit
  def program(x, g):
    def update(carry, _):
      new = {}
      for name, (params, state) in carry.items():
        for _ in range(2 if name == "several" else 1):
          updates, state = known[name].update(g, state, params)
          params = optax.apply_updates(params, updates)
        new[name] = params, state
      return new, None

    carry = {name: (x, tx.init(x)) for name, tx in known.items()}
    carry = jax.lax.scan(update, carry, length=3)[0]
    return {name: params for name, (params, _) in carry.items()}

  x, g = (
    {name: rng.randn(place.size, 4).astype(np.float32) for name in "bw"}
    for _ in range(2)
  )
  result = place.run(program, x, g)
  for name in ("chained", "several"):
    for leaf in "bw":
      np.testing.assert_allclose(
        result[name][leaf], result["plain"][leaf], rtol=1e-5, atol=1e-6
      )
  np.testing.assert_allclose(
    result["masked"]["w"], result["plain"]["w"], rtol=1e-5, atol=1e-6
  )
  untouched = place.mine(
    x["b"] + 3 * g["b"]
  )  # masked returns the gradient unchanged
  np.testing.assert_allclose(result["masked"]["b"], untouched, rtol=1e-5)


def test_an_axis_of_the_users_own_and_a_traced_rate(rng):
  def program(x, gamma):
    tx = optimizers.choco(
      optax.sgd(RATE), topology.ring(3), SIGN, gamma, comm=jfog.Axis("data")
    )
    updates, _ = tx.update(x, tx.init(x), x)
    return updates

  x = rng.randn(3, 4).astype(np.float32)
  ranks = jax.vmap(program, in_axes=(0, None), axis_name="data")
  h = (1 - RATE) * x
  c = np.sign(h) * np.abs(h).mean(axis=1, keepdims=True)
  truth = h + GAMMA * (reference.mean(3) @ c - c) - x
  result = jax.jit(ranks)(x, GAMMA)
  np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)


def test_extra_arguments_reach_the_inner_transformation():
  def update(updates, state, params=None, *, factor, **extra):
    del params, extra
    return jax.tree.map(lambda g: factor * g, updates), state

  wants_factor: Any = update  # optax annotates only the common arguments
  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), wants_factor
  )
  one, exact = topology.fully_connected(1), optimizers.identity()
  jfog.init(backend="single")
  for method in (optimizers.choco, optimizers.deep_squeeze):
    tx = method(inner, one, exact, 0.5)
    x = jnp.zeros(2)
    updates, _ = tx.update(jnp.ones(2), tx.init(x), x, factor=-3.0, other=1)
    np.testing.assert_array_equal(updates, np.full(2, -3.0))
  jfog.shutdown()
