"""Implementations of the neighbor average: jfog, raw MPI, mpi4py, mpi4jax, XLA.

A peer holds one rank's array `x`, jfog's any pytree, and averages it in place. All are given the
same graphs, and all sum in the form x + sum_j w_j (x_j - x). Every graph here is
circulant: in each of its rounds rank r receives from r - d for some offsets d,
the same on all ranks.
"""

import ctypes
import time

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jfog

GRAPHS = {
  "ring": jfog.topology.ring,
  "exponential": jfog.topology.exponential,
  "one-peer exponential": jfog.topology.one_peer_exponential,
}


def rounds(graph):
  """For each round, the offsets and their weights."""
  found = []
  for topology in graph.rounds:
    row = topology.mixing_matrix[0]
    pairs = [(-src % graph.size, row[src]) for src in topology.in_neighbors(0)]
    for offset, _ in pairs:
      shifted = np.roll(np.eye(graph.size), -offset, 1)
      weights = topology.mixing_matrix[shifted.astype(bool)]
      assert np.ptp(weights) == 0, f"{topology!r} is not circulant"
    found.append([(offset, float(weight)) for offset, weight in pairs])
  return found


def start(rank, count):
  """The values of a rank before the first step; shape (count,)."""
  values = np.arange(count, dtype=np.int32) * 7 % 101
  return ((values + 13 * rank) % 37).astype(np.float32)


def starts(ranks, count):
  """Those of all ranks; shape (ranks, count)."""
  return np.stack([start(rank, count) for rank in range(ranks)])


def expected(graph, count, steps):
  """The values of all ranks after `steps`, by NumPy; float64."""
  x = starts(graph.size, count).astype(np.float64)
  for t in range(steps):
    x = graph.rounds[t % len(graph.rounds)].mixing_matrix @ x
  return x


class Scanned:
  """A peer whose step is traced: one call is a scan over `chunk` steps."""

  def __init__(self, step_of_period, chunk, period, x, barrier):
    """Takes `(x, index) -> x`, which does the steps of one period."""
    assert chunk % period == 0

    def loop(x):
      indices = jnp.arange(chunk // period)
      return lax.scan(lambda x, i: (step_of_period(x, i), None), x, indices)[0]

    self._run = jax.jit(loop, donate_argnums=0)
    self._barrier = barrier
    self.x = jax.tree.map(jnp.asarray, x)
    self.chunk = chunk

  def seconds(self, calls):
    """The seconds of `calls` chunks, from a barrier to the blocked end."""
    self.x, seconds = _measure.timed(self._run, self.x, calls, self._barrier)
    return seconds

  def value(self):
    """The value of this rank."""
    return jax.tree.map(np.asarray, self.x)


class Jfog(Scanned):
  """`jfog.neighbor_allreduce`; the step of a schedule is traced."""

  def __init__(self, graph, chunk, x, comm):
    def step(x, i):
      return jfog.neighbor_allreduce(x, graph, i)

    super().__init__(step, chunk, 1, x, comm.Barrier)


class JfogByLeaf(Scanned):
  """A `jfog.neighbor_allreduce` for every leaf instead of one for all."""

  def __init__(self, graph, chunk, x, comm):
    def step(x, i):
      return jax.tree.map(
        lambda leaf: jfog.neighbor_allreduce(leaf, graph, i), x
      )

    super().__init__(step, chunk, 1, x, comm.Barrier)


class Mpi4jax(Scanned):
  """`mpi4jax.sendrecv`, the period unrolled since its ranks are static."""

  def __init__(self, graph, chunk, x, comm):
    import mpi4jax

    plan, n, rank = rounds(graph), comm.size, comm.rank

    def period(x, i):
      del i
      for offsets in plan:
        received = [
          mpi4jax.sendrecv(x, x, (rank - d) % n, (rank + d) % n, comm=comm)
          for d, _ in offsets
        ]
        x = _mixed(x, received, offsets)
      return x

    super().__init__(period, chunk, len(plan), x, comm.Barrier)


class Mpi4py:
  """`Sendrecv` of preallocated buffers, and NumPy in place."""

  def __init__(self, graph, chunk, x, comm):
    self.chunk, self._comm = chunk, comm
    self._plan = [
      [
        (
          (comm.rank - d) % comm.size,
          (comm.rank + d) % comm.size,
          np.float32(w),
        )
        for d, w in offsets
      ]
      for offsets in rounds(graph)
    ]
    self.x = np.array(x)
    self._received = [np.empty_like(x) for _ in max(self._plan, key=len)]

  def seconds(self, calls):
    """As in `Scanned`."""
    comm, x, plan = self._comm, self.x, self._plan
    comm.Barrier()
    begin = time.perf_counter()
    for i in range(calls * self.chunk):
      peers = plan[i % len(plan)]
      for (src, dst, _), y in zip(peers, self._received, strict=False):
        comm.Sendrecv(x, dst, 0, y, src, 0)
      for (_, _, weight), y in zip(peers, self._received, strict=False):
        np.subtract(y, x, out=y)
        np.multiply(y, weight, out=y)
      for _, y in zip(peers, self._received, strict=False):
        np.add(x, y, out=x)
    return time.perf_counter() - begin

  def value(self):
    """The value of this rank."""
    return self.x


class Raw:
  """The C++ of raw_neighbor.cc, loaded into this process."""

  def __init__(self, graph, chunk, x, comm, library):
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
    self._tables = [
      np.array(source_begin, np.int32),
      np.array(sources, np.int32),
      np.array(weights, np.float32),
      np.array(destination_begin, np.int32),
      np.array(destinations, np.int32),
    ]
    self._run = ctypes.CDLL(library).raw_run
    self._run.restype = ctypes.c_double
    self._period = len(source_begin) - 1

  def seconds(self, calls):
    """As in `Scanned`; the barrier and the clock are in the C++."""
    seconds = self._run(
      self.x.ctypes.data_as(ctypes.c_void_p),
      ctypes.c_long(self.x.size),
      ctypes.c_int(self._period),
      *(t.ctypes.data_as(ctypes.c_void_p) for t in self._tables),
      ctypes.c_long(calls * self.chunk),
    )
    assert seconds >= 0, "raw_run: MPI reported an error"
    return seconds

  def value(self):
    """The value of this rank."""
    return self.x


class Xla(Scanned):
  """`lax.ppermute` over all devices; `x` holds the values of all ranks."""

  def __init__(self, graph, chunk, x, barrier):
    n, plan = graph.size, rounds(graph)
    mesh = jax.make_mesh((n,), ("rank",))
    spec = jax.P("rank")
    sharding = jax.NamedSharding(mesh, spec)

    def period(x, i):
      del i
      for offsets in plan:
        received = [
          lax.ppermute(x, "rank", [(r, (r + d) % n) for r in range(n)])
          for d, _ in offsets
        ]
        x = _mixed(x, received, offsets)
      return x

    whole = jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
    super().__init__(
      jax.shard_map(
        period, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec
      ),
      chunk,
      len(plan),
      whole,
      barrier,
    )

  def value(self):
    """The values of the ranks of this process: pairs of rank and array."""
    return [
      (shard.index[0].start or 0, np.asarray(shard.data)[0])
      for shard in self.x.addressable_shards
    ]


def _mixed(x, received, offsets):
  """x + sum_j w_j (x_j - x)."""
  terms = [
    np.float32(weight) * (y - x)
    for y, (_, weight) in zip(received, offsets, strict=True)
  ]
  return x + sum(terms[1:], terms[0])
