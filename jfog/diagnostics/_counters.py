"""Bytes sent: the formula for a graph, and the counters of the native core."""

from typing import Any

import jax
import jax.numpy as jnp

from jfog import runtime
from jfog.optimizers import Compressor, message_bytes
from jfog.runtime import Communicator, ProcessCommunicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology


def bytes_per_step(
  graph: Topology | Schedule | ExactAverage,
  x: Any,
  *,
  compressor: Compressor | None = None,
) -> float:
  """The payload bytes that a rank sends in a step of averaging, on average.

  The bytes of `x`, or of its compressed message, times the number of messages of
  a rank in a step, averaged over ranks and, for a schedule, over its period.
  Computed from shapes; nothing is sent.

  Args:
    graph: the graph of the averaging.
    x: the payload, or the operand of the compressor: a pytree of arrays or of
      `jax.ShapeDtypeStruct`. Optimizers send float32 for 16-bit parameters.
    compressor: turns `x` into a message; by default `x` itself is sent.

  Returns:
    The bytes, a float.

  Raises:
    TypeError: if `graph` is not a graph, `compressor` is not a `Compressor`, or
      it does not take the dtypes of `x`.
    ValueError: if `compressor` does not take the shapes of `x`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph, x = jfog.topology.ring(8), jnp.zeros(10)
    >>> jfog.diagnostics.bytes_per_step(graph, x)
    80.0
    >>> sign = jfog.optimizers.sign()
    >>> jfog.diagnostics.bytes_per_step(graph, x, compressor=sign)
    12.0
  """
  if compressor is None:
    size = sum(
      leaf.size * jnp.dtype(leaf.dtype).itemsize
      for leaf in jax.tree.leaves(jax.eval_shape(lambda: x))
    )
  else:
    size = message_bytes(compressor, x)
  if isinstance(graph, ExactAverage):
    return float(size) if graph.size > 1 else 0.0
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(
      f"bytes_per_step: expects a Topology, Schedule or ExactAverage, got "
      f"{graph!r}; make one by jfog.topology."
    )
  messages = sum(
    len(topology.out_neighbors(rank))
    for topology in graph.rounds
    for rank in range(graph.size)
  )
  return size * messages / (graph.size * len(graph))


def counters(*, comm: Communicator | None = None) -> dict[str, Any]:
  """The traffic of this rank on a communicator of processes, by peer and in sum.

  Neighbor operations count payload bytes in wire format. A collective counts
  under this rank itself, with the bytes that it contributes and receives, because
  its route through the peers is up to the MPI library. A window operation counts
  at its caller: puts as sent, gets as received. `agreements` counts the
  consistency checks with other ranks before the first use of a graph or of a set
  of peers. `missing` counts the averages that went on without a neighbor that had
  failed, see `on_missing` of `jfog.init`.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A dict with `bytes_sent`, `bytes_received`, `messages_sent`, `operations` and
    `agreements`, under `"missing"` a dict from each missing peer to its count, and
    under `"peers"` a dict from each peer to the first three.

  Raises:
    ValueError: on a mesh, where XLA moves the data without counters.
    NotInitializedError: without a communicator.

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
      "missing": {},
      "peers": {},
    }
  # Operations in flight are counted when they complete.
  jax.effects_barrier()
  *columns, (operations, agreements), missing = runtime.counters(
    of_processes(comm)
  )
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
    "missing": {peer: count for peer, count in enumerate(missing) if count},
    "peers": peers,
  }


def reset_counters(*, comm: Communicator | None = None) -> None:
  """Resets the counters of a communicator to zero.

  Raises:
    ValueError: on a mesh, which has no counters.
    NotInitializedError: without a communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.diagnostics.reset_counters()
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return
  jax.effects_barrier()
  runtime.reset_counters(of_processes(comm))
  runtime.begin_summary(of_processes(comm))


def of_processes(comm: Communicator) -> ProcessCommunicator:
  """Requires a communicator of processes, the only ones with counters."""
  if not isinstance(comm, ProcessCommunicator):
    raise ValueError(
      "a mesh has no counters, because XLA moves its data; use "
      "jfog.diagnostics.bytes_per_step."
    )
  return comm
