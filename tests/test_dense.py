"""Averages of many virtual ranks over dense graphs, which are matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology
from jfog.primitives import _dense

N = 20


def matrix(kind, rng):
  """A dense matrix, whose rows sum to 1 but for "column"."""
  weights = rng.uniform(0.1, 1.0, (N, N))
  if kind == "holes":
    weights *= rng.uniform(size=(N, N)) < 0.6
    weights[:, 4] = weights[4] = 0.5  # each rank has rank 4 as a neighbor
    weights[7, 3] = 0.0
    np.fill_diagonal(weights, 0.5)
  if kind == "no self weight":
    np.fill_diagonal(weights, 0.0)
  return weights / weights.sum(axis=0 if kind == "column" else 1, keepdims=True)


KINDS = ("complete", "holes", "no self weight", "column")


def graph(kind, rng):
  if kind == "complete":
    return topology.fully_connected(N)
  return topology.Topology(matrix(kind, rng))


def average(over, local_size=1):
  run = jfog.simulate(
    lambda x: jfog.neighbor_allreduce(x, over), N, local_size=local_size
  )
  return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("local_size", [1, 5])
def test_value_and_gradient_are_those_of_the_product(kind, local_size, rng):
  over = graph(kind, rng)
  assert _dense.is_dense(over, jnp.float32)
  weights = np.asarray(over.mixing_matrix)
  x = {
    "a": rng.standard_normal((N, 3, 2)).astype(np.float32),
    "scalar": rng.standard_normal(N).astype(np.float32),
    "empty": np.zeros((N, 0), np.float32),
    "complex": (rng.standard_normal((N, 4)) * (1 + 2j)).astype(np.complex64),
  }
  y = average(over, local_size)(x)
  for name, value in x.items():
    truth = np.einsum("ij,j...->i...", weights, value.astype(np.complex128))
    np.testing.assert_allclose(y[name], truth, rtol=0, atol=2e-6)
    assert y[name].dtype == value.dtype

  slopes = rng.standard_normal((N, 3, 2)).astype(np.float32)
  found = jax.grad(lambda v: jnp.sum(average(over, local_size)(v) * slopes))(
    x["a"]
  )
  truth = np.einsum("ij,i...->j...", weights, slopes)
  np.testing.assert_allclose(found, truth, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_values_are_summed_in_float32(dtype, rng):
  over = graph("complete", rng)
  x = jnp.asarray(rng.standard_normal((N, 5)), dtype)
  truth = np.asarray(x, np.float64).mean(axis=0)
  exact = jnp.asarray(np.broadcast_to(truth, (N, 5)), dtype)
  y = average(over)(x)
  assert y.dtype == dtype
  error = np.abs(np.asarray(y, np.float64) - np.asarray(exact, np.float64))
  assert error.max() <= 2 * float(jnp.finfo(dtype).eps)


def test_float64(rng, x64):
  over = graph("holes", rng)
  x = rng.standard_normal((N, 7))
  truth = np.asarray(over.mixing_matrix) @ x
  np.testing.assert_allclose(average(over)(x), truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["complete", "holes", "no self weight"])
def test_equal_values_stay_as_they_are(kind, rng):
  x = np.full((N, 3), 0.1, np.float32)
  over = graph(kind, rng)
  if over.is_doubly_stochastic:
    np.testing.assert_array_equal(average(over)(x), x)
  np.testing.assert_allclose(average(over)(x), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_value_reaches_its_neighbors_only(kind, bad, rng):
  over = graph(kind, rng)
  weights = np.asarray(over.mixing_matrix)
  x = rng.standard_normal((N, 3)).astype(np.float32)
  x[3, 1] = bad
  y = np.asarray(average(over)(x))
  np.testing.assert_array_equal(~np.isfinite(y[:, 1]), weights[:, 3] != 0)
  assert np.isfinite(y[:, [0, 2]]).all()


def test_under_a_further_vmap(rng):
  over = graph("holes", rng)
  x = rng.standard_normal((3, N, 4)).astype(np.float32)
  truth = np.einsum("ij,sjk->sik", np.asarray(over.mixing_matrix), x)
  y = jax.jit(jax.vmap(average(over)))(x)
  np.testing.assert_allclose(y, truth, rtol=0, atol=2e-6)


def test_small_and_sparse_graphs_keep_the_order_of_their_sums(rng):
  for over in (topology.fully_connected(16), topology.ring(64)):
    assert not _dense.is_dense(over, jnp.float32)
