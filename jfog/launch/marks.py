"""Marks of ranks in the launcher's folder: who is in init, ready, or has ended.

A mark is a file `RANK.NAME`. A rank's process leaves `entered`, and `ready` or
`failed` (jfog/runtime/_rank_process.py), a spare `spare` when it waits and `joined` when
it has a place, and `failing` when its program ends by an exception; a wrapper leaves
`begun`, and `ended` for an end without an error. `failed_at_exit` holds the error of an
operation; the others are empty.
"""

import os
import time
from collections.abc import Mapping

# Seconds after the end of a rank whose init has failed, in which it fails on the
# others as well if they had the same reason.
_FAIL_TOGETHER = 10.0


def job(environ: Mapping[str, str]) -> str:
  """The value of `JFOG_RUN_JOB`: the MPI job whose ranks leave marks.

  It keeps apart the ranks of a job that a rank starts by another launcher, which
  inherit its variables. "-" where not all ranks reach the folder of marks.
  """
  for here, all_ranks in (
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("MPI_LOCALNRANKS", "PMI_SIZE"),
  ):
    if here in environ and environ[here] == environ.get(all_ranks):
      return environ.get("PMIX_NAMESPACE", "")
  return "-"


def leave(rank: int, kind: str) -> bool:
  """Leaves a mark of a wrapper, `begun` or `ended`.

  Returns False on another host, where the launcher's folder is missing.
  """
  run_dir = os.environ.get("JFOG_RUN_DIR", "")
  if not run_dir:
    return True  # the command of --dry-run, without a launcher
  try:
    with open(os.path.join(run_dir, f"{rank}.{kind}"), "w", encoding="utf-8"):
      return True
  except OSError:
    return False


def is_failing(rank: int) -> bool:
  """Whether the program of a rank is about to end by an exception."""
  run_dir = os.environ.get("JFOG_RUN_DIR", "")
  return bool(run_dir) and os.path.exists(
    os.path.join(run_dir, f"{rank}.failing")
  )


def lost(run_dir: str) -> str:
  """Why ranks wait in init for good; "" if they do not.

  They do once a process has ended before its rank was ready: all ranks of a job
  are in its world.
  """
  ended, ready, entered, failed = (
    ranks_with(run_dir, kind)
    for kind in ("ended", "ready", "entered", "failed")
  )
  waiting = sorted(entered - ready - ended - failed)
  gone = sorted(
    rank
    for rank in ended - ready
    if rank not in failed or _age(run_dir, rank) > _FAIL_TOGETHER
  )
  if not gone or not waiting:
    return ""
  came = "in" if gone[0] in entered else "before"
  return (
    f"rank {gone[0]} ended with exit code 0 {came} jfog.init, in which "
    f"{_ranks(waiting)} waited for it"
  )


def _age(run_dir: str, rank: int) -> float:
  """The seconds since a rank has ended."""
  return time.time() - os.stat(os.path.join(run_dir, f"{rank}.ended")).st_mtime


def ranks_with(run_dir: str, kind: str) -> set[int]:
  """The ranks that have left a mark of this kind."""
  return {
    int(name.partition(".")[0])
    for name in os.listdir(run_dir)
    if name.endswith(f".{kind}")
  }


def first_end(run_dir: str) -> str:
  """The rank that ended without an error first; "" if all had one."""
  rank = _first(run_dir, "ended")
  return "" if rank is None else f"rank {rank}"


def first_failure_at_exit(run_dir: str) -> str:
  """The first rank that found a failed operation at its end, and the error."""
  rank = _first(run_dir, "failed_at_exit")
  if rank is None:
    return ""
  path = os.path.join(run_dir, f"{rank}.failed_at_exit")
  with open(path, encoding="utf-8") as file:
    return f"rank {rank} ended after an operation that failed:\n{file.read()}"


def _first(run_dir: str, kind: str) -> int | None:
  """The rank that left the first mark of this kind."""
  found = [
    (entry.stat().st_mtime_ns, int(entry.name.partition(".")[0]))
    for entry in os.scandir(run_dir)
    if entry.name.endswith(f".{kind}")
  ]
  return min(found)[1] if found else None


def _ranks(ranks: list[int]) -> str:
  """Words for one or several ranks."""
  word = "rank" if len(ranks) == 1 else "ranks"
  return f"{word} {', '.join(map(str, ranks))}"
