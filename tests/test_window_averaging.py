"""The window optimizers against dense iterations, and without waiting."""

import contextlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.problems import (
  INNERS,
  RATE,
  WIDTH,
  Quadratic,
  chords,
  iterates,
)

import jfog
from jfog import optimizers, topology

STEPS = 300
IN_ORDER = pytest.mark.places("single", "simulate", "mesh")


# Graphs by name, as functions of the place's number of ranks.
PULLING = {
  "directed ring": lambda n: topology.ring(n, "right"),
  "star": topology.star,
  "chords": lambda n: chords(n, "uniform_in"),
}
PUSHING = {
  "exponential": topology.exponential,
  "star": lambda n: topology.from_networkx(
    topology.star(n).to_networkx(), "uniform_out"
  ),
  "chords": lambda n: chords(n, "uniform_out"),
}

BOTH = ("window_put", "window_get")
ALL = (*BOTH, "window_push_sum")


def solve(place, tx, problem, steps):
  """The iterates of the ranks of this process, shape (ranks, steps, ...)."""
  return place.run(
    lambda *arguments: iterates(tx, steps)(*arguments)[0],
    *(problem.hessian, problem.linear, problem.start),
  )


@contextlib.contextmanager
def warned(graph):
  """Expects the warning of a graph that is not doubly stochastic."""
  if graph.is_doubly_stochastic:
    yield
    return
  with pytest.warns(UserWarning, match="weighted with pi"):
    yield


def make(method, inner, graph, *arguments, **options):
  """A window optimizer; expects its warnings."""
  if method == "window_push_sum":
    return optimizers.window_push_sum(inner, graph, *arguments, **options)
  with warned(graph):
    return getattr(optimizers, method)(inner, graph, *arguments, **options)


def assert_iterates(place, result, truth, tolerance=1e-12):
  """Compares with a truth of shape (steps, ranks, ...)."""
  expected = place.mine(truth.swapaxes(0, 1))
  np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


# Dense truths: late[i, j] is the delay, in steps, of messages from rank j at
# rank i.


def stale_combine(inner, matrix, gradient, start, steps, late):
  """`x[i] <- W[i, i] x[i] + sum_j W[i, j] x[j, late] + u[i]`, initially x[i]."""
  n, past, x = len(start), [start], start
  for k in range(steps):
    received = np.array(
      [
        [
          past[k - late[i, j]][j] if k >= late[i, j] else start[i]
          for j in range(n)
        ]
        for i in range(n)
      ]
    )
    received[range(n), range(n)] = x
    x = np.einsum("ij,ijd->id", matrix, received) + inner(gradient(x), x)
    past.append(x)
  return np.array(past[1:])


def push_sum(inner, matrix, gradient, start, steps, every=1, late=None):
  """`(XS, w) <- A (XS + U, w); X = XS / w`, with messages late by `late`.

  A rank keeps at least nine tenths of the smallest weight that it keeps without
  delays. Returns the iterates and, step by step, `sum w`, in-flight weights
  included.
  """
  n, own = len(start), np.diag(matrix)
  rounds = [np.linalg.matrix_power(matrix, t).sum(axis=1) for t in range(50)]
  least = 0.9 * own * np.min(rounds, axis=0)
  late = np.zeros((n, n), int) if late is None else late
  held = np.concatenate([start, np.ones((n, 1))], axis=1)
  in_flight, iterates, masses = [], [], []
  for k in range(steps):
    x = held[:, :-1] / held[:, -1:]
    held[:, :-1] += inner(gradient(x), x)
    if (k + 1) % every == 0:
      t = k // every
      kept = np.maximum(own, np.minimum(1, least / held[:, -1]))
      sent = (1 - kept) / np.maximum(1 - own, 1e-300)
      in_flight += [
        (t + late[i, j], i, matrix[i, j] * sent[j] * held[j])
        for i in range(n)
        for j in range(n)
        if i != j
      ]
      held = held * kept[:, None]
      for _, i, message in (m for m in in_flight if m[0] <= t):
        held[i] = held[i] + message
      in_flight = [m for m in in_flight if m[0] > t]
    iterates.append(held[:, :-1] / held[:, -1:])
    masses.append(held[:, -1].sum() + sum(m[-1] for _, _, m in in_flight))
  return np.array(iterates), np.array(masses)


