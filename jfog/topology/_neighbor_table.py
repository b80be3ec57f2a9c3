"""Neighbor table: a graph as arrays over rounds, ranks and slots."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jfog.topology._schedule import Schedule
from jfog.topology._topology import Topology

_TOLERANCE = 1e-9  # of the sum of a row, for the difference form


class NeighborTable:
  """Neighbors and weights of all ranks of a graph, in all rounds.

  Slot k of rank i holds its k-th in-neighbor in ascending order. All ranks and
  rounds have the same number of slots; the last ones may be empty.

  Attributes:
    sources: the in-neighbors; 0 in an empty slot. Of shape (rounds, ranks,
      slots), like the next two.
    weights: the weights of the in-neighbors; 0 in an empty slot.
    present: whether the slot holds an in-neighbor.
    self_weights: the diagonal, of shape (rounds, ranks).
    difference: rows `y = x[i] + sum_j W[i, j] (x[j] - x[i])`: those that sum to
      1 and keep a part of the own value. Of shape (rounds, ranks).
  """

  def __init__(self, graph: Topology | Schedule):
    rounds, size = graph.rounds, graph.size
    self._rounds = rounds
    # Padded to the largest in-degree: one shape for all rounds and ranks, so
    # that a traced step can index the arrays.
    slots = max(len(t.in_neighbors(i)) for t in rounds for i in range(size))
    shape = len(rounds), size, slots
    self.sources = np.zeros(shape, np.int32)
    self.weights = np.zeros(shape)
    self.present = np.zeros(shape, np.bool_)
    for t, topology in enumerate(rounds):
      for i in range(size):
        neighbors = list(topology.in_neighbors(i))
        filled = slice(len(neighbors))
        self.sources[t, i, filled] = neighbors
        self.weights[t, i, filled] = topology.mixing_matrix[i, neighbors]
        self.present[t, i, filled] = True
    diagonals = [topology.mixing_matrix.diagonal() for topology in rounds]
    sums = [topology.mixing_matrix.sum(axis=1) for topology in rounds]
    self.self_weights = np.array(diagonals)
    # x + sum w (x_j - x) equals the weighted sum only if the row sums to 1; it
    # returns equal values bit for bit.
    self.difference = (np.abs(np.array(sums) - 1) <= _TOLERANCE) & (
      self.self_weights != 0
    )
    for array in vars(self).values():
      if isinstance(array, np.ndarray):
        array.setflags(write=False)  # shared by all users of the cache

  @functools.cached_property
  def fingerprint(self) -> int:
    """Hash of all mixing matrices, equal on all ranks."""
    return digest(
      # Of the matrices and not of one rank's rows: the ranks compare it.
      *(np.ascontiguousarray(t.mixing_matrix).tobytes() for t in self._rounds)
    )

  def attributes(
    self, rank: int, peer: Callable[[int], int] = int
  ) -> dict[str, np.ndarray]:
    """FFI attributes: the rows of one rank; the step selects among the rounds.

    Args:
      rank: the rank of the graph.
      peer: from a rank of the graph to the communicator's rank to exchange
        with.
    """
    return csr_attributes(
      [
        (
          {peer(s): w for s, w in topology.src_weights(rank).items()},
          [peer(d) for d in topology.out_neighbors(rank)],
        )
        for topology in self._rounds
      ],
      self.self_weights[:, rank],
      self.difference[:, rank],
    )


@functools.lru_cache(maxsize=1024)
def neighbor_table(graph: Topology | Schedule) -> NeighborTable:
  """The neighbor table of a graph, made once."""
  return NeighborTable(graph)


def csr_attributes(
  rounds: Sequence[tuple[Mapping[int, float] | Sequence[int], Sequence[int]]],
  self_weights: Sequence[float] | np.ndarray | None = None,
  difference: Sequence[bool] | np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """FFI attributes of one rank's exchanges: compressed rows, one for each round.

  Args:
    rounds: the sources of each round, with or without weights, and its
      destinations.
    self_weights: the weight of the own value in each round.
    difference: whether the round is evaluated in difference form. Without these
      two the attributes have no weights.
  """
  source_begin, sources, source_weights = [0], [], []
  destination_begin, destinations = [0], []
  for row, to in rounds:
    sources.extend(row)
    if isinstance(row, Mapping):
      source_weights.extend(row.values())
    destinations.extend(to)
    # Round t lies between the entries t and t + 1.
    source_begin.append(len(sources))
    destination_begin.append(len(destinations))
  attributes: dict[str, Any] = {
    "source_begin": np.array(source_begin, np.int32),
    # FFI attributes may not be empty: one more element, which is never read.
    "sources": np.array([*sources, -1], np.int32),
    "destination_begin": np.array(destination_begin, np.int32),
    "destinations": np.array([*destinations, -1], np.int32),
  }
  if self_weights is not None and difference is not None:
    attributes |= {
      "source_weights": np.array([*source_weights, 0.0], np.float64),
      "self_weights": np.array([*self_weights, 0.0], np.float64),
      "difference": np.array([*difference, False], np.int32),
    }
  return attributes


def digest(*parts: bytes) -> int:
  """Hash of 64 bits, the same in all processes."""
  hashed = hashlib.blake2b(digest_size=8)
  for part in parts:
    hashed.update(part)
  return int.from_bytes(hashed.digest(), "little", signed=True)
