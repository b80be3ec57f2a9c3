"""Long runs and repetition: no drift, and the same bits each time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

STEPS = 20_000


def exact_diffusion(graph, curvature, target, steps):
  """`x+ = Wb (2 x - x_before - a (g - g_before))`, on one rank, in float32."""
  lazy = graph.lazy()
  rate = jnp.float32(0.1)

  def body(_, state):
    x, psi = state
    new = x - rate * curvature * (x - target)
    return jfog.neighbor_allreduce(new + x - psi, lazy), new

  start = jnp.zeros_like(target)
  return jax.lax.fori_loop(0, steps, body, (start, start))[0]


@pytest.mark.places("simulate", "mesh", "mpi-2", "mpi-3", "mpi-4")
def test_exact_diffusion_does_not_drift_in_float32(place):
  """A weighted sum drifts by 6e-3 here; the difference form does not."""
  n = place.size
  rng = np.random.RandomState(1)
  curvature = (1 + rng.rand(n, 1)).astype(np.float32)
  target = (3 + rng.randn(n, 4)).astype(np.float32)
  minimiser = (curvature * target.astype(np.float64)).sum(0) / curvature.sum()
  graph = topology.ring(n)
  x = place.run(
    jax.jit(lambda c, t: exact_diffusion(graph, c, t, STEPS)),
    curvature,
    target,
  )
  error = np.abs(np.asarray(x, np.float64) - minimiser) / np.abs(minimiser)
  assert error.max() < 1e-5


def test_exact_diffusion_on_eight_ranks():
  rng = np.random.RandomState(2)
  curvature = (1 + rng.rand(8, 1)).astype(np.float32)
  target = (3 + rng.randn(8, 4)).astype(np.float32)
  minimiser = (curvature * target.astype(np.float64)).sum(0) / curvature.sum()
  graph = topology.ring(8)
  x = jfog.simulate(lambda c, t: exact_diffusion(graph, c, t, STEPS), 8)(
    curvature, target
  )
  error = np.abs(np.asarray(x, np.float64) - minimiser) / np.abs(minimiser)
  assert error.max() < 1e-5


@pytest.mark.places("mpi-3", "mpi-4")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_results_are_equal_bit_for_bit_from_run_to_run(place, dtype):
  """Whatever the order in which messages arrive."""
  n, rank = place.size, jfog.rank()
  graph = topology.fully_connected(n)
  x = jnp.asarray(np.random.RandomState(rank).randn(70_001)).astype(dtype)
  run = jax.jit(
    lambda x: (jfog.neighbor_allreduce(x, graph), jfog.allreduce(x))
  )
  delay = jax.jit(
    lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)
  )
  first = jax.tree.map(np.asarray, run(x))
  for k in range(8):
    pause = delay(jnp.ones(1000), 300 * ((k + rank) % n))
    jax.block_until_ready(pause)
    jax.tree.map(np.testing.assert_array_equal, run(x), first)
