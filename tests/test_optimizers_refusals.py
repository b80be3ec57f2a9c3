"""Arguments that the averaging optimizers refuse, with their error texts."""

import warnings

import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from support.problems import RATE, chords

import jfog
from jfog import optimizers, topology

BOTH = ("adapt_then_combine", "adapt_with_combine")


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

PLAIN = optax.sgd(RATE)


def pushing(n):
  """Column-stochastic, not row-stochastic."""
  return chords(n, "uniform_in").transpose()


@pytest.mark.parametrize("method", BOTH)
def test_update_needs_params(method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(2))
  with pytest.raises(ValueError, match=f"{method}.*tx.update"):
    tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [0, -1])
def test_every_below_one(method, every):
  with pytest.raises(ValueError, match=f"{method}: every={every}"):
    METHODS[method](PLAIN, 2, every, None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", [1.5, True, "2", None])
def test_every_that_is_no_int(method, every):
  with pytest.raises(TypeError, match=f"{method}: every="):
    METHODS[method](PLAIN, 2, every, None)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("graph", [None, np.eye(3), "ring", nx.path_graph(3)])
def test_no_graph(method, graph):
  with pytest.raises(TypeError, match=f"(?s){method}: graph=.*Topology"):
    getattr(optimizers, method)(PLAIN, graph)


@pytest.mark.parametrize("method", BOTH)
def test_a_protocol_is_no_mixing_graph(method):
  with pytest.raises(TypeError, match=f"{method}: .*several rounds"):
    getattr(optimizers, method)(PLAIN, topology.ceca(5))


@pytest.mark.parametrize("method", BOTH)
def test_rows_that_do_not_sum_to_one(method):
  make = getattr(optimizers, method)
  for graph in (pushing(4), topology.Schedule([topology.ring(4), pushing(4)])):
    with pytest.raises(ValueError, match=f"{method}: .*not row-stochastic"):
      make(PLAIN, graph)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      make(PLAIN, graph, check=False)


@pytest.mark.parametrize("method", BOTH)
def test_rows_only_warns_of_the_weighted_average(method):
  graph = chords(4, "uniform_in")
  with pytest.warns(UserWarning, match=r"pi = \[.*\] instead of 1/n") as caught:
    getattr(optimizers, method)(PLAIN, graph)
  assert caught[0].filename == __file__
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    getattr(optimizers, method)(PLAIN, graph, check=False)


@pytest.mark.parametrize("method", METHODS)
def test_no_communicator(method):
  tx = METHODS[method](PLAIN, 2, 2, None)
  x = jnp.zeros(2)
  with pytest.raises(jfog.NotInitializedError):
    tx.update(x, tx.init(x), x)


def test_size_of_another_world(rng):
  tx = optimizers.adapt_then_combine(PLAIN, topology.ring(3))
  x = rng.randn(2, 3)
  with pytest.raises(ValueError, match="3 ranks, the communicator has 2"):
    jfog.simulate(lambda x: tx.update(x, tx.init(x), x), 2)(x)
