"""The window optimizers against dense iterations, and without waiting."""

import contextlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from support import reference
from support.problems import INNERS, RATE, WIDTH, Quadratic, chords, row, tree

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


def iterates(tx, steps):
  """A jitted scan from a rank's problem to its iterates and last state."""

  @jax.jit
  def program(hessian, linear, start):
    def loss(params):
      x = row(params)
      return x @ hessian @ x / 2 - linear @ x

    def update(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), row(params)

    params = tree(start)
    (_, state), rows = jax.lax.scan(
      update, (params, tx.init(params)), length=steps
    )
    return rows, state

  return program


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


# Together with other transformations of optax.


@pytest.mark.places("simulate")
@pytest.mark.parametrize("method", ALL)
def test_half_parameters_travel_in_float32(place, rng, method):
  graph = topology.fully_connected(place.size)
  tx = getattr(optimizers, method)(optax.sgd(0.5), graph)

  @jax.jit
  def program(x, g):
    state = tx.init(x)
    updates, state = tx.update(g, state, x)
    return updates, optax.apply_updates(x, updates), state

  x, g = jnp.asarray(rng.randn(2, place.size, 50), jnp.bfloat16)
  updates, y, state = place.run(program, x, g)
  assert updates.dtype == jnp.float32
  assert y.dtype == jnp.bfloat16
  assert all(
    leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state.window)
  )
  x, g = np.asarray(x, float), np.asarray(g, float)
  matrix, local = reference.mean(place.size), -0.5 * g
  pushed = method == "window_push_sum"
  new = matrix @ (x + local) if pushed else matrix @ x + local
  np.testing.assert_allclose(updates, place.mine(new - x), rtol=1e-5, atol=1e-5)


@pytest.mark.places("simulate")
def test_push_sum_keeps_what_half_parameters_cannot(place):
  """A step of 1/1000 is lost on a bfloat16 1, but not on the float32 state."""
  graph = topology.exponential(place.size)
  tx = optimizers.window_push_sum(optax.sgd(1.0), graph)

  @jax.jit
  def program(x):
    def update(carry, _):
      x, state = carry
      updates, state = tx.update(jnp.full_like(x, 1e-3), state, x)
      return (optax.apply_updates(x, updates), state), None

    return jax.lax.scan(update, (x, tx.init(x)), length=100)[0][0]

  y = place.run(program, jnp.ones(place.size, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, float), 0.9, rtol=0.01)


@IN_ORDER
@pytest.mark.parametrize("method", ALL)
def test_wrapped_by_other_transformations(place, rng, method):
  """Inside of `masked` and `partition`, behind `chain`."""
  graph = topology.fully_connected(place.size)
  average = getattr(optimizers, method)(optax.sgd(1.0), graph)
  labels = {"own": "own", "shared": "shared"}
  chained = optax.chain(
    optax.clip(0.25),
    optax.partition({"own": optax.sgd(1.0), "shared": average}, labels),
  )
  masked = optax.chain(
    optax.clip(0.25),
    optax.masked(average, {"own": False, "shared": True}),
    optax.masked(optax.scale(-1.0), {"own": True, "shared": False}),
  )

  @jax.jit
  def program(x, g):
    results = []
    for tx in (chained, masked):
      updates, _ = tx.update(g, tx.init(x), x)
      results.append(optax.apply_updates(x, updates))
    return results

  x, g = (
    {key: rng.randn(place.size, 3).astype(np.float32) for key in labels}
    for _ in range(2)
  )
  step = {key: -np.clip(g[key], -0.25, 0.25) for key in labels}
  matrix = reference.mean(place.size)
  shared = matrix @ x["shared"] + step["shared"]
  if method == "window_push_sum":
    shared = matrix @ (x["shared"] + step["shared"])
  truth = {"own": x["own"] + step["own"], "shared": shared}
  for result in place.run(program, x, g):
    for key in labels:
      np.testing.assert_allclose(
        result[key], place.mine(truth)[key], rtol=1e-5, atol=1e-6
      )


STATES = {
  "window_put": optimizers.WindowPutState,
  "window_get": optimizers.WindowGetState,
  "window_push_sum": optimizers.WindowPushSumState,
}


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("delay", [None, 2])
def test_state_is_a_pytree_that_stacks_over_ranks(rng, method, delay):
  x, g = rng.randn(2, 5, 3).astype(np.float32)
  tx = getattr(optimizers, method)(
    optax.adam(RATE), topology.ring(5), 3, delay=delay
  )
  state: Any = jfog.simulate(tx.init, 5)(x)
  assert isinstance(state, STATES[method])
  assert issubclass(STATES[method], tuple)  # a NamedTuple
  assert state.step.dtype == jnp.int32
  assert all(len(leaf) == 5 for leaf in jax.tree.leaves(state))
  assert optax.tree_utils.tree_get(state, "window") is state.window
  traces = []

  def traced(*arguments):
    traces.append(1)
    return tx.update(*arguments)

  update = jax.jit(jfog.simulate(traced, 5))
  straight: Any = state
  packed: Any = state
  for _ in range(4):
    expected, straight = update(g, straight, x)
    leaves, structure = jax.tree.flatten(packed)
    saved = [np.asarray(leaf) for leaf in leaves]
    result, packed = update(g, jax.tree.unflatten(structure, saved), x)
    np.testing.assert_array_equal(result, expected)
  np.testing.assert_array_equal(packed.step, np.full(5, 4))
  assert jax.tree.structure(packed) == jax.tree.structure(state)
  assert len(traces) == 1  # with and without communication


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("axis", "every"), [("vmap", 2), ("shard_map", 1)])
def test_an_axis_of_the_users_own(rng, x64, method, axis, every):
  problem = Quadratic(4, rng)
  arguments = problem.hessian, problem.linear, problem.start

  def program(comm):
    tx = getattr(optimizers, method)(
      optax.adam(RATE), topology.exponential(4), every, comm=comm
    )
    return lambda *arguments: iterates(tx, 5)(*arguments)[0]

  expected = jfog.simulate(program(None), 4)(*arguments)
  own = program(jfog.Axis("data"))
  if axis == "vmap":
    result = jax.vmap(own, axis_name="data")(*arguments)
  else:
    spec = PartitionSpec("data")
    result = jax.shard_map(
      lambda *args: own(*(x[0] for x in args))[None],
      mesh=Mesh(np.array(jax.devices()[:4]), ("data",)),
      in_specs=spec,
      out_specs=spec,
    )(*arguments)
  np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
def test_extra_arguments_reach_the_inner_transformation(method):
  def update(updates, state, params=None, *, factor, **extra):
    del params, extra
    return jax.tree.map(lambda g: factor * g, updates), state

  wants_factor: Any = update  # optax annotates only the common arguments
  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), wants_factor
  )
  tx = getattr(optimizers, method)(inner, topology.ring(2))

  def program(x, g):
    state = tx.init(x)
    for _ in range(2):
      updates, state = tx.update(g, state, x, factor=-3.0, other="ignored")
      x = x + updates
    return x

  x = jfog.simulate(program, 2)(jnp.zeros(2), jnp.ones(2))
  np.testing.assert_array_equal(x, np.full(2, -6.0))
