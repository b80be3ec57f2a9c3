"""The jobs of a run: kinds in turns, each determined by the seed and its number."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from soak import faults, limits, rank, runner

DEADLINE = 120.0, 6.0  # seconds of a job of many cases, and of each of them
TIMEOUT = 60.0  # of operations where no rank is late
LATE = 6.0  # of operations where a rank is late or suspended
LATE_FAR = 12.0  # of operations where a rank is late by 90 % of it
SHARES = (0.05, 0.2, 0.9)  # of the timeout by which ranks are late
MISMATCHES = 30  # of one job
# The kinds of jobs in turns: of faults one job each, of others many cases.
TURNS = (
  *("programs", "fault", "fault", "mismatches", "fault", "suspended"),
  *("programs", "fault", "fault", "late", "fault", "mismatches"),
  *("programs", "fault", "programs", "limit", "fault", "programs"),
)


@dataclasses.dataclass(frozen=True)
class Job:
  """One job of a run.

  Attributes:
    seed: of the run.
    number: of the job in its run.
    kind: one of `TURNS`.
    count: of cases, where a job has many.
    is_long: whether long limits take part.
  """

  seed: int
  number: int
  kind: str
  count: int = 0
  is_long: bool = False

  @property
  def command(self) -> str:
    """The command that runs this job alone."""
    words = f"--seed {self.seed} --job {self.number} --kind {self.kind}"
    long = " --long" if self.is_long else ""
    return f"python tests/soak {words} --count {self.count}{long}"


def jobs(seed: int, count: int, is_long: bool) -> Iterator[Job]:
  """The jobs of a run, without end.

  Args:
    seed: of the run.
    count: of programs in a job.
    is_long: whether long limits take part.
  """
  for number in itertools.count():
    kind = TURNS[number % len(TURNS)]
    cases = {"programs": count, "mismatches": MISMATCHES}.get(kind, count // 2)
    yield Job(seed, number, kind, cases, is_long)


def _place(rng, ranks):
  """A random place of a job, and its name."""
  memory = str(rng.choice(["shared memory", "messages", "machines"]))
  local = int(rng.choice([k for k in range(1, ranks) if ranks % k == 0] or [1]))
  name = f"{ranks} ranks, {memory}"
  name += f" of {local}" if memory == "machines" else ""
  return faults.place(memory, local), name


def _many(job, arguments, ranks, place, watch=None):
  """Runs a job of many cases; returns the lines of its report."""
  environment, name = place
  deadline = DEADLINE[0] + DEADLINE[1] * job.count
  with tempfile.TemporaryDirectory() as programs:
    ended = runner.run(
      [
        *("-m", "soak.rank", *arguments, "--seed", str(job.seed)),
        *("--first", str(1000 * job.number), "--count", str(job.count)),
        *("--ranks", str(ranks)),
      ],
      ranks,
      deadline=deadline,
      environment={"JFOG_TEST_PROGRAMS": programs, **environment},
      watch=watch,
    )
  lines, problems = [], []
  for text in ended.output.splitlines():
    if text.startswith(rank.MARK):
      line = json.loads(text.removeprefix(rank.MARK))
      line["name"] = f"{name}: {line.get('name', '')}"
      if "problem" in line:
        where = f"program {line['number']}, rank {line['rank']}"
        problems.append(f"{where}: {line['problem']}")
      else:
        lines.append({"problems": [], **line})
  if ended.code is None:
    problems.append(f"did not end within {deadline:g} s")
  elif ended.code:
    problems.append(f"exit code {ended.code}")
  problems += [f"left behind: {text}" for text in ended.left]
  return lines, {
    "kind": "job",
    "name": f"{job.kind}, {name}",
    "problems": problems,
    "seconds": ended.seconds,
    "output": ended.output[-20_000:] if problems else "",
  }


def _programs(job, rng, options=(), watch=None, most=5):
  ranks = int(rng.choice([n for n in (2, 2, 3, 3, 4, 5) if n <= most]))
  lines, whole = _many(
    job, ["programs", *options], ranks, _place(rng, ranks), watch
  )
  return [*lines, whole]


def _late(job, rng):
  """Programs in which now and then one rank is late."""
  share = SHARES[job.number // len(TURNS) % (3 if job.is_long else 2)]
  timeout = LATE if share < 0.5 else LATE_FAR
  options = ["--timeout", str(timeout), "--late", str(share * timeout)]
  if share > 0.5:
    job = dataclasses.replace(job, count=min(job.count, 2))
  found = _programs(job, rng, options, most=4)
  found[-1]["name"] += f", late by {share:.0%}"
  return found


def _suspended(job, rng):
  """Programs during which one, two or all ranks are suspended now and then."""
  suspensions = []

  def watch(running):
    first = running.await_line(rank.MARK, DEADLINE[0])
    while first and running.is_running:
      pids = list(running.ranks().values())
      everyone = rng.random() < 0.4
      count = len(pids) if everyone else int(rng.integers(1, 3))
      chosen = [int(pid) for pid in rng.permutation(pids)[:count]]
      # A whole job may sleep for longer than the timeout, a rank may not.
      pause = LATE * (rng.uniform(0.2, 1.3) if everyone else 0.25)
      if not _signal(chosen, signal.SIGSTOP):
        break
      time.sleep(pause)
      _signal(chosen, signal.SIGCONT)
      suspensions.append(len(chosen))
      time.sleep(rng.uniform(0.2, 1.0))

  found = _programs(job, rng, ["--timeout", str(LATE)], watch, most=4)
  for ranks in suspensions:
    found.append(
      {"kind": "suspension", "name": f"{ranks} ranks", "problems": []}
    )
  return found


def _signal(pids, number):
  """Signals those processes that live; whether any does."""
  found = False
  for pid in pids:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)
      found = True
  return found


def _mismatches(job, rng):
  ranks = int(rng.choice([2, 3, 4]))
  lines, whole = _many(job, ["mismatches"], ranks, _place(rng, ranks))
  by_number: dict[int, list[dict[str, Any]]] = {}
  for line in lines:
    by_number.setdefault(line["number"], []).append(line)
  found = []
  for each in by_number.values():
    victim = each[0]["victim"]
    others = [
      t for line in each if line["rank"] != victim for t in line["texts"]
    ]
    problems = [
      f"rank {line['rank']}: {text}"
      for line in each
      for text in line["problems"]
    ]
    if not any(f"rank {victim}" in text for text in others):
      problems.append(f"rank {victim} is not named: {others}")
    found.append({**each[0], "problems": problems})
  return [*found, whole]


def _fault(job, rng):
  del rng
  # The cells in an order of the run's own; a second round has other victims.
  order = np.random.default_rng(job.seed).permutation(len(faults.CELLS))
  index = _ordinal(job) % len(order)
  cell = faults.CELLS[order[index]]
  return [{"kind": "fault", **faults.run(cell, (job.seed, job.number))}]


def _limit(job, rng):
  del rng
  names = list(limits.SHORT) + (list(limits.LONG) if job.is_long else [])
  name = names[_ordinal(job) % len(names)]
  return [{"kind": "limit", **limits.run(name)}]


def _ordinal(job):
  """The number of jobs of this kind before it."""
  kinds = [kind == job.kind for kind in TURNS]
  turn, place = divmod(job.number, len(TURNS))
  return turn * sum(kinds) + sum(kinds[:place])


def _many_ranks(job, rng):
  """A few programs on 16 or 32 ranks."""
  ranks = int(rng.choice([16, 32]))
  job = dataclasses.replace(job, count=3)
  environment = faults.place(str(rng.choice(["shared memory", "messages"])))
  lines, whole = _many(
    job,
    ["programs", "--timeout", "200"],
    ranks,
    (environment, f"{ranks} ranks"),
  )
  return [*lines, whole]


_KINDS: dict[str, Callable[..., list[dict[str, Any]]]] = {
  "programs": _programs,
  "late": _late,
  "suspended": _suspended,
  "mismatches": _mismatches,
  "fault": _fault,
  "limit": _limit,
  "many ranks": _many_ranks,
}
KINDS = tuple(_KINDS)
_CASES = ("programs", "windows")  # of a job of programs


def run(job: Job) -> list[dict[str, Any]]:
  """Runs a job; returns the lines of its report, each with its command."""
  rng = np.random.default_rng([job.seed, job.number])
  lines = _KINDS[job.kind](job, rng)
  for line in lines:
    if job.kind in ("late", "suspended") and line["kind"] in _CASES:
      line["kind"] = job.kind
  return [{**line, "command": job.command} for line in lines]
