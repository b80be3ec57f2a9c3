"""The world in words, for the logger."""

import importlib.metadata
import logging
from collections.abc import Sequence

import jax

from jfog import _compat, _log
from jfog.runtime import _extensions
from jfog.runtime._communicator import Communicator
from jfog.runtime._process_communicator import ProcessCommunicator


def log_world(world: Communicator) -> None:
  """Logs how `init` has made the world, and applies the level to C++.

  Nothing is gathered where no handler wants it.
  """
  log = _log.logger
  if not isinstance(world, ProcessCommunicator):
    log.info("world of one, without MPI")
    return
  _log.set_rank(world.rank)
  warns = log.isEnabledFor(logging.WARNING)
  _extensions.mpi().set_warnings(warns)
  if world.backend == "nccl":
    _extensions.nccl().set_warnings(warns)
  if not log.isEnabledFor(logging.INFO):
    return
  log.info(
    "%s, local rank %d of %d, machine %d of %d, timeout %g s",
    f"world of {world.size} ranks by {world.backend}",
    world.local_rank,
    world.local_size,
    world.machine_rank,
    world.machine_size,
    world.timeout,
  )
  log.info("%s", transports(world))
  if log.isEnabledFor(logging.DEBUG):
    log.debug("MPI: %s", _extensions.mpi().library_version().partition("\n")[0])
    log.debug(
      "jax %s, jaxlib %s; weighted sums on CPU: %s; order between programs: %s",
      jax.__version__,
      importlib.metadata.version("jaxlib"),
      _extensions.mpi().weighted_sum_kernel(),
      _compat.requested_order() or "by the platform",
    )


def transports(world: ProcessCommunicator) -> str:
  """The way of arrays on CPUs, and of those on GPUs, to each rank."""
  shared = _extensions.mpi().shared_memory_ranks(world.context)
  others = [
    rank
    for rank in range(world.size)
    if rank != world.rank and rank not in shared
  ]
  ways = [f"shared memory with {_ranks(shared)}"] if shared else []
  if others:
    chunks = _extensions.mpi().chunks_in_flight(world.context)
    ways.append(
      f"MPI messages with {_ranks(others)}, {chunks} chunks in flight"
    )
  if world.backend == "nccl":
    version, path = _extensions.nccl_library()
    ways.append(f"NCCL {version} of {path} for arrays on GPUs")
  return "transports: " + ("; ".join(ways) or "none, this rank is alone")


def _ranks(ranks: Sequence[int]) -> str:
  """Ranks as ranges.

  Example:
    >>> _ranks([0, 1, 2, 5])
    'ranks 0-2, 5'
  """
  parts: list[list[int]] = []
  for rank in ranks:
    if parts and rank == parts[-1][-1] + 1:
      parts[-1].append(rank)
    else:
      parts.append([rank])
  words = [
    str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"
    for part in parts
  ]
  return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
