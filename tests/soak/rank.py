"""One rank of a job that runs random programs.

Reports lines of JSON after `SOAK`: on rank 0 one for each program, on each rank one
for each problem.
"""

import json
import os
import sys
import traceback

import jax

import jfog
from soak import programs, windows
from support import compilation

_KINDS = {"programs": programs.run, "windows": windows.run}


def say(**line):
  """Writes a line for the report."""
  # One call, for the ranks share the pipe.
  os.write(1, f"SOAK {json.dumps(line)}\n".encode())


def main(base: int, first: int, count: int, timeout: float, skips: str) -> None:
  """Runs programs with consecutive numbers.

  Args:
    base: the seed of the whole run.
    first: the number of the first program.
    count: of programs.
    timeout: of operations, in seconds.
    skips: the names of kinds, with commas, that are left out.
  """
  compilation.share(os.environ["JFOG_TEST_PROGRAMS"])
  world = jfog.init(timeout=timeout)
  for number in range(first, first + count):
    kind = "windows" if number % 5 == 4 else "programs"
    if kind in skips.split(","):
      continue
    where = {"kind": kind, "number": number, "rank": world.rank}
    try:
      line = _KINDS[kind]((base, number), world)
    except Exception:
      say(**where, problem=traceback.format_exc())
      raise
    for problem in line.pop("problems"):
      say(**where, problem=f"{line['name']}: {problem}")
    if world.rank == 0:
      say(**where, **line)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 1)
  base, first, count, timeout, skips = sys.argv[1:]
  main(int(base), int(first), int(count), float(timeout), skips)
