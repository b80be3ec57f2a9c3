"""Robust averages against a loop over ranks in NumPy, in all places."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.algorithms import directed

import jfog
from jfog import attacks, optimizers, topology


def irregular(n, seed=0):
  """A directed graph with in-degrees from 2 to `n - 1`, rows that sum to 1."""
  random = np.random.RandomState(seed)
  weights = np.zeros((n, n))
  for i in range(n):
    others = [j for j in range(n) if j != i]
    degree = min(n - 1, 2 + (i + seed) % (n - 1))
    chosen = random.choice(others, degree, replace=False)
    weights[i, [i, *chosen]] = random.uniform(0.5, 1.5, degree + 1)
  return topology.Topology(weights / weights.sum(axis=1, keepdims=True))


def changing(n):
  return topology.Schedule([irregular(n, seed) for seed in range(3)])


GRAPHS = {
  "complete": topology.fully_connected,
  "irregular": irregular,
  "changing": changing,
}
AVERAGES = {
  "clipped": lambda g: optimizers.clipped(g),
  "radius": lambda g: optimizers.clipped(g, radius=1.5),
  "trimmed": lambda g: optimizers.trimmed_mean(g, 1),
  "median": lambda g: optimizers.coordinate_median(g),
  "nearest": lambda g: optimizers.nearest_mean(g, 1),
}


def truth(name, graph, x, faulty=1, radius=1.5):
  """The average of a round as a loop over ranks, of rows in float64."""
  result = np.empty_like(x)
  for i in range(graph.size):
    neighbors = [
      j for j in range(graph.size) if j != i and graph.mixing_matrix[i, j] != 0
    ]
    distance = {j: np.sqrt(np.sum((x[j] - x[i]) ** 2)) for j in neighbors}
    if name in ("clipped", "radius"):
      limit = radius
      if name == "clipped":
        limit = sorted(distance.values(), reverse=True)[faulty]
      result[i] = x[i]
      for j in neighbors:
        if distance[j] > 0:
          shrink = min(1.0, limit / distance[j])
          result[i] += graph.mixing_matrix[i, j] * shrink * (x[j] - x[i])
      continue
    both = np.sort(x[[i, *neighbors]], axis=0)
    count = len(both)
    if name == "trimmed":
      result[i] = both[faulty : count - faulty].mean(axis=0)
    elif name == "median":
      result[i] = np.median(both, axis=0)
    else:
      near = sorted(neighbors, key=lambda j: (distance[j], j))
      result[i] = x[[i, *near[: count - 1 - faulty]]].mean(axis=0)
  return result


def simulated(averages, n):
  """The jitted function from stacked parameters to all averages, by name."""

  def program(x):
    return {name: average(x, 0) for name, average in averages.items()}

  return jax.jit(jfog.simulate(program, n))


def made(graph):
  return {name: make(graph) for name, make in AVERAGES.items()}


def tree_of(rows, dtype=jnp.float32):
  """A row of 8 numbers as a tree with an empty and a scalar leaf."""
  rows = jnp.asarray(rows).astype(dtype)
  lead = rows.shape[:-1]
  return {
    "empty": jnp.zeros((*lead, 0, 2), dtype),
    "matrix": rows[..., :6].reshape(*lead, 2, 3),
    "scalar": rows[..., 6],
    "vector": rows[..., 7:],
  }


def rows_of(tree):
  lead = tree["scalar"].shape
  parts = [
    np.asarray(x, np.float64).reshape(*lead, -1) for x in jax.tree.leaves(tree)
  ]
  return np.concatenate(parts, axis=-1)


@pytest.mark.mpi(3)
@pytest.mark.places("simulate-5", "simulate-6", "mesh-4", "mpi-3")
@pytest.mark.parametrize("graph", GRAPHS)
def test_values_are_those_of_a_loop_over_ranks(place, rng, graph):
  used = GRAPHS[graph](place.size)
  x = rng.randn(place.size, 8)
  averages = made(used)

  @jax.jit
  def program(x, step):
    return {name: f(x, step) for name, f in averages.items()}

  rounds = used.rounds
  for step in range(len(rounds)):
    found = place.run(program, tree_of(x), jnp.asarray(step), in_axes=(0, None))
    for name in AVERAGES:
      expected = truth(name, rounds[step], x)
      np.testing.assert_allclose(
        *(rows_of(found[name]), place.mine(expected)),
        **{"rtol": 1e-5, "atol": 1e-5, "err_msg": name},
      )


@pytest.mark.mpi(3)
@pytest.mark.places("simulate-5", "mpi-3")
def test_a_known_step_takes_its_round(place, rng):
  used = topology.Schedule([topology.fully_connected(place.size)] * 2)
  used = topology.Schedule([*used.rounds, topology.ring(place.size)])
  x = rng.randn(place.size, 8)
  averages = made(used)
  program = jax.jit(lambda x: {k: f(x, 5) for k, f in averages.items()})
  found = place.run(program, tree_of(x))
  for name in AVERAGES:
    expected = place.mine(truth(name, used.rounds[2], x))
    np.testing.assert_allclose(
      rows_of(found[name]), expected, rtol=1e-5, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("graph", ["irregular", "changing"])
def test_a_shard_map_with_typed_axes(rng, graph):
  n = 4
  used = GRAPHS[graph](n)
  comm = jfog.Axis("data")
  averages = {
    "clipped": optimizers.clipped(used, comm=comm),
    "trimmed": optimizers.trimmed_mean(used, 1, comm=comm),
    "median": optimizers.coordinate_median(used, comm=comm),
    "nearest": optimizers.nearest_mean(used, 1, comm=comm),
  }

  def program(x, step):
    own = x[0]
    return {name: f(own, step)[None] for name, f in averages.items()}

  rows, whole = PartitionSpec("data"), PartitionSpec()
  run = jax.jit(
    jax.shard_map(
      program,
      mesh=Mesh(np.array(jax.devices()[:n]), ("data",)),
      in_specs=(rows, whole),
      out_specs=rows,
      check_vma=True,
    )
  )
  x = rng.randn(n, 8)
  for step in range(len(used.rounds)):
    found = run(jnp.asarray(x, jnp.float32), jnp.int32(step))
    for name in averages:
      np.testing.assert_allclose(
        *(found[name], truth(name, used.rounds[step], x)),
        **{"rtol": 1e-5, "atol": 1e-5, "err_msg": name},
      )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(rng, dtype):
  graph = irregular(6)
  tree = tree_of(rng.randn(6, 8), dtype)
  x = rows_of(tree)
  for name, found in simulated(made(graph), 6)(tree).items():
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    # One rounding to the dtype, and no other.
    step = float(jnp.finfo(dtype).eps)
    expected = truth(name, graph, x)
    np.testing.assert_allclose(
      rows_of(found), expected, rtol=step, atol=1e-5, err_msg=name
    )


def test_many_neighbors(rng):
  n = 20
  x = rng.randn(n, 3)
  found = simulated(made(irregular(n)), n)(jnp.asarray(x, jnp.float32))
  for name in AVERAGES:
    expected = truth(name, irregular(n), x)
    np.testing.assert_allclose(
      found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name
    )


def test_complex_leaves_are_two_real_ones(rng):
  graph = irregular(5)
  x = rng.randn(5, 6)
  results = simulated(made(graph), 5)(jnp.asarray(x[:, :3] + 1j * x[:, 3:]))
  for name, found in results.items():
    found = np.asarray(found)
    np.testing.assert_allclose(
      *(np.hstack([found.real, found.imag]), truth(name, graph, x)),
      **{"rtol": 1e-5, "atol": 1e-5, "err_msg": name},
    )


def test_equal_values_stay_bit_for_bit():
  graph = irregular(6)
  x = jnp.tile(jnp.asarray([0.1, 1e30, -1e-30, 0.0]), (6, 1))
  for name, found in simulated(made(graph), 6)(x).items():
    np.testing.assert_array_equal(found, x, err_msg=name)


def test_an_infinite_radius_is_plain_averaging(rng):
  graph = irregular(6)
  average = optimizers.clipped(graph, radius=np.inf)
  x = jnp.asarray(rng.randn(6, 4).astype(np.float32))
  both = {
    "clipped": average,
    "plain": lambda x, step: jfog.neighbor_allreduce(x, graph),
  }
  found = simulated(both, 6)(x)
  np.testing.assert_allclose(
    found["clipped"], found["plain"], rtol=1e-5, atol=1e-6
  )


def test_no_square_overflows_or_vanishes():
  graph = topology.fully_connected(4)
  run = simulated({"clipped": optimizers.clipped(graph)}, 4)
  x = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [30.0, 40.0]])
  for scale in (1e-30, 1.0, 1e30):
    found = run(jnp.asarray(scale * x, jnp.float32))["clipped"]
    expected = scale * truth("clipped", graph, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_left_out(rng, bad):
  """Also one in a single coordinate, on ranks with empty slots."""
  n = 6
  weights = np.array(irregular(n).mixing_matrix)
  weights[:, 5] = np.maximum(weights[:, 5], 0.1)
  graph = topology.Topology(weights / weights.sum(axis=1, keepdims=True))
  x = rng.randn(n, 3).astype(np.float32)
  x[5, 1] = bad
  for name, found in simulated(made(graph), n)(x).items():
    found = found[:5]
    assert np.isfinite(found).all(), name
    low, high = x[:5].min(axis=0), x[:5].max(axis=0)
    others = [0, 2] if name in ("trimmed", "median") else [0, 1, 2]
    assert (found >= low - 1e-5)[:, others].all(), name
    assert (found <= high + 1e-5)[:, others].all(), name


def test_ranks_without_neighbors_keep_their_value():
  def of(graph):
    return {
      "clipped": optimizers.clipped(graph, faulty=0),
      "trimmed": optimizers.trimmed_mean(graph, 0),
      "median": optimizers.coordinate_median(graph),
      "nearest": optimizers.nearest_mean(graph, 0),
    }

  alone = simulated(of(topology.fully_connected(1)), 1)(jnp.ones(1))
  some = of(topology.without(topology.ring(4), [2]))
  some = simulated(some, 4)(jnp.arange(4.0))
  for name in some:
    assert alone[name] == 1
    assert some[name][2] == 2 and (some[name][:2] != jnp.arange(2.0)).all()


def wrong(value) -> Any:
  """A value that is not of the type that a function wants."""
  return value


RING = topology.ring(5)
TWO_RINGS = topology.Schedule([RING, topology.ring(5, "right")])


@pytest.mark.parametrize(
  "make, error, text",
  [
    (lambda: optimizers.clipped(RING, faulty=2), ValueError, "at most 1"),
    (
      lambda: optimizers.nearest_mean(RING, 2),
      ValueError,
      "faulty=2, and rank",
    ),
    (
      lambda: optimizers.trimmed_mean(RING, 2),
      ValueError,
      "has 2 in-neighbors",
    ),
    (
      lambda: optimizers.trimmed_mean(TWO_RINGS, 1),
      ValueError,
      "rank 0 has 1 in-neighbors in round 1, which allow at most 0",
    ),
    (lambda: optimizers.clipped(TWO_RINGS), ValueError, "in round 1"),
    (lambda: optimizers.clipped(RING, faulty=-1), ValueError, ">= 0, got -1"),
    (lambda: optimizers.nearest_mean(RING, wrong(0.5)), TypeError, "got 0.5"),
    (
      lambda: optimizers.clipped(RING, radius=0),
      ValueError,
      "radius=0 must be",
    ),
    (lambda: optimizers.clipped(RING, radius=-1.0), ValueError, "positive"),
    (lambda: optimizers.clipped(RING, np.nan), ValueError, "positive"),
    (lambda: optimizers.clipped(RING, "far"), TypeError, "radius='far'"),
    (
      lambda: optimizers.clipped(directed(5), 1.0),
      ValueError,
      "not row-stochastic",
    ),
    (
      lambda: optimizers.coordinate_median(wrong(np.eye(3))),
      TypeError,
      "here jfog.topology.Topology",
    ),
  ],
)
def test_refusals(make, error, text):
  with pytest.raises(error, match=text):
    make()


def test_integer_leaves_are_refused():
  average = optimizers.coordinate_median(RING)
  with pytest.raises(TypeError, match=r"params\['a'\] has dtype int32"):
    jfog.simulate(lambda x: average({"a": x}, 0), 5)(jnp.arange(5))


# Training: losses |x - b|^2 / 2, of which the honest ranks' sum is least at the mean
# of their b.
N, STEPS = 10, 150
GRAPH = topology.fully_connected(N)


def train(graph, attackers, b):
  """The distance of the honest ranks from the mean of their b."""
  tx = optimizers.adapt_then_combine(optax.sgd(0.1), graph)

  def program(b):
    def step(carry, _):
      x, state = carry
      updates, state = tx.update(x - b, state, x)
      return (optax.apply_updates(x, updates), state), None

    x = jnp.zeros(3)
    return jax.lax.scan(step, (x, tx.init(x)), length=STEPS)[0][0]

  x = jax.jit(jfog.simulate(program, N, attackers=attackers))(b)
  honest = [rank for rank in range(N) if rank not in attackers]
  return np.abs(
    np.asarray(x)[honest] - np.asarray(b)[honest].mean(axis=0)
  ).max()


def test_robust_averages_stay_near_where_the_plain_one_diverges(rng):
  b = jnp.asarray(5 + 0.3 * rng.randn(N, 3).astype(np.float32))
  liars = {3: attacks.sign_flip(30.0), 7: attacks.sign_flip(30.0)}
  assert train(GRAPH, {}, b) < 0.05
  plain = train(GRAPH, liars, b)
  assert not plain < 1e6
  for average in (
    optimizers.clipped(GRAPH, faulty=2),
    optimizers.clipped(GRAPH, radius=0.1),
    optimizers.trimmed_mean(GRAPH, 2),
    optimizers.coordinate_median(GRAPH),
    optimizers.nearest_mean(GRAPH, 2),
  ):
    assert train(average, liars, b) < 0.5


@pytest.mark.parametrize(
  "make",
  [
    lambda g: optimizers.gradient_tracking(optax.sgd(0.05), g),
    lambda g: optimizers.exact_diffusion(optax.sgd(0.05), g),
    lambda g: optimizers.gossip_pga(optax.sgd(0.05), g, 100),
    lambda g: optimizers.diloco(optax.sgd(0.05), optax.sgd(0.7), 2, g),
    lambda g: optimizers.quasi_global_momentum(0.05, 0.9, g),
  ],
)
def test_optimizers_take_them(make, rng):
  """With an infinite radius as a plain graph."""
  results = []
  for graph in (RING, optimizers.clipped(RING, radius=np.inf)):
    tx = make(graph)

    def program(b, tx=tx):
      def step(carry, _):
        x, state = carry
        updates, state = tx.update(x - b, state, x)
        return (optax.apply_updates(x, updates), state), None

      return jax.lax.scan(step, (b, tx.init(b)), length=5)[0][0]

    b = jnp.asarray(np.random.RandomState(0).randn(5, 3), jnp.float32)
    results.append(jax.jit(jfog.simulate(program, 5))(b))
  np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
