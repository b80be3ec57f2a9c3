"""RelaySGD and PowerGossip, with a separate message for every edge."""

from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from support import reference
from support.edges import TREES, graphs, leaves, scan
from support.problems import RATE

import jfog
from jfog import optimizers, topology
from jfog.optimizers.contrib._edge_exchange import edges_of


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_slots_are_numbered_alike_at_both_ends(n):
  for name, graph in graphs(n).items():
    edges = edges_of(graph, "test")
    most = graph.degree if name in TREES else graph.degree + 1
    assert 1 <= edges.slots <= max(1, most)
    for i, row in enumerate(edges.partners):
      assert sorted(row[row >= 0]) == list(graph.in_neighbors(i))
      for slot, j in enumerate(row):
        assert j < 0 or edges.partners[j, slot] == i


# Both.


def made(method, inner, n, **options):
  """One of the two on a graph of `n` ranks."""
  if method == "relay_sum":
    return optimizers.relay_sum(inner, topology.chain(n), **options)
  return optimizers.power_gossip(inner, topology.ring(n), 1, **options)


METHODS = ("relay_sum", "power_gossip")


def both(n, inner, **options):
  """The two on the same ranks, by name."""
  return {method: made(method, inner, n, **options) for method in METHODS}


def pair(rng):
  """Constant gradients and initial parameters of two ranks.

  By either method both go with the mean of the gradients.
  """
  gradients = leaves(rng, 2, {"b": (2,), "w": (3, 1)})
  return gradients, jax.tree.map(np.ones_like, gradients)


def constant(gradient, x):
  """The problem is the gradient."""
  del x
  return gradient


def test_wrapped_by_other_transformations(rng, x64):
  """Inside of `masked`, behind `chain`, within `MultiSteps`."""
  g, x = pair(rng)
  wrapped: Any = {
    name: optax.MultiSteps(
      optax.chain(
        optax.clip(0.25),
        optax.masked(tx, {"b": False, "w": True}),
        optax.masked(optax.scale(-1.0), {"b": True, "w": False}),
      ),
      every_k_schedule=2,
    )
    for name, tx in both(2, optax.sgd(1.0)).items()
  }
  found: Any = jfog.simulate(scan(wrapped, constant, 6), 2)(g, x)[0]
  b, w = (np.clip(g[name], -0.25, 0.25) for name in ("b", "w"))
  w = np.broadcast_to(w.mean(axis=0), w.shape)
  for iterates in found.values():
    for k in range(1, 4):  # MultiSteps takes means in float32
      reference.assert_close(iterates["b"][:, 2 * k - 1], 1 - k * b, 1e-6)
      reference.assert_close(iterates["w"][:, 2 * k - 1], 1 - k * w, 1e-6)


def test_a_mesh_of_the_users_own(rng, x64):
  """In a `shard_map` that checks replication."""
  spec = PartitionSpec("data")
  makers = both(2, optax.sgd(1.0), comm=jfog.Axis("data"))

  def one(*arguments):
    own = jax.tree.map(lambda leaf: leaf[0], arguments)
    return jax.tree.map(
      lambda leaf: leaf[None, -1], scan(makers, constant, 3)(*own)[0]
    )

  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))
  g, x = pair(rng)
  for last in run(g, x).values():
    for name, leaf in last.items():
      mean = np.broadcast_to(g[name].mean(axis=0), leaf.shape)
      reference.assert_close(leaf, 1 - 3 * mean)


