"""The table of faults and moments, and the ends that are expected of their jobs."""

import dataclasses
import re
import time
from typing import Any

import numpy as np

from soak import fault_rank, runner

FAULTS = (
  *("kill", "stop", "exception", "os._exit(0)", "os._exit(3)", "sys.exit(0)"),
)
MOMENTS = (
  *("before init", "in init", "between", "small exchange", "large exchange"),
  *("collective", "window", "mutex", "handle", "before finalize", "finalize"),
)
TIMEOUT = 3.0  # of operations, in seconds
DEADLINE = 90.0  # of a job; it takes a few seconds when all is quiet
ENDS_WITHIN = 40.0  # seconds from the fault to the end, the suspension included
CELLS = tuple((fault, moment) for moment in MOMENTS for fault in FAULTS)

# Exit codes of the launcher; None for any but 0.
_CODES = {"kill": 128 + 9, "exception": 1, "os._exit(3)": 3}
# These end right: all operations of all ranks are behind them.
_HARMLESS = {
  ("sys.exit(0)", "finalize"),
  ("sys.exit(0)", "before finalize"),
  ("exception", "finalize"),
  ("exception", "before finalize"),
  ("stop", "finalize"),
  ("os._exit(0)", "finalize"),
}
# Either end: a rank that sleeps in its last operation is late, or too late.
_EITHER = {("stop", "before finalize")}


@dataclasses.dataclass
class Case:
  """One cell of the table, with the ranks and the place of the job."""

  fault: str
  moment: str
  ranks: int
  victim: int
  memory: str

  def __str__(self):
    return (
      f"{self.fault} of rank {self.victim} of {self.ranks}, {self.moment}, "
      f"{self.memory}"
    )


def case(cell: tuple[str, str], seed: tuple[int, ...]) -> Case:
  """The case of a cell that a seed determines."""
  rng = np.random.default_rng(seed)
  ranks = int(rng.choice([2, 2, 3, 4]))
  memory = str(rng.choice(["shared memory", "messages", "machines"]))
  return Case(*cell, ranks, int(rng.integers(ranks)), memory)


def place(memory: str, local_size: int = 1) -> dict[str, str]:
  """The variables of a job: shared memory, messages, or pretended machines."""
  return {
    "shared memory": {},
    "messages": {"JFOG_SHARED_MEMORY": "0"},
    "machines": {"JFOG_LOCAL_SIZE": str(local_size)},
  }[memory]


def _end_problems(case: Case, ended: runner.Ended) -> list[str]:
  """How the end of a job differs from the expected one."""
  problems = []
  cell = case.fault, case.moment
  if ended.code is None:
    return [f"did not end within {DEADLINE:g} s"]
  if fault_rank.FELL not in ended.output:
    problems.append("the fault did not happen")
  if cell in _HARMLESS:
    if ended.code != 0:
      problems.append(f"exit code {ended.code} instead of 0")
  elif cell not in _EITHER:
    code = _CODES.get(case.fault)
    if ended.code == 0 or (code is not None and ended.code != code):
      wanted = "one that is not 0" if code is None else str(code)
      problems.append(f"exit code {ended.code} instead of {wanted}")
    if not re.search(rf"\branks? \[?(\d+, )*{case.victim}\b", ended.output):
      problems.append(f"rank {case.victim} is not named")
  return problems


def run(cell: tuple[str, str], seed: tuple[int, ...]) -> dict[str, Any]:
  """Runs one case; returns its line of the report."""
  one = case(cell, seed)
  ended = runner.run(
    [
      *("-m", "soak.fault_rank", one.moment, one.fault),
      *(str(one.victim), str(TIMEOUT)),
    ],
    one.ranks,
    deadline=DEADLINE,
    environment=place(one.memory),
  )
  now = time.time()
  problems = _end_problems(one, ended)
  if fault_rank.WRONG in ended.output:
    problems.append("a wrong number")
  for sign in ("terminate called", "Fatal Python error", "Segmentation"):
    if sign in ended.output:
      problems.append(f"{sign!r} in the output")
  problems += [f"left behind: {text}" for text in ended.left]
  fell = [
    float(t) for t in re.findall(rf"{fault_rank.FELL} ([\d.]+)", ended.output)
  ]
  # The end was before `now` by what the search for remains took.
  if (
    fell
    and ended.code is not None
    and now - fell[0] > ENDS_WITHIN + runner.PATIENCE
  ):
    problems.append(f"ended {now - fell[0]:.1f} s after the fault")
  return {
    "name": str(one),
    "problems": problems,
    "seconds": ended.seconds,
    "output": ended.output if problems else "",
  }
