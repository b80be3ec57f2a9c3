"""The other end of each rank's choice of peers."""

import operator
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jfog.primitives._allgather import allgather
from jfog.runtime import Communicator, resolve


def infer_sources(
  destinations: Iterable[int], *, comm: Communicator | None = None
) -> list[int]:
  """The ranks that send to this one, from the destinations of every rank.

  Each rank passes the ranks that it sends to, and gets those that have named it,
  for `src_weights` of `jfog.Peers`. Collective: an allgather of `size` bytes for
  each rank. Not under `jax.jit`, for the result is a list; between processes only.

  Args:
    destinations: the ranks that this rank sends to.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    The ranks, ascending.

  Raises:
    ValueError: for a rank that is out of range or this one, a duplicate, or on a
      mesh.
    TypeError: for a rank that is not an int.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jfog
    >>> world = jfog.init()
    >>> jfog.infer_sources([])
    []

  Source: `InferSourceFromDestinationRanks` of BlueFog.
  """
  return _infer(destinations, "infer_sources", comm)


def infer_destinations(
  sources: Iterable[int], *, comm: Communicator | None = None
) -> list[int]:
  """The ranks that this one sends to, from the sources of every rank.

  `jfog.infer_sources` with the two ends exchanged: each rank passes the ranks that
  it receives from, and gets those that have named it, for `dst_weights` of
  `jfog.Peers`.

  Args:
    sources: the ranks that this rank receives from.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    The ranks, ascending.

  Raises:
    ValueError, TypeError, NotInitializedError: as `jfog.infer_sources`.

  Example:
    >>> import jfog
    >>> world = jfog.init()
    >>> jfog.infer_destinations([])
    []

  Source: `InferDestinationFromSourceRanks` of BlueFog.
  """
  return _infer(sources, "infer_destinations", comm)


def _infer(
  named: Iterable[int], operation: str, comm: Communicator | None
) -> list[int]:
  """The ranks that name this one; a rank does not name itself."""
  comm = resolve(comm)
  if comm.backend == "mesh":
    raise ValueError(
      f"{operation}: on a mesh all ranks run one program and cannot choose peers "
      f"of their own; pass a Topology or a Schedule to the operation."
    )
  row = np.zeros(comm.size, np.uint8)
  for rank in named:
    try:
      rank = operator.index(rank)
    except TypeError as error:
      raise TypeError(
        f"{operation}: ranks are ints and not traced, got {rank!r} of type "
        f"{type(rank).__name__}."
      ) from error
    if not 0 <= rank < comm.size or rank == comm.rank or row[rank]:
      raise ValueError(
        f"{operation}: rank {rank} on rank {comm.rank} of {comm.size} is not "
        f"another rank, or given twice; name each peer once."
      )
    row[rank] = 1
  names = np.asarray(allgather(jnp.asarray(row)[None], comm=comm))
  return np.flatnonzero(names[:, comm.rank]).tolist()