def test_a_state_from_numpy_goes_on_bit_for_bit(rng):
  """The buffers of half parameters are float32."""
  n = 2
  makers = both(n, optax.sgd(RATE, momentum=0.9))
  g, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), pair(rng))

  @jax.jit
  def step(g, states, x):
    done = {
      name: jfog.simulate(tx.update, n)(g, states[name], x)
      for name, tx in makers.items()
    }
    updates = {name: update for name, (update, _) in done.items()}
    return updates, {name: state for name, (_, state) in done.items()}

  states: Any = {
    name: jfog.simulate(tx.init, n)(x) for name, tx in makers.items()
  }
  for state in states.values():
    assert state.step.dtype == jnp.int32
    assert all(len(leaf) == n for leaf in jax.tree.leaves(state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[2:])} == {
      "float32"
    }
  straight = packed = states
  for _ in range(4):
    expected, straight = step(g, straight, x)
    found, packed = step(g, jax.tree.map(np.asarray, packed), x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
  jax.tree.map(np.testing.assert_array_equal, packed, straight)


def test_parameters_and_state_may_be_donated():
  tx = made("relay_sum", optax.sgd(RATE), 2)
  x = jnp.ones((2, 3))
  state = jfog.simulate(tx.init, 2)(x)

  def step(x, state):
    updates, state = jfog.simulate(tx.update, 2)(x, state, x)
    return optax.apply_updates(x, updates), state

  x, state = jax.jit(step, donate_argnums=(0, 1))(x, state)
  np.testing.assert_allclose(x, np.full((2, 3), 0.9), rtol=1e-6)


# Errors when the transformations are built.

PLAIN = optax.sgd(RATE)


@pytest.mark.parametrize("graph", [None, "ring", nx.path_graph(3), np.eye(3)])
def test_no_topology(graph):
  for method, more in (("relay_sum", ()), ("power_gossip", (1,))):
    with pytest.raises(TypeError, match=f"(?s){method}: topology=.*Topology"):
      getattr(optimizers, method)(PLAIN, graph, *more)


def test_a_schedule_is_no_topology():
  schedule = topology.one_peer_exponential(4)
  with pytest.raises(TypeError, match=r"relay_sum: .*Schedule"):
    optimizers.relay_sum(PLAIN, schedule)  # type: ignore[arg-type]
  with pytest.raises(TypeError, match=r"power_gossip: .*Schedule"):
    optimizers.power_gossip(PLAIN, schedule, 1)  # type: ignore[arg-type]


def test_what_is_no_spanning_tree():
  with pytest.raises(ValueError, match=r"has 4 edges.* has 3"):
    optimizers.relay_sum(PLAIN, topology.ring(4))
  optimizers.relay_sum(PLAIN, topology.ring(4), check=False)
  with pytest.raises(ValueError, match="not symmetric"):
    optimizers.relay_sum(PLAIN, topology.ring(4, "right"))
  parts = topology.Topology(
    np.kron(np.eye(2), np.ones((2, 2)) / 2), connected=False
  )
  with pytest.raises(ValueError, match="not connected"):
    optimizers.relay_sum(PLAIN, parts)


def test_power_gossip_needs_a_symmetric_graph_and_a_rank():
  with pytest.raises(ValueError, match=r"power_gossip: .*not symmetric"):
    optimizers.power_gossip(PLAIN, topology.ring(4, "right"), 1)
  pulling = topology.from_networkx(nx.path_graph(3), "uniform_in")
  with pytest.raises(
    ValueError, match=r"power_gossip: .*not doubly stochastic"
  ):
    optimizers.power_gossip(PLAIN, pulling, 1)
  optimizers.power_gossip(PLAIN, pulling, 1, check=False)
  for rank, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
    with pytest.raises(error, match=f"power_gossip: rank={rank}"):
      optimizers.power_gossip(PLAIN, topology.ring(4), rank)  # type: ignore


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_cannot_be(method):
  tx = made(method, PLAIN, 2)
  x = jnp.zeros((2, 3, 2))
  state = jfog.simulate(tx.init, 2)(x)
  with pytest.raises(ValueError, match=f"{method}.*tx.update"):
    jfog.simulate(lambda s, g: tx.update(g, s), 2)(state, x)
  with pytest.raises(jfog.NotInitializedError):
    tx.update(x[0], jax.tree.map(lambda s: s[0], state), x[0])
  other = made(method, PLAIN, 3)
  with pytest.raises(ValueError, match="3 ranks, the communicator has 2"):
    jfog.simulate(lambda x: other.update(x, other.init(x), x), 2)(x)
  whole = jnp.zeros((2, 3, 2), jnp.int32)
  with pytest.raises(TypeError, match="has dtype int32"):
    jfog.simulate(lambda x: tx.update(x, tx.init(x), x), 2)(whole)
