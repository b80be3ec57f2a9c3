"""One rank of a job that runs many cases from consecutive seeds.

Reports lines of JSON after `SOAK`: on rank 0 one for each case, on each rank one for
each problem.
"""

import argparse
import json
import os
import pathlib
import time
import traceback

import jax
import numpy as np
from support import compilation

import jfog
from soak import fault_rank, mismatches, programs, windows

MARK = "SOAK "
_SHOWN = 3  # problems of one program
PATIENCE = 120.0  # seconds that ranks wait for each other between worlds


def say(**line):
  """Writes a line for the report."""
  fault_rank.say(MARK + json.dumps(line))


def pauses(seed: tuple[int, ...], rank: int, ranks: int, seconds: float):
  """A function that now and then delays one rank, all ranks at the same place."""
  rng = np.random.default_rng([*seed, 7])

  def pause():
    late = int(rng.integers(2 * ranks))
    if late == rank:
      time.sleep(seconds)

  return pause


def _meet(number: int, rank: int, ranks: int) -> None:
  """Waits for all ranks, by files."""
  folder = pathlib.Path(os.environ["JFOG_SOAK_FOLDER"], "own")
  (folder / f"done-{number}-{rank}").touch()
  end = time.monotonic() + PATIENCE
  while any(not (folder / f"done-{number}-{r}").exists() for r in range(ranks)):
    if time.monotonic() > end:
      raise TimeoutError(f"the ranks did not all come to the end of {number}")
    time.sleep(0.01)


def _run_mismatches(options):
  rank = fault_rank.rank_in_job()
  for number in range(options.first, options.first + options.count):
    line = mismatches.run((options.seed, number))
    say(kind="mismatches", number=number, rank=rank, **line)
    _meet(number, rank, options.ranks)


def _run_programs(options):
  world = jfog.init(timeout=options.timeout)
  runs = {"programs": programs.run, "windows": windows.run}
  for number in range(options.first, options.first + options.count):
    seed = options.seed, number
    kind = "windows" if number % 5 == 4 else "programs"
    where = {"kind": kind, "number": number, "rank": world.rank}
    pause = None
    if options.late:
      pause = pauses(seed, world.rank, world.size, options.late)
    try:
      line = runs[kind](seed, world, pause)
    except Exception:
      say(**where, problem=traceback.format_exc())
      raise
    for problem in line.pop("problems")[:_SHOWN]:
      say(**where, problem=f"{problem}, in {line['name']}")
    if world.rank == 0:
      say(**where, **line)


def main() -> None:
  """Runs the cases of the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("kind", choices=("programs", "mismatches"))
  parser.add_argument("--seed", type=int, required=True)
  parser.add_argument("--first", type=int, required=True)
  parser.add_argument("--count", type=int, required=True)
  parser.add_argument("--ranks", type=int, required=True)
  parser.add_argument("--timeout", type=float, default=60.0)
  parser.add_argument("--late", type=float, default=0.0)
  options = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 1)
  if folder := os.environ.get("JFOG_TEST_PROGRAMS"):
    compilation.share(folder)
  fault_rank.note_process()
  run = _run_mismatches if options.kind == "mismatches" else _run_programs
  run(options)


if __name__ == "__main__":
  main()
