"""Diagnostics: how far the ranks are apart, and what they have sent."""

from typing import Any

import jax
import jax.numpy as jnp

from jfog.primitives import allreduce
from jfog.runtime import Communicator, MpiCommunicator, mpi, resolve
from jfog.topology import ExactAverage, Schedule, Topology


def consensus_distance(
  params: Any, *, comm: Communicator | None = None
) -> jax.Array:
  """The root mean square over ranks of the distance to the average.

  Computes `sqrt(1/n sum_i ||x[i] - xbar||^2)` over all leaves together, with
  `xbar` the average over ranks. Two operations: an average of `params` and one
  of a scalar.

  Args:
    params: a pytree of float or complex arrays.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A float32 scalar (float64 for 64-bit leaves), equal on all ranks; traced
    under a transformation.

  Raises:
    TypeError: for integer or bool leaves.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(jfog.diagnostics.consensus_distance, 2)(
    ...     jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)
  """
  mean = allreduce(params, comm=comm)
  squares = [
    jnp.sum(jnp.abs(_widen(x) - _widen(average)) ** 2)
    for x, average in zip(
      jax.tree.leaves(params), jax.tree.leaves(mean), strict=True
    )
  ]
  return jnp.sqrt(allreduce(sum(squares, jnp.zeros([])), comm=comm))


def bytes_per_step(graph: Topology | Schedule | ExactAverage, x: Any) -> float:
  """The payload bytes that a rank sends in one step of averaging, on average.

  `bytes of x` times the number of messages that a rank sends in a step, averaged
  over ranks and, for a schedule, over its period. Static: nothing is sent.

  Args:
    graph: the graph of the averaging.
    x: a pytree of arrays (or of `jax.ShapeDtypeStruct`).

  Returns:
    The bytes, a float.

  Raises:
    TypeError: if `graph` is no graph.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.diagnostics.bytes_per_step(jfog.topology.ring(8), jnp.zeros(10))
    80.0
  """
  size = sum(
    leaf.size * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(jax.eval_shape(lambda: x))
  )
  if isinstance(graph, ExactAverage):
    return float(size) if graph.size > 1 else 0.0
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(f"bytes_per_step: {graph!r} is no graph of jfog.topology.")
  messages = sum(
    len(topology.out_neighbors(rank))
    for topology in graph.rounds
    for rank in range(graph.size)
  )
  return size * messages / (graph.size * len(graph))


def counters(*, comm: Communicator | None = None) -> dict[str, Any]:
  """What this rank has sent and received on a communicator of processes.

  Payload bytes as they travel in neighbor operations, for each peer and in all.
  A collective counts under this rank itself, with the bytes that it contributes
  and gets, for its way through the peers is the MPI library's own. Operations on
  windows count at the rank that calls them: what it writes as sent, what it gets
  as received. Agreements are the comparisons with other ranks before the first use
  of a graph or of a set of peers.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A dict with `bytes_sent`, `bytes_received`, `messages_sent`, `operations` and
    `agreements`, and under `"peers"` a dict from each peer to the first three.

  Raises:
    ValueError: on a mesh, where XLA moves the data and nobody counts.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.diagnostics.counters()["bytes_sent"]
    0
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return {
      "bytes_sent": 0,
      "bytes_received": 0,
      "messages_sent": 0,
      "operations": 0,
      "agreements": 0,
      "peers": {},
    }
  # What is still running has not been counted.
  jax.effects_barrier()
  *columns, (operations, agreements) = mpi().counters(_context(comm))
  names = ("bytes_sent", "bytes_received", "messages_sent")
  totals = {
    name: sum(column) for name, column in zip(names, columns, strict=True)
  }
  peers = {
    peer: dict(zip(names, row, strict=True))
    for peer, row in enumerate(zip(*columns, strict=True))
    if any(row)
  }
  return {
    **totals,
    "operations": operations,
    "agreements": agreements,
    "peers": peers,
  }


def reset_counters(*, comm: Communicator | None = None) -> None:
  """Sets the counters of a communicator to zero.

  Raises:
    ValueError: on a mesh, which has none.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.diagnostics.reset_counters()
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return
  jax.effects_barrier()
  mpi().reset_counters(_context(comm))


def _context(comm: Communicator) -> int:
  if not isinstance(comm, MpiCommunicator):
    raise ValueError(
      "a mesh has no counters, because XLA moves its data; use "
      "jfog.diagnostics.bytes_per_step."
    )
  return comm.context


def _widen(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
