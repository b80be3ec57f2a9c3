"""The averaging optimizers against dense iterations in float64."""

import contextlib
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

# Graphs by name, as functions of the place's number of ranks.
GRAPHS = {
  "ring": topology.ring,
  "exponential": topology.exponential,
  "star": topology.star,
  "irregular": lambda n: chords(n, "uniform_in"),
  "one_peer": topology.one_peer_exponential,
  "base": lambda n: topology.base_k(n, 1),
}

BOTH = ("adapt_then_combine", "adapt_with_combine")


def iterates(make, steps):
  """A jitted scan from a rank's problem to its iterates, one per row."""

  @jax.jit
  def program(hessian, linear, start, *hyper):
    tx = make(*hyper)

    def loss(params):
      x = row(params)
      return x @ hessian @ x / 2 - linear @ x

    def update(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), row(params)

    params = tree(start)
    return jax.lax.scan(update, (params, tx.init(params)), length=steps)[1]

  return program


def solve(place, make, problem, steps, start=None, hyper=()):
  """The iterates of the ranks of this process, shape (ranks, steps, ...)."""
  start = problem.start if start is None else start
  in_axes = (0, 0, 0, *(None for _ in hyper))
  return place.run(
    iterates(make, steps),
    *(problem.hessian, problem.linear, start, *hyper),
    in_axes=in_axes,
  )


@contextlib.contextmanager
def warned(graph):
  """Expects the warning of a graph that is not doubly stochastic."""
  if graph.is_doubly_stochastic:
    yield
    return
  with pytest.warns(UserWarning, match="weighted with pi"):
    yield


def assert_iterates(place, result, truth, tolerance=1e-10):
  """Compares with a truth of shape (steps, ranks, ...)."""
  expected = place.mine(truth.swapaxes(0, 1))
  np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.mpi(3)
@pytest.mark.parametrize(
  ("method", "inner", "graph", "every"),
  [
    ("adapt_then_combine", "sgd", "ring", 1),
    ("adapt_then_combine", "momentum", "exponential", 1),
    ("adapt_then_combine", "nesterov", "one_peer", 3),
    ("adapt_then_combine", "adam", "base", 1),
    ("adapt_then_combine", "adamw", "star", 3),
    ("adapt_then_combine", "clipped", "irregular", 1),
    ("adapt_with_combine", "sgd", "irregular", 3),
    ("adapt_with_combine", "momentum", "star", 1),
    ("adapt_with_combine", "adam", "base", 3),
    ("adapt_with_combine", "adamw", "one_peer", 1),
  ],
)
def test_iterates_are_those_of_the_dense_recursion(
  place, rng, x64, method, inner, graph, every
):
  graph = GRAPHS[graph](place.size)
  make, truth = INNERS[inner]
  problem = Quadratic(place.size, rng)
  with warned(graph):
    tx = getattr(optimizers, method)(make(), graph, every)
  result = solve(place, lambda: tx, problem, 60)
  matrices = [reference.mixing(graph, t) for t in range(len(graph))]
  dense = getattr(reference, method)(
    truth(), matrices, problem.gradient, problem.start, 60, every
  )
  assert_iterates(place, result, dense)


@pytest.mark.two_axes
@pytest.mark.mpi(3)
@pytest.mark.parametrize(
  ("inner", "every"), [("sgd", 1), ("adamw", 1), ("adam", 3), ("clipped", 3)]
)
def test_gradient_allreduce_is_the_dense_recursion(
  place, rng, x64, inner, every
):
  make, truth = INNERS[inner]
  problem = Quadratic(place.size, rng)
  result = solve(
    place, lambda: optimizers.gradient_allreduce(make(), every), problem, 60
  )
  dense = reference.gradient_allreduce(
    truth(), problem.gradient, problem.start, 60, every
  )
  assert_iterates(place, result, dense)


