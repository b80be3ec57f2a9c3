"""Exchanges with a separate value for every edge of a graph."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog.primitives import neighbor_allreduce_start, wait
from jfog.runtime import Communicator
from jfog.topology import Topology, matchings


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
  """The edges of an undirected graph, in slots with equal numbers at both ends.

  The slots are an edge coloring: no two edges of a rank share one, so the edges
  of a slot are disjoint pairs. There is at least one slot.
  """

  partners: np.ndarray  # shape=(size, slots), dtype=int; -1 for no edge
  swaps: tuple[Topology, ...]  # permutation matrix of each slot

  @property
  def slots(self) -> int:
    """The number of slots of every rank."""
    return len(self.swaps)

  def here(self, table: np.ndarray, comm: Communicator) -> jax.Array:
    """This rank's row of a table of shape `(size, slots)`."""
    return jnp.asarray(table)[comm.rank]

  def exchange(self, x: Any, comm: Communicator) -> Any:
    """Sends each slot's value to its partner, and returns the partners' values.

    One message per edge and direction, with all leaves. All slots are started
    before the first wait, so their messages are in flight together.

    Args:
      x: a pytree of float or complex arrays with slots along axis 0.
      comm: the communicator.

    Returns:
      A pytree like `x`, with the bits that were sent; zeros in slots without an
      edge.

    Raises:
      ValueError: if graph and communicator have different sizes.
      TypeError: for integer or bool leaves.
    """
    handles = [
      neighbor_allreduce_start(
        jax.tree.map(lambda leaf, slot=slot: leaf[slot], x), swap, comm=comm
      )
      for slot, swap in enumerate(self.swaps)
    ]
    received = [wait(handle) for handle in handles]
    has_edge = self.here(self.partners >= 0, comm)

    def stack(*values: jax.Array) -> jax.Array:
      stacked = jnp.stack(values)
      mask = has_edge.reshape(-1, *(1,) * values[0].ndim)
      return jnp.where(mask, stacked, jnp.zeros_like(stacked))

    return jax.tree.map(stack, *received)


def edges_of(topology: Topology, name: str) -> Edges:
  """The edges of a connected, undirected graph; weights are not used.

  The number of slots is the largest degree, or one more; on a tree always the
  former.

  Args:
    topology: the graph.
    name: name of the optimizer, for error texts.

  Raises:
    ValueError: if an edge has no reverse edge, or the graph is not connected.

  Example:
    >>> from jfog.topology import chain
    >>> edges_of(chain(3), "relay_sum").partners
    array([[ 1, -1],
           [ 0,  2],
           [-1,  1]])
  """
  size = topology.size
  for rank in range(size):
    if topology.in_neighbors(rank) != topology.out_neighbors(rank):
      raise ValueError(
        f"{name}: {topology!r} is not symmetric: rank {rank} does not receive "
        f"from the ranks that it sends to; use an undirected graph such as "
        f"jfog.topology.chain(size)."
      )
  if not topology.is_connected:
    raise ValueError(
      f"{name}: {topology!r} is not connected; add edges until every rank "
      f"reaches every other."
    )
  degrees = [len(topology.in_neighbors(rank)) for rank in range(size)]
  # A tree needs as many colors as its largest degree, other graphs one more at
  # most (Vizing).
  if sum(degrees) == 2 * (size - 1):
    partners = _slots_of_tree(topology, max(1, *degrees))
  else:
    partners = np.full((size, len(matchings(topology))), -1)
    for slot, pairs in enumerate(matchings(topology)):
      for rank in range(size):
        partners[rank, slot] = next(iter(pairs.in_neighbors(rank)), -1)
  return Edges(partners, tuple(_swap(column) for column in partners.T))


def _slots_of_tree(tree: Topology, slots: int) -> np.ndarray:
  """Colors edges from rank 0 outwards, each with the first free slot."""
  partners = np.full((tree.size, slots), -1)
  reached = [0]
  for rank in reached:  # the list grows in the loop
    for other in tree.in_neighbors(rank):
      if other in partners[rank]:
        continue  # the parent in the tree
      slot = int(np.argmin(partners[rank]))
      partners[rank, slot], partners[other, slot] = other, rank
      reached.append(other)
  return partners


def _swap(partners: np.ndarray) -> Topology:
  """The permutation that swaps partners; ranks without one keep their value."""
  ranks = np.arange(len(partners))
  matrix = np.zeros((len(partners), len(partners)))
  matrix[ranks, np.where(partners < 0, ranks, partners)] = 1.0
  return Topology(matrix, connected=False)
