"""Delayed messages of windows on a mesh, for research on asynchrony."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jfog.runtime import Communicator


class Pending(NamedTuple):
  """Messages in flight, by the number of updates until they arrive.

  Messages that arrive in one slot at one time are merged in the order of sending.
  Position 0, of messages that have arrived, is empty between operations.
  """

  messages: list[jax.Array]  # shape=(ahead, slots, ...), one for each leaf
  puts: jax.Array  # shape=(ahead, slots), dtype=bool: else they are summands
  counts: jax.Array  # shape=(ahead, slots), dtype=int32: how many were merged
  latest: jax.Array  # shape=(slots,), dtype=int32: where the last one is
  time: jax.Array  # shape=(), dtype=int32: the updates so far, in the period


def check(delay: Any, comm: Communicator) -> Any:
  """A delay as tuples `[t][dst][src]`; None if there is none.

  Raises:
    TypeError: if it is not an integer.
    ValueError: if it is negative, of another shape, or for a communicator of processes.
  """
  if delay is None:
    return None
  if comm.backend in ("mpi", "nccl"):
    raise ValueError(
      "win_create: delay applies to a mesh and to simulation only; omit it "
      "between processes, where messages have real delays."
    )
  if isinstance(delay, jax.core.Tracer):
    raise TypeError(
      "win_create: delay is traced; pass an int or a NumPy array of them."
    )
  table, size = np.asarray(delay), comm.size
  if not np.issubdtype(table.dtype, np.integer):
    raise TypeError(
      f"win_create: delay has dtype {table.dtype}; it counts updates, so pass "
      f"integers."
    )
  if table.ndim == 0:
    table = np.full((size, size), table)
  if table.ndim == 2:
    table = table[None]
  if table.shape[1:] != (size, size) or len(table) == 0:
    raise ValueError(
      f"win_create: delay has shape {np.shape(delay)}; pass an int, or an array "
      f"delay[dst, src] or delay[t, dst, src] of {size} ranks."
    )
  if table.min() < 0:
    raise ValueError(
      f"win_create: delay has an entry {table.min()}; what is sent arrives 0 or "
      f"more updates later."
    )
  if not table.any():
    return None
  return tuple(tuple(map(tuple, matrix)) for matrix in table.tolist())


def advance(pending: Pending, period: int) -> Pending:
  """Brings all messages one update nearer."""

  def shifted(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

  return Pending(
    messages=[shifted(x) for x in pending.messages],
    puts=shifted(pending.puts),
    counts=shifted(pending.counts),
    latest=jnp.maximum(pending.latest - 1, 0),
    time=(pending.time + 1) % period,
  )