@pytest.mark.mpi(3)
@pytest.mark.parametrize("method", BOTH)
def test_a_schedule_advances_with_communications(place, method):
  """The averaging adds its step, so the sum encodes the sequence of steps."""
  tx = getattr(optimizers, method)(
    optax.set_to_zero(), lambda x, step: x + 10.0**step, every=3
  )

  @jax.jit
  def program(x):
    def update(carry, _):
      x, state = carry
      updates, state = tx.update(jnp.zeros_like(x), state, x)
      return (x + updates, state), x + updates

    (_, state), seen = jax.lax.scan(update, (x, tx.init(x)), length=10)
    return seen, state.step

  seen, count = place.run(program, np.zeros(place.size, np.float32))
  expected = [0, 0, 1, 1, 1, 11, 11, 11, 111, 111]
  expected = np.broadcast_to(expected, (place.size, 10))
  np.testing.assert_array_equal(seen, place.mine(expected))
  np.testing.assert_array_equal(count, place.mine(np.full(place.size, 10)))


@pytest.mark.two_axes
@pytest.mark.mpi(2, 5)
def test_averaging_may_be_a_function(place, rng):
  """Two rounds per step, by a user-defined averaging."""
  graph = topology.one_peer_exponential(place.size)

  def average(params, step):
    params = jfog.neighbor_allreduce(params, graph, 2 * step)
    return jfog.neighbor_allreduce(params, graph, 2 * step + 1)

  tx = optimizers.adapt_then_combine(optax.sgd(1.0), average)

  @jax.jit
  def program(x, g):
    state = tx.init(x)
    for _ in range(2):
      updates, state = tx.update(g, state, x)
      x = optax.apply_updates(x, updates)
    return x

  x, g = rng.randn(2, place.size, 3).astype(np.float32)
  truth = x.astype(float)
  for step in range(2):
    truth = reference.mixing(graph, 2 * step) @ (truth - g)
    truth = reference.mixing(graph, 2 * step + 1) @ truth
  result = place.run(program, x, g)
  np.testing.assert_allclose(result, place.mine(truth), rtol=1e-5, atol=1e-5)


@pytest.mark.mpi(3)
@pytest.mark.parametrize("method", BOTH)
def test_half_parameters_get_float32_updates_and_are_rounded_once(
  place, rng, method
):
  graph = topology.fully_connected(place.size)
  tx = getattr(optimizers, method)(optax.sgd(0.5), graph)

  @jax.jit
  def program(x, g):
    updates, _ = tx.update(g, tx.init(x), x)
    return updates, optax.apply_updates(x, updates)

  x, g = jnp.asarray(rng.randn(2, place.size, 50), jnp.bfloat16)
  updates, y = place.run(program, x, g)
  assert updates.dtype == jnp.float32
  assert y.dtype == jnp.bfloat16
  x, g = np.asarray(x, float), np.asarray(g, float)
  matrix = reference.mean(place.size)
  local = -0.5 * g
  new = matrix @ (x + local) if "then" in method else matrix @ x + local
  np.testing.assert_allclose(updates, place.mine(new - x), rtol=1e-5, atol=1e-5)
  # Rounding once is off by at most half a unit in the last place, plus the
  # float32 error of the sum.
  error = np.abs(np.asarray(y, float) - place.mine(new))
  _, exponent = np.frexp(place.mine(new))
  assert (error <= 0.5 * 2.0 ** (exponent - 8) + 1e-5).all()


