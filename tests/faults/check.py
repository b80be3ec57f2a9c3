"""Runs an injected job, and compares the records of its ranks."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from faults import rank as program
from jfog import launch

_RANK = pathlib.Path(program.__file__)
DEADLINE = 200.0  # seconds; a job takes a few when all is quiet
# Errors of jobs that may fail, and texts that no job has.
CLEAN = "DEADLINE_EXCEEDED|UNAVAILABLE|SIGBUS|shared memory|No space left"
UNCLEAN = ("malformed", "AssertionError", "does not match", "INTERNAL")


@dataclasses.dataclass
class Phase:
  """Some steps of one kind, and the faults in them."""

  operation: str
  graph: str
  length: int
  faults: list[dict[str, Any]]


@dataclasses.dataclass
class Plan:
  """A job: its ranks, and what they go through."""

  ranks: int
  on_missing: str
  local_size: int | None
  timeout: float
  steps: int  # of each phase
  phases: list[Phase]
  by_peers: bool = False  # averages name their peers in place of a graph

  @classmethod
  def of_seed(cls, seed, by_peers=False):
    """A random plan, of 3 to 6 ranks, of which at least one stays."""
    random = np.random.RandomState(seed)
    plan = cls(
      ranks=int(random.randint(3, 7)),
      on_missing=("reweight", "error")[seed % 2],
      local_size=None,
      timeout=100.0,
      steps=30,
      phases=[],
      by_peers=by_peers,
    )
    divisors = [d for d in (1, 2, 3) if plan.ranks % d == 0]
    if random.rand() < 0.5:
      plan.local_size = int(random.choice(divisors))
    turn, there = random.rand(), list(range(plan.ranks))
    while len(there) > 1 and len(plan.phases) < 4:
      phase = plan._draw_phase(random, there)
      plan.phases.append(phase)
      if turn < 0.04:  # one that stands for longer than the timeout
        plan.timeout = 3.0
        phase.faults = [{**phase.faults[0], "what": "stop", "pause": 7.0}]
        break
      if turn < 0.08 and os.geteuid() == 0:
        phase.faults[0].update(what="fill")
        turn = 1.0
      for fault in phase.faults:
        if fault["what"] == "kill":
          there.remove(fault["rank"])
    return plan

  def _draw_phase(self, random, there):
    operations = ["average", "average", "windows"]
    if self.on_missing == "error":
      operations += ["allreduce", "hierarchical"]
    counts = [1, 2, len(there) // 2, len(there) - 1]
    count = min(
      int(random.choice(counts, p=[0.6, 0.2, 0.15, 0.05])), len(there) - 1
    )
    at_once, first = random.rand() < 0.4, int(random.randint(1, 20))
    faults: list[dict[str, Any]] = []
    for rank in random.choice(there, count, replace=False):
      when = str(random.choice(["step", "any"]))
      delay = None if when == "step" else float(random.rand() * 0.02)
      if self.on_missing == "error" and faults and random.rand() < 0.4:
        when, delay = "recovery", float(random.rand() * 0.3)
      step = first if at_once else int(random.randint(1, 20))
      faults.append(
        {
          "what": "kill",
          "rank": int(rank),
          "step": step,
          "when": when,
          "delay": delay,
        }
      )
      if random.rand() < 0.15:  # short of the timeout: all goes on right
        pause = float(0.05 + random.rand() * 0.4)
        faults[-1].update(what="stop", pause=pause)
    return Phase(
      operation=str(random.choice(operations)),
      graph=str(random.choice(["ring", "exponential", "one_peer_exponential"])),
      length=int(random.choice(program.LENGTHS)),
      faults=faults,
    )

  @property
  def faults(self):
    """Those of all phases."""
    return [fault for phase in self.phases for fault in phase.faults]

  @property
  def killed(self):
    """The ranks that are killed."""
    return {f["rank"] for f in self.faults if f["what"] == "kill"}

  def has(self, what):
    """Whether a fault is of this kind."""
    return any(fault["what"] == what for fault in self.faults)

  @property
  def may_fail(self):
    """Whether errors of others than `on_missing` foresees are right as well."""
    return self.timeout < 10 or self.has("fill")


def command_of(plan):
  """The command that launches the ranks of a plan."""
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", str(plan.ranks)]
  )
  if plan.has("fill"):
    # A mount of this job alone, so that no other one runs out of it. Open MPI has
    # 16 MB for each rank, which jfog reserves if as much stays free.
    size = f"{16 * plan.ranks + 48}m"
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
  return command


def run(plan):
  """Runs a job to its end, and checks what is left of it and its averages."""
  with tempfile.TemporaryDirectory() as folder:
    arguments = [folder, json.dumps(dataclasses.asdict(plan))]
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
      [*command_of(plan), sys.executable, str(_RANK), *arguments],
      env={**inherited, "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=DEADLINE,
    )
    said = f"{plan}\n{done.stdout}\n{done.stderr}"
    nothing_is_left(done.stdout)
    ended = [json.loads(text) for text in re.findall("DONE (.*)", done.stdout)]
    left = {each[0] for each in ended}
    if plan.may_fail:
      others = [r for r in range(plan.ranks) if r not in left | plan.killed]
      assert not others or re.search(CLEAN, done.stderr), said
    else:
      assert done.returncode == 0, said
      # A kill that comes late, or in a recovery that does not come, kills nothing.
      assert left >= set(range(plan.ranks)) - plan.killed, said
      for each in plan.killed - left:
        text = f"jfog run: rank {each} was killed by SIGKILL"
        assert text in done.stderr, said
    for text in UNCLEAN:
      assert text not in said, said
    check_logs(plan, pathlib.Path(folder), left, said)
  return done


def check_logs(plan, folder, left, said):
  """Checks what the ranks have written down."""
  for k, phase in enumerate(plan.phases):
    if phase.operation == "windows":
      continue
    logs = [np.full((plan.steps + 1, 2), np.nan)] * plan.ranks
    for rank in range(plan.ranks):
      if (path := folder / f"{k}-{rank}.npy").exists():
        logs[rank] = np.load(path)
    if plan.on_missing == "error":  # some may go on in a later phase
      continue
    for rank in left:
      assert np.isfinite(logs[rank][plan.steps]).all(), said
    for rank in range(plan.ranks):
      for step in range(plan.steps):
        if logs[rank][step + 1, 0] == step + 1:
          check_average(plan, phase, logs, rank, step)


def check_average(plan, phase, logs, rank, step):
  """Compares one average with those of all neighbors that can have been there."""
  matrix = program.graph_of(phase.graph, plan.ranks)[step].mixing_matrix
  own = logs[rank][step, 2:].astype(np.float64)
  got = logs[rank][step + 1, 2:]
  # In difference form the missing weight goes to the own value by itself.
  sums, maybe = own.copy(), []
  for src in np.flatnonzero(matrix[rank]):
    if src == rank or logs[src][step, 0] != step:
      continue  # it died before it sent this
    term = matrix[rank, src] * (logs[src][step, 2:] - own)
    if logs[src][step + 1, 0] == step + 1:
      sums += term
    else:
      maybe.append(term)  # it died in this step, before or after it sent
  wrong = np.full(got.shape, np.inf)
  for chosen in range(2 ** len(maybe)):
    total = sums + sum(
      (term for k, term in enumerate(maybe) if chosen >> k & 1),
      np.zeros_like(sums),
    )
    wrong = np.minimum(wrong, np.abs(total - got))
  assert wrong.max() < 1e-5, (plan, phase, rank, step, wrong.max())


def nothing_is_left(stdout):
  """Requires that no process and no segment of a job is left."""
  pids = [int(pid) for pid in re.findall(r"STARTED (\d+)", stdout)]
  files = re.findall(r"/dev/shm/\S+", stdout)
  end = time.monotonic() + 20
  while time.monotonic() < end:
    processes = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    segments = [path for path in files if os.path.exists(path)]
    if not processes and not segments:
      return
    time.sleep(0.1)
  raise AssertionError(f"left behind: {processes} {segments}")
