"""Long exchanges: shared-memory channels, messages between machines, and both."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

CHUNK = 15360  # float32 of one chunk
COUNTS = (0, 128, 129, CHUNK, CHUNK + 1, 19 * CHUNK + 7)
GRAPHS = {
  "directed ring": lambda n: topology.ring(n, "right"),
  "star": topology.star,
  "exponential": topology.exponential,
}

pytestmark = [
  pytest.mark.places("mpi"),
  pytest.mark.mpi(3, 4),
  pytest.mark.host("shared-memory channels are MPI's"),
]


def values(count, ranks):
  """Different everywhere; float64, shape (ranks, count)."""
  own = np.arange(count) % 251 / 16.0
  return np.stack([own * (r + 1) - 3 * r for r in range(ranks)])


@pytest.mark.parametrize("name", GRAPHS)
def test_every_length_is_averaged(place, machines, name):
  n, rank = place.size, jfog.rank()
  graph = GRAPHS[name](n)
  run = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
  for count in COUNTS:
    truth = values(count, n)
    x = jnp.asarray(truth[rank], jnp.float32)
    for _ in range(3):
      x, truth = run(x), graph.mixing_matrix @ truth
    np.testing.assert_allclose(x, truth[rank], rtol=1e-5, atol=1e-4)


def test_leaves_across_chunks(place, machines):
  n, rank = place.size, jfog.rank()
  graph = topology.exponential(n)
  counts = (3, 0, CHUNK - 5, 1, 2 * CHUNK + 1, 7, 77_777)
  dtypes = (np.float32, np.float32, np.float16, np.complex64)
  truth = [
    values(count, n).astype(dtypes[i % 4]) for i, count in enumerate(counts)
  ]
  x = [jnp.asarray(leaf[rank]) for leaf in truth]
  x = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))(x)
  for got, leaf in zip(x, truth, strict=True):
    wanted = np.tensordot(graph.mixing_matrix, leaf.astype(complex), 1)[rank]
    assert got.dtype == leaf.dtype
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-2)


def test_many_at_once(place, machines):
  """More operations than channels, and waited for in another order."""
  n, rank = place.size, jfog.rank()
  graphs = [make(n) for make in GRAPHS.values()]
  count = 5 * CHUNK + 3
  truth = values(count, n)

  @jax.jit
  def run(x):
    handles = [
      jfog.neighbor_allreduce_start(x + k, graphs[k % 3]) for k in range(9)
    ]
    order = [(4 * k + rank) % 9 for k in range(9)]
    done = {k: jfog.wait(handles[k]) for k in order}
    return [done[k] for k in range(9)]

  for k, y in enumerate(run(jnp.asarray(truth[rank], jnp.float32))):
    wanted = graphs[k % 3].mixing_matrix @ (truth + k)
    np.testing.assert_allclose(y, wanted[rank], rtol=1e-5, atol=1e-4)


def test_a_sender_far_ahead(place, machines):
  """Rank 0 has no in-neighbor, and runs all steps before the others start."""
  n, rank = place.size, jfog.rank()
  graph = topology.Topology(_path(n), connected=False)
  count, steps = 3 * CHUNK + 1, 12
  step = jax.jit(lambda x, k: jfog.neighbor_allreduce(x + k, graph))
  truth = values(count, n)
  x = jnp.asarray(truth[rank], jnp.float32)
  if rank > 0:
    time.sleep(0.3)
  for k in range(steps):
    x, truth = step(x, float(k)), graph.mixing_matrix @ (truth + k)
  np.testing.assert_allclose(x, truth[rank], rtol=1e-4, atol=1e-3)


def test_ranks_may_weight_differently(place, machines):
  """Scaled messages bypass the shared-memory channel; their chunks are equal."""
  n, rank = place.size, jfog.rank()
  count = 4 * CHUNK + 9
  right, left = (rank + 1) % n, (rank - 1) % n
  truth = values(count, n)
  scale = [2.0 if r % 2 else 1.0 for r in range(n)]
  destinations = {right: scale[rank]} if rank % 2 else [right]
  peers = jfog.Peers(0.5, {left: 0.25}, destinations)
  y = jfog.neighbor_allreduce(jnp.asarray(truth[rank], jnp.float32), peers)
  wanted = 0.5 * truth[rank] + 0.25 * scale[left] * truth[left]
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


def _path(n):
  """Rank r receives from r - 1 only, rank 0 from no rank."""
  matrix = np.eye(n)
  for r in range(1, n):
    matrix[r, r - 1 : r + 1] = 0.5
  return matrix