@pytest.mark.mpi(2)
def test_half_gradients_are_accumulated_in_float32(place):
  """In bfloat16, 256 + 1 is 256: a sum in bfloat16 loses sixteen ones."""
  tx = optimizers.gradient_allreduce(optax.sgd(1.0), every=17)

  @jax.jit
  def program(x):
    def update(carry, g):
      x, state = carry
      updates, state = tx.update(g, state, x)
      return (optax.apply_updates(x, updates), state), None

    gradients = jnp.ones(17, jnp.bfloat16).at[0].set(256)
    return jax.lax.scan(update, (x, tx.init(x)), gradients)[0][0]

  y = place.run(program, jnp.zeros(place.size, jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(y, float), place.mine(np.full(place.size, -16.0))
  )


@pytest.mark.mpi(3)
def test_wrapped_by_other_transformations(place, rng):
  """Inside of `masked` and `partition`, behind `chain`."""
  graph = topology.fully_connected(place.size)
  average = optimizers.adapt_then_combine(optax.sgd(1.0), graph)
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
  local = {key: x[key] - np.clip(g[key], -0.25, 0.25) for key in labels}
  truth = {**local, "shared": reference.mean(place.size) @ local["shared"]}
  for result in place.run(program, x, g):
    for key in labels:
      np.testing.assert_allclose(
        result[key], place.mine(truth)[key], rtol=1e-5, atol=1e-6
      )


@pytest.mark.mpi(3)
@pytest.mark.parametrize("method", BOTH)
def test_equal_float32_values_do_not_drift(place, rng, method):
  """Weights of one third are inexact: a plain weighted sum would drift."""
  graph = topology.ring(place.size)
  tx = getattr(optimizers, method)(optax.sgd(0.1), graph)

  @jax.jit
  def program(x):
    def update(carry, _):
      x, state = carry
      updates, state = tx.update(jnp.zeros_like(x), state, x)
      return (optax.apply_updates(x, updates), state), None

    return jax.lax.scan(update, (x, tx.init(x)), length=500)[0][0]

  x = np.broadcast_to(rng.randn(20).astype(np.float32), (place.size, 20))
  np.testing.assert_array_equal(place.run(program, x), place.mine(x))


# Invariants and limits of the iterates.


@pytest.mark.mpi(4)
def test_gradient_allreduce_is_atc_of_the_complete_graph(place, rng, x64):
  problem = Quadratic(place.size, rng)
  start = np.broadcast_to(problem.start[0], problem.start.shape)
  graph = topology.fully_connected(place.size)
  one, other = (
    solve(place, make, problem, 300, start)
    for make in (
      lambda: optimizers.adapt_then_combine(optax.sgd(RATE), graph),
      lambda: optimizers.gradient_allreduce(optax.sgd(RATE)),
    )
  )
  np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.places("simulate-5")
def test_limits_on_heterogeneous_data(place, rng, x64):
  problem = Quadratic(place.size, rng)
  graph = topology.ring(place.size)
  matrix = reference.mixing(graph)
  eye = np.eye(place.size)

  def limit(make):
    run = jax.jit(place.map(iterates(make, 3000), in_axes=(0, 0, 0, None)))

    def at(rate):
      x = run(problem.hessian, problem.linear, problem.start, rate)
      np.testing.assert_allclose(x[:, -1], x[:, -2], rtol=0, atol=1e-13)
      return np.asarray(x[:, -1])

    return at

  def bias(x):
    return np.linalg.norm(x - problem.minimizer())

  atc = limit(lambda a: optimizers.adapt_then_combine(optax.sgd(a), graph))
  awc = limit(lambda a: optimizers.adapt_with_combine(optax.sgd(a), graph))
  heavy = limit(
    lambda a: optimizers.adapt_then_combine(optax.sgd(a, momentum=0.5), graph)
  )

  # ATC: (I - W (I - a H)) X = a W c, with H the blocks of all ranks.
  rate = 0.04
  blocks = np.zeros((place.size, WIDTH, place.size, WIDTH))
  for i in range(place.size):
    blocks[i, :, i] = problem.hessian[i]
  blocks = blocks.reshape(place.size * WIDTH, -1)
  wide = np.kron(matrix, np.eye(WIDTH))
  system = np.eye(len(wide)) - wide @ (np.eye(len(wide)) - rate * blocks)
  truth = np.linalg.solve(system, rate * wide @ problem.linear.ravel())
  np.testing.assert_allclose(atc(rate).ravel(), truth, rtol=1e-11, atol=1e-11)

  # Momentum b amplifies the step by 1/(1 - b).
  np.testing.assert_allclose(heavy(rate / 2), atc(rate), rtol=1e-11, atol=1e-11)

  # AWC: (I - W) X = -a g(X).
  x = awc(rate)
  np.testing.assert_allclose(
    (eye - matrix) @ x, -rate * problem.gradient(x), rtol=1e-11, atol=1e-11
  )

  assert 0 < bias(atc(rate)) < bias(awc(rate))
  for method in (atc, awc):
    ratio = bias(method(rate)) / bias(method(rate / 2))
    assert 1.7 < ratio < 2.3


# States, communicators and extra arguments.


@pytest.mark.parametrize(
  ("tx", "kind"),
  [
    (
      optimizers.adapt_then_combine(optax.adam(RATE), topology.ring(5), 3),
      optimizers.AdaptThenCombineState,
    ),
    (
      optimizers.adapt_with_combine(optax.adam(RATE), topology.ring(5), 3),
      optimizers.AdaptWithCombineState,
    ),
    (
      optimizers.gradient_allreduce(optax.adam(RATE), 3),
      optimizers.GradientAllreduceState,
    ),
  ],
  ids=["adapt_then_combine", "adapt_with_combine", "gradient_allreduce"],
)
def test_state_is_a_pytree_that_stacks_over_ranks(rng, tx, kind):
  x, g = rng.randn(2, 5, 3).astype(np.float32)
  state: Any = jfog.simulate(tx.init, 5)(x)
  assert isinstance(state, kind)
  assert issubclass(kind, tuple)  # a NamedTuple
  assert state.step.dtype == jnp.int32
  assert all(len(leaf) == 5 for leaf in jax.tree.leaves(state))
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


METHODS = {
  "adapt_then_combine": lambda inner, n, every, comm: (
    optimizers.adapt_then_combine(
      inner, topology.one_peer_exponential(n), every, comm=comm
    )
  ),
  "adapt_with_combine": lambda inner, n, every, comm: (
    optimizers.adapt_with_combine(
      inner, topology.one_peer_exponential(n), every, comm=comm
    )
  ),
  "gradient_allreduce": lambda inner, n, every, comm: (
    optimizers.gradient_allreduce(inner, every, comm=comm)
  ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  ("axis", "every"), [("vmap", 2), ("shard_map", 1), ("shard_map", 2)]
)
def test_an_axis_of_the_users_own(rng, x64, method, axis, every):
  problem = Quadratic(4, rng)
  arguments = problem.hessian, problem.linear, problem.start
  make = METHODS[method]
  expected = jfog.simulate(
    iterates(lambda: make(optax.adam(RATE), 4, every, None), 5), 4
  )(*arguments)
  program = iterates(
    lambda: make(optax.adam(RATE), 4, every, jfog.Axis("data")), 5
  )
  if axis == "vmap":
    result = jax.vmap(program, axis_name="data")(*arguments)
  else:
    spec = PartitionSpec("data")
    result = jax.shard_map(
      lambda *args: program(*(x[0] for x in args))[None],
      mesh=Mesh(np.array(jax.devices()[:4]), ("data",)),
      in_specs=spec,
      out_specs=spec,
    )(*arguments)
  np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [1, 2])
def test_extra_arguments_reach_the_inner_transformation(method, every):
  def update(updates, state, params=None, *, factor, **extra):
    del params, extra
    return jax.tree.map(lambda g: factor * g, updates), state

  wants_factor: Any = update  # optax annotates only the common arguments
  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), wants_factor
  )
  tx = METHODS[method](inner, 2, every, None)

  def program(x, g):
    state = tx.init(x)
    for _ in range(2):
      updates, state = tx.update(g, state, x, factor=-3.0, other="ignored")
      x = x + updates
    return x

  x = jfog.simulate(program, 2)(jnp.zeros(2), jnp.ones(2))
  expected = -6.0 if method != "gradient_allreduce" or every == 1 else -3.0
  np.testing.assert_array_equal(x, np.full(2, expected))
