"""Stuck ranks: the processes of a world's ranks, by which they are ended."""

import hashlib
import os
import struct
from collections.abc import Sequence

from jfog.runtime import _extensions
from jfog.runtime._communicator import Communicator
from jfog.runtime._process_communicator import ProcessCommunicator

# The number of a process, and a hash of where such numbers are valid.
Process = tuple[int, int]

_FORMAT = struct.Struct("<2q")


def this_process() -> Process:
  """This process, as another one sees it."""
  try:
    with open("/proc/sys/kernel/random/boot_id") as file:
      boot = file.read()
    # With another network a rank may be cut off, and is not stuck for that.
    spaces = [
      os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net")
    ]
  except OSError:  # not Linux: no other process ends this one
    return 0, 0
  digest = hashlib.blake2b(f"{boot} {spaces}".encode(), digest_size=7)
  return os.getpid(), int.from_bytes(digest.digest())


def gathered(world: ProcessCommunicator) -> list[Process]:
  """The processes of all ranks. Collective."""
  texts = _extensions.mpi().gather(world.context, _FORMAT.pack(*this_process()))
  return [_FORMAT.unpack(text) for text in texts]


def find_hangs(
  world: ProcessCommunicator, hang_timeout: float, processes: Sequence[Process]
) -> None:
  """Finds and ends stuck ranks from now on, in a world and in its parts.

  Args:
    world: the communicator.
    hang_timeout: seconds, the shortest wait for a stuck rank.
    processes: of each rank of the world.
  """
  _, here = this_process()
  numbers = [number if host == here else 0 for number, host in processes]
  machine = world.ranks_of(world.machine_rank)
  parts: list[tuple[Communicator | None, Sequence[int]]] = [
    (world, range(world.size)),
    (world.local_part, machine),
  ]
  if world.machines_part is not None:
    across = [world.ranks_of(m) for m in range(world.machine_size)]
    place = machine.index(world.rank)
    parts.append((world.machines_part, [ranks[place] for ranks in across]))
  for comm, ranks in parts:
    if isinstance(comm, ProcessCommunicator):
      _extensions.mpi().find_hangs(
        comm.context, hang_timeout, [numbers[rank] for rank in ranks]
      )
