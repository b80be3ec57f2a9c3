"""Graphs without the ranks that have failed: the rule by which averages go on."""

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from jfog import _validation
from jfog.topology._schedule import Schedule
from jfog.topology._topology import Topology

Graph = TypeVar("Graph", Topology, Schedule)


def reweighted(matrix: np.ndarray, present: np.ndarray) -> np.ndarray:
  """A mixing matrix in which missing edges count for the receiver's own value.

  `V[i, j] = W[i, j]` on the edges that are present, and
  `V[i, i] = W[i, i] + sum_j W[i, j]` over the missing ones.

  Args:
    matrix: the mixing matrix `W`, of shape `(size, size)`.
    present: of the same shape, whether `dst` gets the message of `src`; the
      diagonal is not used.
  """
  missing = np.where(present, 0.0, matrix)
  np.fill_diagonal(missing, 0.0)
  return matrix - missing + np.diag(missing.sum(axis=1))


def without(
  graph: Graph,
  missing: Iterable[int],
  *,
  renumber: bool = False,
) -> Graph:
  """The graph on which averages go on without some ranks.

  Each rank that is left adds the weights of its missing in-neighbors to its own,
  `V[i, i] = W[i, i] + sum_j W[i, j]` over missing j, and a missing rank keeps to
  itself. So rows go on to sum to 1, and a symmetric graph stays doubly stochastic
  over the ranks that are left, which then average to their own mean. In a directed
  graph columns may change: ranks that are left then average to a weighted mean.

  This is the rule of `on_missing="reweight"` of `jfog.init` and of `alive` of
  `jfog.simulate`. What is left may fall apart into unconnected groups, as a ring
  does when two of its ranks are missing; then only each group agrees.

  Args:
    graph: the graph over all ranks.
    missing: the ranks that are missing.
    renumber: leave the missing ranks out, and number the others from 0; by default
      the size stays, of a `Topology`. A `Schedule` needs it, whose union has to be
      connected; pass its rounds one by one to keep the size.

  Returns:
    A graph like the argument.

  Raises:
    TypeError: if `graph` is not a `Topology` or a `Schedule`.
    ValueError: if a rank is out of range, if none is left, if a `Schedule` comes
      without `renumber`, if the graph is not row-stochastic, or with `renumber`, if
      the ranks that are left are not connected.

  Example:
    >>> import jfog
    >>> graph = jfog.topology.without(jfog.topology.ring(4), [3])
    >>> graph.mixing_matrix.round(2)
    array([[0.67, 0.33, 0.  , 0.  ],
           [0.33, 0.33, 0.33, 0.  ],
           [0.  , 0.33, 0.67, 0.  ],
           [0.  , 0.  , 0.  , 1.  ]])
  """
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(
      f"without: expects a Topology or a Schedule, got {graph!r}."
    )
  if isinstance(graph, Schedule) and not renumber:
    raise ValueError(
      "without: a Schedule needs renumber=True; pass schedule[t] to keep the size."
    )
  gone = {_validation.rank(each, graph.size) for each in missing}
  left = [rank for rank in range(graph.size) if rank not in gone]
  if not left:
    raise ValueError(f"without: all {graph.size} ranks are missing.")
  is_left = np.isin(np.arange(graph.size), left)
  present = is_left[:, None] & is_left[None, :]
  kept = np.ix_(left, left) if renumber else np.s_[:, :]
  matrices = [
    reweighted(topology.mixing_matrix, present)[kept]
    for topology in graph.rounds
  ]
  if isinstance(graph, Schedule):
    return Schedule(matrices)
  return Topology(matrices[0], connected=renumber)
