"""The directories of mpi.h, for C++ that tests compile."""

import pathlib
import subprocess
import sys

_FINDER = pathlib.Path(__file__).resolve().parents[2] / "cmake" / "find_mpi.py"


def folders() -> list[str]:
  """Those of the installed wheel, or else the system's; none without MPI."""
  for source in ("wheel", "system"):
    found = subprocess.run(
      [sys.executable, _FINDER, source], capture_output=True, text=True
    )
    if found.returncode == 0:
      return found.stdout.split(";")[1].split()
  return []
