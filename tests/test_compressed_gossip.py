"""Compressed averaging against dense iterations in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.compressed import (
  COMPRESSORS,
  ETA,
  GAMMA,
  SEED,
  SQUEEZED,
  side_by_side,
)
from support.problems import RATE, Quadratic, row, tree

import jfog
from jfog import optimizers, topology

LEAVES = (slice(0, 1), slice(1, 5))  # of `tree`, the second of shape (2, 2)
STEPS = 200  # compared
LONG = 500  # until all converge


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

GRAPHS = {
  "choco": topology.star,  # degrees differ
  "deep_squeeze": topology.exponential,
  "plain": topology.ring,
}


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
