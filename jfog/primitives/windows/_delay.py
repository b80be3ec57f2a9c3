"""Delayed messages of windows on a mesh, for research on asynchrony."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfog.runtime import Axis, Communicator, checked_delay, window_delays


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

  Without one it is that of the simulation.

  Raises:
    TypeError: if it is not an integer.
    ValueError: if it is negative, of another shape, or for a communicator of processes.
  """
  if delay is None:
    if not isinstance(comm, Axis):
      return None
    return window_delays(comm.axes, comm.size)
  if comm.backend in ("mpi", "nccl"):
    raise ValueError(
      "win_create: delay applies to a mesh and to simulation only; omit it "
      "between processes, where messages have real delays."
    )
  return checked_delay(delay, comm.size, "win_create")


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
