"""Texts of errors that newcomers meet: each names the value and what to write."""

import inspect
from typing import Any

import jax.numpy as jnp
import networkx
import numpy as np
import optax
import pytest

import jfog
from jfog import optimizers, topology

pytestmark = pytest.mark.places("single")

GRAPH = topology.ring(4)
X = jnp.ones(3)


@pytest.mark.parametrize(
  "call",
  [
    lambda: jfog.neighbor_allreduce(X, GRAPH),
    lambda: jfog.neighbor_allgather(X, GRAPH),
    lambda: jfog.finite_time_average(X, topology.ceca(4)),
    lambda: jfog.finite_time_average(X, topology.base_k(4, k=1)),
    lambda: jfog.win_create(X, GRAPH),
  ],
)
def test_a_forgotten_simulate_or_launcher(place, call):
  with pytest.raises(
    ValueError, match=r"4 ranks.*jfog\.simulate\(fun, 4\).*jfog run -np 4"
  ):
    call()


def test_a_forgotten_simulate_of_machines(place):
  with pytest.raises(
    ValueError, match=r"4 ranks.*1 machines.*jfog\.simulate\(fun, 4 \* n, local"
  ):
    jfog.hierarchical_neighbor_allreduce(X, GRAPH)


def optimizer_calls():
  """The optimizers with an inner transformation, given a number in its place."""
  values = {
    **dict.fromkeys(("graph", "topology"), GRAPH),
    **{
      "every": 2,
      "compressor": optimizers.identity(),
      "rank": 1,
      "inner": 0.1,
    },
    **{"outer": optax.sgd(0.1)},
  }
  for name, make in inspect.getmembers(optimizers, inspect.isfunction):
    parameters = inspect.signature(make).parameters
    if "inner" not in parameters:
      continue
    given = {
      name: values.get(name, 0.5)
      for name, parameter in parameters.items()
      if parameter.default is parameter.empty
    }
    yield name, make, given


@pytest.mark.parametrize(
  "name, make, given", [pytest.param(*c, id=c[0]) for c in optimizer_calls()]
)
def test_a_number_in_place_of_the_inner_optimizer(place, name, make, given):
  if name in ("d2", "deep_squeeze", "power_gossip"):
    given["topology"] = GRAPH.lazy()
  if name == "relay_sum":
    given["tree"] = topology.chain(4)
  with pytest.raises(TypeError, match=rf"{name}: inner=0\.1 .*optax\.sgd"):
    make(**given)


def test_the_outer_optimizer_of_diloco(place):
  bad: Any = 0.7
  with pytest.raises(TypeError, match=r"diloco: outer=0\.7 .*optax\.sgd"):
    optimizers.diloco(optax.sgd(0.1), bad, 4)


@pytest.mark.parametrize(
  "call",
  [
    lambda graph: jfog.neighbor_allreduce(X, graph),
    lambda graph: jfog.win_create(X, graph),
    lambda graph: optimizers.adapt_then_combine(optax.sgd(0.1), graph),
    lambda graph: optimizers.relay_sum(optax.sgd(0.1), graph),
  ],
)
def test_matrices_and_networkx_graphs_as_graphs(place, call):
  with pytest.raises(TypeError, match=r"(?s)=array.*ndarray.*Topology\(W\)"):
    call(np.full((4, 4), 0.25))
  with pytest.raises(TypeError, match=r"is Graph.*from_networkx\(graph\)"):
    call(networkx.cycle_graph(4))
  with pytest.raises(TypeError, match=r"'ring' is str.*topology\.ring\(size\)"):
    call("ring")


def test_shared_arguments_of_simulate(place):
  with pytest.raises(ValueError, match=r"\['k'\].*by position, in_axes=None"):
    jfog.simulate(lambda x, *, k: x * k, 4)(jnp.ones(4), k=2.0)
  with pytest.raises(ValueError, match=r"\[1\].*or pass in_axes=None"):
    jfog.simulate(lambda x, k: x * k, 4)(jnp.ones(4), 2.0)


def test_peers_in_a_world_of_one(place):
  with pytest.raises(
    ValueError, match=r"rank 1 on rank 0 of 1.*world of one.*jfog run"
  ):
    jfog.neighbor_allreduce(X, jfog.Peers(0.5, {1: 0.5}, [1]))
