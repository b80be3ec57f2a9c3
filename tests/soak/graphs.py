"""Random graphs of a number of ranks, and their dense matrices."""

import numpy as np
from support import reference

import jfog
from jfog import topology


def matrix(rng, ranks):
  """Random weights on random directed edges; rows or columns sum to 1."""
  edges = rng.random((ranks, ranks)) < rng.choice([0.2, 0.5, 0.9])
  np.fill_diagonal(edges, True)
  weights = edges * rng.integers(1, 5, (ranks, ranks)) / 8
  # Rows that sum to 1 are evaluated as differences.
  axis = int(rng.random() < 0.6)
  return weights / weights.sum(axis=axis, keepdims=True)


def random_topology(rng, ranks):
  """A topology: a well-known one, or random edges."""
  known = [
    topology.ring,
    lambda n: topology.ring(n, "right"),
    lambda n: topology.ring(n, "left"),
    topology.star,
    topology.chain,
    topology.exponential,
    topology.symmetric_exponential,
    topology.fully_connected,
    topology.mesh_grid_2d,
  ]
  if rng.random() < 0.6:
    return known[rng.integers(len(known))](ranks)
  return topology.Topology(matrix(rng, ranks), connected=False)


def random_schedule(rng, ranks):
  """A schedule: a well-known one, or of random topologies."""
  if rng.random() < 0.5:
    return topology.one_peer_exponential(ranks)
  rounds = [random_topology(rng, ranks) for _ in range(rng.integers(0, 3))]
  # The union of the rounds has to be connected.
  return topology.Schedule([*rounds, topology.ring(ranks)])


def exact(rng, ranks):
  """A graph that reaches the exact average."""
  graphs = [
    topology.ceca,
    topology.fully_connected,
    topology.hyper_hypercube,
    lambda n: topology.base_k(n, 1),
    lambda n: topology.simple_base(n, 1),
  ]
  return graphs[rng.integers(len(graphs))](ranks)


def dense(graph, step=0):
  """The mixing matrix of a round."""
  return reference.mixing(graph, step % len(graph))


class RandomPeers:
  """Peers of all ranks: random edges with weights at both ends."""

  def __init__(self, rng, ranks):
    edges = rng.random((ranks, ranks)) < rng.choice([0.3, 0.8])
    np.fill_diagonal(edges, False)
    self.edges = edges  # [dst, src]
    self.own = rng.integers(0, 5, ranks) / 8
    self.src_weights = edges * rng.integers(1, 5, (ranks, ranks)) / 8
    self.dst_weights = np.ones((ranks, ranks))
    if rng.random() < 0.5:
      self.dst_weights = rng.choice([0.5, 1.0, 2.0], (ranks, ranks))
    # The order of the keys is that of a gather.
    self.order = [
      [int(r) for r in rng.permutation(ranks)] for _ in range(ranks)
    ]

  def sources(self, rank):
    """In the order of this rank."""
    return [r for r in self.order[rank] if self.edges[rank, r]]

  def of(self, rank):
    """The `jfog.Peers` of a rank."""
    return jfog.Peers(
      float(self.own[rank]),
      {r: float(self.src_weights[rank, r]) for r in self.sources(rank)},
      {
        r: float(self.dst_weights[r, rank])
        for r in range(len(self.own))
        if self.edges[r, rank]
      },
    )

  def dense(self):
    """The matrix of the average."""
    return np.diag(self.own) + self.src_weights * self.dst_weights
