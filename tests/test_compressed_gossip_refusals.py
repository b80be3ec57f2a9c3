"""Arguments that `choco` and `deep_squeeze` refuse, with their error texts."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.problems import RATE, chords

import jfog
from jfog import optimizers, topology

PLAIN, SIGN = optax.sgd(RATE), optimizers.sign()
METHODS = pytest.mark.parametrize("method", ["choco", "deep_squeeze"])


@METHODS
@pytest.mark.parametrize(
  "graph", [topology.one_peer_exponential(4), topology.ceca(5), None, np.eye(3)]
)
@pytest.mark.parametrize("check", [True, False])
def test_no_topology(method, graph, check):
  with pytest.raises(TypeError, match=f"(?s){method}: topology=.*Topology"):
    getattr(optimizers, method)(PLAIN, graph, SIGN, 0.5, check=check)


@METHODS
@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan"), np.float32(2)])
def test_rates_out_of_range(method, rate):
  name = {"choco": "gamma", "deep_squeeze": "eta"}[method]
  with pytest.raises(ValueError, match=rf"{method}: {name}=.*\(0, 1\]"):
    getattr(optimizers, method)(PLAIN, topology.ring(4), SIGN, rate)


@METHODS
@pytest.mark.parametrize("rate", ["1", None, True, 0.5j, np.ones(2)])
def test_rates_that_are_no_numbers(method, rate):
  with pytest.raises(TypeError, match=f"(?s){method}: .*must be a number"):
    getattr(optimizers, method)(PLAIN, topology.ring(4), SIGN, rate)


@METHODS
@pytest.mark.parametrize("compressor", [None, optimizers.sign, (1, 2, 3), "8"])
def test_no_compressor(method, compressor):
  with pytest.raises(TypeError, match=f"{method}: compressor=.*; pass a jfog"):
    getattr(optimizers, method)(PLAIN, topology.ring(4), compressor, 0.5)


@METHODS
@pytest.mark.parametrize("seed", [0.0, True, None, "0"])
def test_seeds_that_are_no_ints(method, seed):
  with pytest.raises(TypeError, match=f"{method}: seed="):
    getattr(optimizers, method)(PLAIN, topology.ring(4), SIGN, 0.5, seed=seed)


def test_choco_needs_symmetric_weights():
  for graph, text in (
    (topology.exponential(8), "choco: .*not symmetric"),
    (chords(4, "uniform_in"), "choco: .*not doubly stochastic"),
  ):
    with pytest.raises(ValueError, match=text):
      optimizers.choco(PLAIN, graph, SIGN, 0.5)
    optimizers.choco(PLAIN, graph, SIGN, 0.5, check=False)


def test_deep_squeeze_needs_rows_that_sum_to_one():
  graph = chords(4, "uniform_in")
  with pytest.raises(ValueError, match=r"deep_squeeze: .*not row-stochastic"):
    optimizers.deep_squeeze(PLAIN, graph.transpose(), SIGN, 0.5)
  with pytest.warns(UserWarning, match=r"pi = \[.*\] instead") as caught:
    optimizers.deep_squeeze(PLAIN, graph, SIGN, 0.5)
  assert caught[0].filename == __file__


@pytest.mark.parametrize("make", [optimizers.top_k, optimizers.random_k])
def test_deep_squeeze_warns_of_sparsifiers(make):
  graph, sparsifier = topology.ring(4), make(k=1)
  with pytest.warns(UserWarning, match="does not converge") as caught:
    optimizers.deep_squeeze(PLAIN, graph, sparsifier, 0.5)
  assert caught[0].filename == __file__
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    optimizers.deep_squeeze(PLAIN, graph, sparsifier, 0.5, check=False)
    optimizers.choco(PLAIN, graph, sparsifier, 0.5)


@METHODS
def test_update_needs_params_and_a_world_of_the_same_size(method, rng):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(3), SIGN, 0.5)
  x = jnp.zeros(2)
  state = tx.init(x)
  with pytest.raises(ValueError, match=f"{method}.*tx.update"):
    tx.update(x, state)
  with pytest.raises(jfog.NotInitializedError):
    tx.update(x, state, x)
  with pytest.raises(ValueError, match=f"{method}: .*3 ranks, .* has 2"):
    jfog.simulate(lambda x: tx.update(x, tx.init(x), x), 2)(rng.randn(2, 3))


@METHODS
def test_leaves_that_the_compressor_does_not_take(method):
  tx = getattr(optimizers, method)(PLAIN, topology.ring(3), SIGN, 0.5)
  with pytest.raises(TypeError, match=r"sign: the leaf x\['n'\] .*int32"):
    tx.init({"n": jnp.zeros(2, jnp.int32)})