# Without delays: equal to the synchronous optimizers.


@IN_ORDER
@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize(
  ("inner", "graph", "every"),
  [
    ("sgd", "chords", 1),
    ("momentum", "star", 1),
    ("adamw", "directed ring", 3),
  ],
)
def test_in_program_order_it_is_adapt_with_combine(
  place, rng, x64, method, inner, graph, every
):
  graph = PULLING[graph](place.size)
  transformation, truth = INNERS[inner]
  problem = Quadratic(place.size, rng)
  tx = make(method, transformation(), graph, every)
  result = solve(place, tx, problem, STEPS)
  dense = reference.adapt_with_combine(
    truth(),
    [reference.mixing(graph)],
    problem.gradient,
    problem.start,
    STEPS,
    every,
  )
  assert_iterates(place, result, dense)
  with warned(graph):
    tx = optimizers.adapt_with_combine(transformation(), graph, every)
  other = solve(place, tx, problem, STEPS)
  np.testing.assert_allclose(result, other, rtol=1e-12, atol=1e-12)


@IN_ORDER
@pytest.mark.parametrize(
  ("inner", "graph", "every"),
  [
    ("sgd", "chords", 1),
    ("momentum", "star", 1),
    ("adamw", "chords", 3),
    ("sgd", "exponential", 1),
  ],
)
def test_in_program_order_it_is_push_sum(place, rng, x64, inner, graph, every):
  graph = PUSHING[graph](place.size)
  transformation, truth = INNERS[inner]
  problem = Quadratic(place.size, rng)
  tx = optimizers.window_push_sum(transformation(), graph, every)
  result = solve(place, tx, problem, STEPS)
  dense, _ = push_sum(
    truth(),
    reference.mixing(graph),
    problem.gradient,
    problem.start,
    STEPS,
    every,
  )
  assert_iterates(place, result, dense)
  if graph.is_doubly_stochastic and every == 1:  # then w stays 1
    tx = optimizers.adapt_then_combine(transformation(), graph)
    other = solve(place, tx, problem, STEPS)
    np.testing.assert_allclose(result, other, rtol=1e-12, atol=1e-12)


@pytest.mark.places("simulate")
def test_what_is_published_are_parameters(place, rng):
  """Exposed values include the gradient step: averages alone are not exposed."""
  graph = topology.ring(place.size, "right")
  tx = optimizers.window_get(optax.sgd(0.5), graph)
  behind = {(i - 1) % place.size: 1 for i in range(place.size)}

  def program(x, g):
    state: Any = tx.init(x)
    seen = []
    for _ in range(2):
      updates, state = tx.update(g, state, x)
      window = jfog.win_get(state.window)
      got, _ = jfog.win_update(window, x, self_weight=0, src_weights=behind)
      seen.append((x, got))
      x = x + updates
    return seen

  x, g = rng.randn(2, place.size, 3).astype(np.float32)
  for entered, got in place.run(program, x, g):
    np.testing.assert_array_equal(got, np.roll(entered, 1, axis=0))


@pytest.mark.places("simulate", "mesh", "single")
@pytest.mark.parametrize("method", BOTH)
def test_weights_of_each_step(place, rng, x64, method):
  """They take the place of the topology's, on its edges."""
  n, steps = place.size, 20
  graph = chords(n, "uniform_in")
  problem = Quadratic(n, rng)
  weights = rng.rand(steps, n, n)
  tx = make(method, optax.sgd(RATE), graph)

  def program(hessian, linear, x):
    state: Any = tx.init(x)

    def update(carry, w):
      x, state = carry
      gradient = hessian @ x - linear
      updates, state = tx.update(gradient, state, x, weights=w)
      x = optax.apply_updates(x, updates)
      return (x, state), x

    return jax.lax.scan(update, (x, state), weights)[1]

  result = place.run(
    jax.jit(program), problem.hessian, problem.linear, problem.start
  )
  x, dense = problem.start, []
  edges = reference.mixing(graph) != 0
  np.fill_diagonal(edges, True)
  for w in weights:
    x = (w * edges) @ x - RATE * problem.gradient(x)
    dense.append(x)
  assert_iterates(place, result, np.array(dense))
  with pytest.raises(ValueError, match=rf"weights has shape \({n},\)"):
    place.run(
      lambda x: tx.update(x, tx.init(x), x, weights=np.ones(n))[0],
      problem.start,
    )


