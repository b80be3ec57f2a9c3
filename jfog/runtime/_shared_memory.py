"""Allocation of the shared memory through which Open MPI sends messages."""

import contextlib
import os
import re

_SEGMENT = re.compile(r"(/dev/shm/sm_segment\S+)$", re.M)


def reserve(maps: str = "/proc/self/maps") -> None:
  """Allocates all pages of the segments of Open MPI that this process has mapped.

  Open MPI maps a sparse file of 16 MB for each rank, whose pages the kernel allocates
  in /dev/shm at their first use. If another program has filled /dev/shm by then, that
  use ends the rank by SIGBUS. So a fault-tolerant job allocates them at its start, if
  as much stays free; otherwise it leaves them sparse, since jfog's own segments are in
  /dev/shm as well.

  Args:
    maps: the file with the mappings, in the format of proc(5).
  """
  try:
    with open(maps) as file:
      paths = sorted(set(_SEGMENT.findall(file.read())))
  except OSError:  # a system without /proc
    return
  for path in paths:
    # Without the right to write it, or with no file any more: as it is.
    with contextlib.suppress(OSError):
      _allocate(path)


def _allocate(path: str) -> None:
  with open(path, "r+b") as file:
    state = os.fstat(file.fileno())
    system = os.fstatvfs(file.fileno())
    missing = state.st_size - 512 * state.st_blocks
    if 0 < 2 * missing <= system.f_bavail * system.f_frsize:
      os.posix_fallocate(file.fileno(), 0, state.st_size)
