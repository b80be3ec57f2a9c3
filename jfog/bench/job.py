"""One rank of a job of `jfog bench`."""

import json
import pathlib
import struct
from typing import Any

import jax
import numpy as np

from jfog import primitives, runtime, topology
from jfog.bench import measure, peers
from jfog.runtime import ProcessCommunicator

_CHECKED = 4 * 1001  # bytes, which no number of ranks divides
_FLOAT = struct.Struct("d")


class Ranks:
  """The ranks of the job, for barriers and for the slowest of them."""

  def __init__(self, world: ProcessCommunicator):
    self.rank, self.size = world.rank, world.size
    self._context = world.context

  def Barrier(self) -> None:  # the name in mpi4py
    """Waits for all ranks."""
    self.slowest(0.0)

  def slowest(self, seconds: float) -> float:
    """The largest number of all ranks."""
    gathered = runtime.mpi().gather(self._context, _FLOAT.pack(seconds))
    return max(_FLOAT.unpack(each)[0] for each in gathered)


def run(job: dict[str, Any]) -> None:
  """Times the operations of a job in turns; rank 0 writes JSON.

  Args:
    job: `cases`, a list of names and bytes; `rounds`, `target`, `result`.
  """
  world = runtime.init()
  assert isinstance(world, ProcessCommunicator)
  ranks = Ranks(world)
  found = []
  for name in dict.fromkeys(name for name, _ in job["cases"]):
    _check(name, ranks)
  for name, size in job["cases"]:
    chunk = peers.CHUNKS[size]
    all_peers = _peers(name, chunk, peers.start(ranks.rank, size // 4), ranks)
    for peer in all_peers.values():
      peer.seconds(1)  # compiles
    pilot = ranks.slowest(all_peers["jfog"].seconds(1))
    calls = measure.calls_for(pilot, job["target"])

    def step(peer: peers.Peer, calls: int = calls) -> float:
      return ranks.slowest(peer.seconds(calls)) / (calls * peer.chunk)

    times = measure.alternate(all_peers, job["rounds"], step)
    found.append({"operation": name, "bytes": size, "seconds": times})
    for peer in all_peers.values():
      if isinstance(peer, peers.Put):
        peer.free()
  if ranks.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def _peers(
  name: str, chunk: int, x: np.ndarray, ranks: Ranks
) -> dict[str, peers.Peer]:
  """The operation of this name as `jfog`, and its limits."""
  limits: dict[str, peers.Peer] = {"copy": peers.Copy(chunk, x, ranks)}
  operation, _, graph_name = name.partition(", ")
  if operation == "neighbor_allreduce":
    graph = peers.GRAPHS[graph_name](ranks.size)
    limits["raw MPI"] = peers.Raw(graph, chunk, x, ranks)
    return {"jfog": peers.Jfog(graph, chunk, x, ranks), **limits}
  if operation == "win_put":
    return {"jfog": peers.Put(chunk, x, ranks), **limits}
  limits["raw MPI"] = peers.RawAllreduce(chunk, x)

  def step(x: Any, i: Any) -> Any:
    del i
    if operation == "allreduce":
      return primitives.allreduce(x)
    return primitives.hierarchical_neighbor_allreduce(x, topology.ring(2))

  return {"jfog": peers.Operation(step, chunk, x, ranks), **limits}


def _check(name: str, ranks: Ranks) -> None:
  """Compares two steps of the operation and of raw MPI with NumPy."""
  count, steps = _CHECKED // 4, 2
  operation, _, graph_name = name.partition(", ")
  if operation == "win_put":
    return
  graph = topology.fully_connected(ranks.size)
  if operation == "neighbor_allreduce":
    graph = peers.GRAPHS[graph_name](ranks.size)
  wanted = peers.expected(graph, count, steps)[ranks.rank]
  x = peers.start(ranks.rank, count)
  for peer_name, peer in _peers(name, steps, x, ranks).items():
    if peer_name == "copy":
      continue
    peer.seconds(1)
    value: Any = peer.value()  # type: ignore[attr-defined]
    np.testing.assert_allclose(
      jax.device_get(value), wanted, 1e-5, err_msg=f"{name} by {peer_name}"
    )
