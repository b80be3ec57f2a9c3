"""The window optimizers: dtypes, states, wrappers and other axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from support import reference
from support.problems import RATE, Quadratic, iterates

import jfog
from jfog import optimizers, topology

IN_ORDER = pytest.mark.places("single", "simulate", "mesh")


BOTH = ("window_put", "window_get")


ALL = (*BOTH, "window_push_sum")


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