@pytest.mark.places("mpi-2", "mpi-3", "mpi-4")
@pytest.mark.parametrize("every", [1, 3])
def test_a_put_at_the_end_of_an_update_is_read_at_once(place, rng, every):
  """Ranks take turns: each reads the parameters that the one before just made."""
  n, steps = place.size, 7
  graph = topology.ring(n, "right")
  tx = make("window_put", optax.sgd(0.1), graph, every)
  start, target = rng.randn(2, n, 5).astype(np.float32)

  def program(x, target):
    state: Any = tx.init(x)
    update = jax.jit(tx.update)
    seen = []
    for _ in range(steps):
      for turn in range(n):
        jax.block_until_ready(state)
        jfog.barrier()
        if jfog.rank() == turn:
          updates, state = update(x - target, state, x)
          x = optax.apply_updates(x, updates)
          seen.append(x)
    jax.block_until_ready(state)
    jfog.barrier()
    jfog.win_free(state.window)
    return jnp.stack(seen)

  x = start.astype(np.float64)
  put, dense, matrix = x.copy(), [], reference.mixing(graph)
  for k in range(steps):
    for i in range(n):
      mixed = x[i]
      if (k + 1) % every == 0:
        mixed = matrix[i, i] * x[i]
        mixed = mixed + sum(matrix[i, j] * put[j] for j in range(n) if j != i)
      x[i] = mixed - 0.1 * (x[i] - target[i])
      if (k + 2) % every == 0:
        put[i] = x[i]
    dense.append(x.copy())
  assert_iterates(
    place, place.run(program, start, target), np.array(dense), 1e-4
  )


# With delays.


def uneven(n):
  """Delays of 0 to 3, a different one per edge."""
  return (np.arange(n)[:, None] * 2 + np.arange(n)) % 4


@pytest.mark.places("simulate")
@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("delay", [2, "uneven"])
def test_delays_are_stale_reads(place, rng, x64, method, delay):
  n = place.size
  graph = chords(n, "uniform_in")
  problem = Quadratic(n, rng)
  delay = uneven(n) if delay == "uneven" else delay
  tx = make(method, optax.sgd(RATE), graph, delay=delay)
  result = solve(place, tx, problem, 100)
  dense = stale_combine(
    reference.sgd(RATE),
    reference.mixing(graph),
    problem.gradient,
    problem.start,
    100,
    np.broadcast_to(delay, (n, n)),
  )
  assert_iterates(place, result, dense)


@pytest.mark.places("simulate")
@pytest.mark.parametrize("graph", ["chords", "exponential"])
@pytest.mark.parametrize("delay", [2, "uneven"])
def test_push_sum_with_delays(place, rng, x64, graph, delay):
  n = place.size
  graph = PUSHING[graph](n)
  problem = Quadratic(n, rng)
  delay = uneven(n) if delay == "uneven" else delay
  tx = optimizers.window_push_sum(optax.sgd(0.05), graph, delay=delay)
  result = solve(place, tx, problem, 100)
  dense, masses = push_sum(
    reference.sgd(0.05),
    reference.mixing(graph),
    problem.gradient,
    problem.start,
    100,
    late=np.broadcast_to(delay, (n, n)),
  )
  np.testing.assert_allclose(masses, n, rtol=1e-12)
  assert_iterates(place, result, dense)


@pytest.mark.places("simulate", "mesh")
def test_push_sum_with_delays_reaches_the_average_and_loses_nothing(
  place, rng, x64
):
  graph = chords(place.size, "uniform_out")
  # A different delay in each of seven updates.
  delay = rng.randint(0, 6, (7, place.size, place.size))
  tx = optimizers.window_push_sum(optax.set_to_zero(), graph, delay=delay)

  @jax.jit
  def program(x):
    def update(carry, _):
      x, state = carry
      updates, state = tx.update(jnp.zeros_like(x), state, x)
      return (x + updates, state), None

    start: Any = x, tx.init(x)
    (x, state), _ = jax.lax.scan(update, start, length=400)
    held, window = state.biased, state.window
    for _ in range(6):  # until all messages have arrived
      held, window = jfog.win_update_then_collect(window, held)
    return x, held, jfog.win_associated_p(window)

  x = rng.randn(place.size, 3)
  mean = np.broadcast_to(x.mean(axis=0), x.shape)
  last, held, weights = place.run(program, x)
  np.testing.assert_allclose(last, mean, rtol=0, atol=1e-12)
  np.testing.assert_allclose(np.sum(weights), place.size, rtol=1e-12)
  np.testing.assert_allclose(
    np.sum(held, axis=0), x.sum(axis=0), rtol=1e-12, atol=1e-12
  )


