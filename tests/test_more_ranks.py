"""All operations on more ranks than most tests have, against dense products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference

import jfog
import jfog.runtime
from jfog.topology import (
  Topology,
  base_k,
  ceca,
  one_peer,
  one_peer_exponential,
  ring,
  star,
)

pytestmark = pytest.mark.places("simulate-6x2", "mpi-6x2", "mpi-8x2")
TOLERANCE = 1e-5


def random_graph(size):
  """Directed and irregular; rows that sum to 1."""
  rng = np.random.RandomState(size)
  edges = (rng.rand(size, size) < 0.4) | np.eye(size, dtype=bool)
  edges |= np.roll(np.eye(size, dtype=bool), 1, axis=0)
  weights = edges * rng.rand(size, size)
  return Topology(weights / weights.sum(axis=1, keepdims=True))


def test_averages(place, rng):
  """Weighted, with a traced step, transposed, and in finitely many rounds."""
  n = place.size
  x = rng.randn(n, 20_003).astype(np.float32)
  graph, schedule = random_graph(n), one_peer(star(n))
  pairs = (n - 1) - np.arange(n)

  @jax.jit
  def program(x, step):
    return (
      jfog.neighbor_allreduce(x, graph),
      jfog.neighbor_allreduce(x, schedule, step),
      jax.vjp(lambda x: jfog.neighbor_allreduce(x, graph), x)[1](x)[0],
      jfog.finite_time_average(x, ceca(n)),
      jfog.finite_time_average(x, base_k(n, 1)),
      jfog.pair_gossip(x, n - 1 - jfog.rank(), pair_weight=0.25),
    )

  results = place.run(program, x, np.full(n, 3, np.int32))
  matrices = (
    reference.mixing(graph),
    reference.mixing(schedule, 3),
    reference.mixing(graph).T,
    reference.mean(n),
    reference.mean(n),
    0.5 * np.eye(n) + 0.25 * np.eye(n)[pairs],
  )
  for y, matrix in zip(results, matrices, strict=True):
    reference.assert_close(
      y, place.mine(matrix @ x.astype(np.float64)), TOLERANCE
    )


def test_collectives_and_gathers(place, rng):
  n = place.size
  x = rng.randn(n, 2, 301).astype(np.float32)
  integers = rng.randint(-9, 9, (n, 5)).astype(np.int16)

  @jax.jit
  def program(x, k):
    return (
      jfog.allreduce(x, "max"),
      jfog.allreduce(k, "prod"),
      jfog.broadcast(x, n - 1),
      jfog.allgather(k),
      jfog.neighbor_allgather(x, one_peer_exponential(n), 2),
      jfog.neighbor_allgather(k, star(n), pad=True),
    )

  padded = np.zeros((n, 5 * (n - 1)), np.int16)
  padded[0] = integers[1:].ravel()
  padded[1:, :5] = integers[0]
  truths = (
    np.broadcast_to(x.max(axis=0), x.shape),
    np.broadcast_to(np.prod(integers, axis=0, dtype=np.int16), (n, 5)),
    np.broadcast_to(x[-1], x.shape),
    np.broadcast_to(integers.ravel(), (n, 5 * n)),
    np.roll(x, 4, axis=0),
    padded,
  )
  results = place.run(program, x, integers)
  for y, truth in zip(results, truths, strict=True):
    np.testing.assert_array_equal(y, place.mine(truth))


def test_peers_of_a_random_graph(place, rng):
  """Both sides weight; another graph in every round."""
  if place.kind != "mpi":  # peers are what processes decide
    with pytest.raises(ValueError, match="one program"):
      place.run(
        lambda x: jfog.neighbor_allreduce(x, jfog.Peers(1.0, {}, [])),
        np.zeros((place.size, 1), np.float32),
      )
    return
  n, rank = place.size, jfog.rank()
  x = rng.randn(n, 9_001).astype(np.float32)
  for _ in range(3):
    edges = rng.rand(n, n) < 0.4  # [dst, src]
    np.fill_diagonal(edges, False)
    own, received, sent = rng.rand(n), rng.rand(n, n), rng.rand(n, n)
    own[rng.randint(n)] = 0
    sources = [j for j in range(n) if edges[rank, j]]
    peers = jfog.Peers(
      own[rank],
      {j: received[rank, j] for j in reversed(sources)},
      {j: sent[j, rank] for j in range(n) if edges[j, rank]},
    )
    matrix = np.diag(own) + edges * received * sent
    y = jfog.neighbor_allreduce(jnp.asarray(x[rank]), peers)
    reference.assert_close(y, (matrix @ x.astype(np.float64))[rank], TOLERANCE)
    y = jfog.neighbor_allgather(x[rank], peers)
    parts = [x[j] for j in reversed(sources)]
    np.testing.assert_array_equal(y, np.concatenate([*parts, x[0][:0]]))


def test_schedules_of_machines(place, rng):
  """By machines and as one flat graph it is the same average."""
  m = place.size // place.local_size
  x = rng.randn(place.size, 1001).astype(np.float32)
  graph = one_peer_exponential(m)
  flat = jfog.topology.hierarchical(graph, place.local_size)

  @jax.jit
  def program(x, step):
    return (
      jfog.hierarchical_neighbor_allreduce(x, graph, step),
      jfog.neighbor_allreduce(x, flat, step),
      jfog.hierarchical_neighbor_allreduce(x, ring(m)),
    )

  by_machine, by_rank, around = place.run(program, x, np.full(place.size, 1))
  truth = reference.mixing(flat, 1) @ x
  reference.assert_close(by_machine, place.mine(truth), TOLERANCE)
  reference.assert_close(by_rank, place.mine(truth), TOLERANCE)
  inside = reference.mean(place.local_size)
  reference.assert_close(
    around,
    place.mine(np.kron(reference.mixing(ring(m)), inside) @ x),
    TOLERANCE,
  )
