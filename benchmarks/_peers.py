"""Implementations of the neighbor average: jfog, raw MPI, mpi4py, mpi4jax, XLA.

A peer holds one rank's array `x`, jfog's any pytree, and averages it in place. All are given the
same graphs, and all sum in the form x + sum_j w_j (x_j - x). Every graph here is
circulant: in each of its rounds rank r receives from r - d for some offsets d,
the same on all ranks.
"""

import time

import jax
import numpy as np
from jax import lax

import jfog
from jfog.bench.peers import GRAPHS as GRAPHS
from jfog.bench.peers import Jfog as Jfog
from jfog.bench.peers import Raw as Raw
from jfog.bench.peers import Scanned as Scanned
from jfog.bench.peers import expected as expected
from jfog.bench.peers import rounds as rounds
from jfog.bench.peers import start as start
from jfog.bench.peers import starts as starts


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