@pytest.mark.places("simulate")
@pytest.mark.parametrize("make", PUSHING.values(), ids=PUSHING)
def test_a_rank_alone_keeps_its_weight(place, rng, make):
  """A hundred updates in which only messages of rank 1 arrive."""
  n = place.size
  graph = make(n)
  far = np.where(np.arange(n) == 1, 0, 1000)  # by source
  tx = optimizers.window_push_sum(
    optax.sgd(0.1), graph, delay=np.broadcast_to(far, (n, n))
  )

  @jax.jit
  def program(x):
    def update(carry, _):
      x, state = carry
      updates, state = tx.update(x - 1.0, state, x)
      window = optax.tree_utils.tree_get(state, "window")
      return (x + updates, state), jfog.win_associated_p(window)

    start: Any = x, tx.init(x)
    (x, _), weights = jax.lax.scan(update, start, length=100)
    return x, weights

  x, weights = place.run(program, rng.randn(n, 3).astype(np.float32))
  assert np.min(weights) > 0.9 * np.diag(reference.mixing(graph)).min() / n
  np.testing.assert_allclose(x, 1.0, rtol=0, atol=1e-3)


# On MPI, at independent paces.


def wander(tx, gradient, x, pace):
  """Two seconds of updates without waiting, with uneven pauses."""
  state: Any = tx.init(x)

  @jax.jit
  def step(x, state):
    updates, state = tx.update(gradient(x), state, x)
    return optax.apply_updates(x, updates), state

  x, state = step(x, state)  # compiles
  jfog.barrier()
  end = time.monotonic() + 2.0
  while time.monotonic() < end:
    x, state = jax.block_until_ready(step(x, state))
    time.sleep(pace.exponential(0.002))
  jfog.barrier()
  return x, state


@pytest.mark.places("mpi")
@pytest.mark.mpi(2, 3)
def test_push_sum_at_random_paces_reaches_the_average(place, rng, x64):
  graph = chords(place.size, "uniform_out")
  tx = optimizers.window_push_sum(optax.set_to_zero(), graph)
  start = rng.randn(place.size, 100)
  mine = jnp.asarray(start[jfog.rank()])
  pace = np.random.RandomState(100 + jfog.rank())
  _, state = wander(tx, jnp.zeros_like, mine, pace)
  held, window = jfog.win_update_then_collect(state.window, state.biased)
  weight = jfog.win_associated_p(window)
  total, weights = jfog.allreduce((held, weight), "sum")
  # The sums are conserved.
  np.testing.assert_allclose(total, start.sum(axis=0), rtol=0, atol=1e-11)
  np.testing.assert_allclose(weights, place.size, rtol=1e-12)
  np.testing.assert_allclose(
    held / weight, start.mean(axis=0), rtol=0, atol=1e-6
  )
  jfog.win_free(window)


@pytest.mark.places("mpi")
@pytest.mark.mpi(2, 3)
@pytest.mark.parametrize("method", ALL)
def test_training_at_random_paces_comes_close(place, rng, x64, method):
  """Faster ranks count more, so the result is near the average only."""
  graph = topology.ring(place.size)
  tx = getattr(optimizers, method)(optax.sgd(0.05), graph)
  target = rng.randn(place.size, WIDTH)
  mine = target[jfog.rank()]
  pace = np.random.RandomState(200 + jfog.rank())
  start = jnp.asarray(np.full(WIDTH, 100.0))  # not weakly typed
  x, state = wander(tx, lambda x: x - mine, start, pace)
  jfog.win_free(state.window)
  # Initially about 222.
  assert np.linalg.norm(x - target.mean(axis=0)) < 5.0
