"""Arguments that the window optimizers refuse, with their error texts."""

import warnings

import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from support.problems import RATE, chords

import jfog
from jfog import optimizers, topology

BOTH = ("window_put", "window_get")
ALL = (*BOTH, "window_push_sum")
PLAIN = optax.sgd(RATE)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
  "graph",
  [None, np.eye(3), nx.path_graph(3), topology.one_peer_exponential(4)],
  ids=["None", "array", "networkx", "Schedule"],
)
def test_no_topology(method, graph):
  with pytest.raises(TypeError, match=f"(?s){method}: topology=.*Topology"):
    getattr(optimizers, method)(PLAIN, graph)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
  ("every", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_every_below_one_or_no_int(method, every, error):
  with pytest.raises(error, match=f"{method}: every={every}"):
    getattr(optimizers, method)(PLAIN, topology.ring(4), every)


@pytest.mark.parametrize("method", BOTH)
def test_rows_that_do_not_sum_to_one(method):
  build = getattr(optimizers, method)
  graph = chords(4, "uniform_out")
  with pytest.raises(ValueError, match=f"{method}: .*not row-stochastic"):
    build(PLAIN, graph)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    build(PLAIN, graph, check=False)


@pytest.mark.parametrize("method", BOTH)
def test_rows_only_warns_of_the_weighted_average(method):
  graph = chords(4, "uniform_in")
  with pytest.warns(UserWarning, match=r"pi = \[.*\] instead of 1/n") as caught:
    getattr(optimizers, method)(PLAIN, graph)
  assert caught[0].filename == __file__


def test_columns_that_do_not_sum_to_one():
  graph = chords(4, "uniform_in")
  with pytest.raises(
    ValueError, match=r"window_push_sum: .*not column-stochastic.*'uniform_out'"
  ):
    optimizers.window_push_sum(PLAIN, graph)
  optimizers.window_push_sum(PLAIN, graph, check=False)


@pytest.mark.parametrize("method", ALL)
def test_update_needs_params(method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(2))

  def program(x):
    return tx.update(x, tx.init(x))

  with pytest.raises(ValueError, match=f"{method}.*tx.update"):
    jfog.simulate(program, 2)(jnp.zeros(2))


@pytest.mark.parametrize("method", ALL)
def test_integer_leaves(method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(2))
  x = {"count": jnp.zeros(2, jnp.int32), "w": jnp.zeros(2)}
  with pytest.raises(TypeError, match=rf"{method}: .*\['count'\].*int32"):
    jfog.simulate(tx.init, 2)(x)


@pytest.mark.parametrize("method", ALL)
def test_no_communicator(method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(2))
  with pytest.raises(jfog.NotInitializedError):
    tx.init(jnp.zeros(2))


@pytest.mark.parametrize("method", ALL)
def test_size_of_another_world(rng, method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(3))
  with pytest.raises(ValueError, match="3 ranks, the communicator has 2"):
    jfog.simulate(tx.init, 2)(rng.randn(2, 3))
