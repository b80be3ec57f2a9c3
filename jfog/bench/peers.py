"""Operations that are timed, and what they are measured against.

A peer holds one rank's array `x` and runs steps of an operation on it; `seconds`
times `chunk` steps a call. All neighbor averages sum in the form
`x + sum_j w_j (x_j - x)`. Their graphs are circulant: in each round rank r receives
from r - d for some offsets d, the same on all ranks.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import primitives, runtime, topology
from jfog.bench import measure

# Bytes of the array, and the steps of one jitted scan: enough that calling it
# costs little, which JAX lets take half a millisecond where a function has
# ordered effects. One timing calls it as often as `TARGET` asks.
CHUNKS = {
  8: 4096,
  512: 4096,
  4 * 2**10: 4096,
  32 * 2**10: 1024,
  256 * 2**10: 256,
  2**20: 64,
  4 * 2**20: 16,
  40 * 2**20: 4,
}
GRAPHS = {
  "ring": topology.ring,
  "exponential": topology.exponential,
  "one-peer exponential": topology.one_peer_exponential,
}


def rounds(graph: Any) -> list[list[tuple[int, float]]]:
  """For each round, the offsets and their weights."""
  found = []
  for each in graph.rounds:
    row = each.mixing_matrix[0]
    pairs = [(-src % graph.size, row[src]) for src in each.in_neighbors(0)]
    for offset, _ in pairs:
      shifted = np.roll(np.eye(graph.size), -offset, 1)
      weights = each.mixing_matrix[shifted.astype(bool)]
      assert np.ptp(weights) == 0, f"{each!r} is not circulant"
    found.append([(offset, float(weight)) for offset, weight in pairs])
  return found


def start(rank: int, count: int) -> np.ndarray:
  """The values of a rank before the first step; shape (count,)."""
  values = np.arange(count, dtype=np.int32) * 7 % 101
  return ((values + 13 * rank) % 37).astype(np.float32)


def starts(ranks: int, count: int) -> np.ndarray:
  """Those of all ranks; shape (ranks, count)."""
  return np.stack([start(rank, count) for rank in range(ranks)])


def expected(graph: Any, count: int, steps: int) -> np.ndarray:
  """The values of all ranks after `steps`, by NumPy; float64."""
  x = starts(graph.size, count).astype(np.float64)
  for t in range(steps):
    x = graph.rounds[t % len(graph.rounds)].mixing_matrix @ x
  return x


class Comm(Protocol):
  """The ranks of a peer: a communicator of mpi4py, or `job.Ranks`."""

  rank: int
  size: int

  def Barrier(self) -> Any:
    """Waits for all ranks."""


class Peer(Protocol):
  """An operation that is timed."""

  chunk: int

  def seconds(self, calls: int) -> float:
    """The seconds of `calls` times `chunk` steps, from a barrier on."""
    ...


class Scanned:
  """A peer whose step is traced: one call is a scan over `chunk` steps."""

  def __init__(
    self,
    step_of_period: Callable[[Any, Any], Any],
    chunk: int,
    period: int,
    x: Any,
    barrier: Callable[[], Any],
  ):
    """Takes `(x, index) -> x`, which does the steps of one period."""
    assert chunk % period == 0

    def loop(x: Any) -> Any:
      indices = jnp.arange(chunk // period)
      return lax.scan(lambda x, i: (step_of_period(x, i), None), x, indices)[0]

    self._run = jax.jit(loop, donate_argnums=0)
    self._barrier = barrier
    self.x = jax.tree.map(jnp.asarray, x)
    self.chunk = chunk

  def seconds(self, calls: int) -> float:
    """The seconds of `calls` chunks, from a barrier to the blocked end."""
    self.x, seconds = measure.timed(self._run, self.x, calls, self._barrier)
    return seconds

  def value(self) -> Any:
    """The value of this rank."""
    return jax.tree.map(np.asarray, self.x)


class Jfog(Scanned):
  """`jfog.neighbor_allreduce`; the step of a schedule is traced."""

  def __init__(self, graph: Any, chunk: int, x: Any, comm: Comm):
    def step(x: Any, i: Any) -> Any:
      return primitives.neighbor_allreduce(x, graph, i)

    super().__init__(step, chunk, 1, x, comm.Barrier)


class Operation(Scanned):
  """Another operation of jfog; `step` takes `x` and the index of the step."""

  def __init__(
    self, step: Callable[[Any, Any], Any], chunk: int, x: Any, comm: Comm
  ):
    super().__init__(step, chunk, 1, x, comm.Barrier)


class Put(Scanned):
  """`jfog.win_put` to the next rank, which takes no part."""

  def __init__(self, chunk: int, x: np.ndarray, comm: Comm):
    self._window = primitives.win_create(x, topology.ring(comm.size, "right"))
    value = jnp.asarray(x)

    def step(window: Any, i: Any) -> Any:
      del i
      return primitives.win_put(window, value)

    super().__init__(step, chunk, 1, self._window, comm.Barrier)

  def free(self) -> None:
    """Frees the window. Collective."""
    primitives.win_free(self.x)


class Raw:
  """Plain MPI in C++, in this process: `xla_ops/mpi/raw_exchange.cc`."""

  def __init__(self, graph: Any, chunk: int, x: np.ndarray, comm: Comm):
    self.chunk = chunk
    self.x = np.array(x)
    source_begin, sources, weights = [0], [], []
    destination_begin, destinations = [0], []
    for offsets in rounds(graph):
      for offset, weight in offsets:
        sources.append((comm.rank - offset) % comm.size)
        destinations.append((comm.rank + offset) % comm.size)
        weights.append(weight)
      source_begin.append(len(sources))
      destination_begin.append(len(destinations))
    self._tables: Sequence[list[Any]] = (
      *(source_begin, sources, weights),
      *(destination_begin, destinations),
    )

  def seconds(self, calls: int) -> float:
    """As in `Scanned`; the barrier and the clock are in C++."""
    return runtime.mpi().raw_neighbor_allreduce(
      *(self.x.ctypes.data, self.x.size),
      *self._tables,
      calls * self.chunk,
    )

  def value(self) -> np.ndarray:
    """The value of this rank."""
    return self.x


class RawAllreduce:
  """`MPI_Allreduce` and a division, likewise."""

  def __init__(self, chunk: int, x: np.ndarray):
    self.chunk = chunk
    self.x = np.array(x)

  def seconds(self, calls: int) -> float:
    """As in `Scanned`."""
    return runtime.mpi().raw_allreduce(
      self.x.ctypes.data, self.x.size, calls * self.chunk
    )

  def value(self) -> np.ndarray:
    """The value of this rank."""
    return self.x


class Copy:
  """NumPy copies of the array, of all ranks at once: the limit of memory."""

  def __init__(self, chunk: int, x: np.ndarray, comm: Comm):
    self.chunk = chunk
    self._x, self._y, self._barrier = np.array(x), np.array(x), comm.Barrier

  def seconds(self, calls: int) -> float:
    """As in `Scanned`."""
    x, y = self._x, self._y
    self._barrier()
    begin = time.perf_counter()
    for _ in range(calls * self.chunk):
      np.copyto(y, x)
    return time.perf_counter() - begin
