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
class Plan:
  """A job: its ranks, what they do, and what befalls whom when."""

  ranks: int
  graph: str
  length: int
  steps: int
  on_missing: str
  operation: str
  local_size: int | None
  timeout: float
  faults: list

  @classmethod
  def of_seed(cls, seed):
    """A random plan, of 3 to 5 ranks, of which at least one stays."""
    random = np.random.RandomState(seed)
    on_missing = ("reweight", "error")[seed % 2]
    ranks = int(random.randint(3, 6))
    operations = ["average", "windows"]
    if on_missing == "error":
      operations += ["allreduce"] + ["hierarchical"] * (ranks == 4)
    operation = str(random.choice(operations))
    local_size = [None, 1][random.randint(2)]
    if operation == "hierarchical":
      local_size = 2
    counts = {"one": 1, "two": 2, "half": ranks // 2, "all but one": ranks - 1}
    who = random.choice(list(counts), p=[0.4, 0.3, 0.2, 0.1])
    victims = random.choice(ranks, counts[who], replace=False)
    at_once = random.rand() < 0.4
    first = int(random.randint(1, 25))
    faults: list[dict[str, Any]] = []
    for each in victims:
      when = str(random.choice(["step", "any"]))
      if on_missing == "error" and faults and random.rand() < 0.4:
        when = "recovery"
      delay = None if when == "step" else float(random.rand() * 0.02)
      if when == "recovery":
        delay = float(random.rand() * 0.3)
      step = first if at_once else int(random.randint(1, 25))
      faults.append(
        {
          "what": "kill",
          "rank": int(each),
          "step": step,
          "when": when,
          "delay": delay,
        }
      )
    timeout, turn = 100.0, random.rand()
    if turn < 0.15:  # short of the timeout: all goes on right
      faults[0].update(what="stop", pause=float(0.05 + random.rand() * 0.4))
    elif turn < 0.18:  # longer than it: an error
      timeout = 3.0
      faults = [{**faults[0], "what": "stop", "pause": 7.0}]
    elif turn < 0.22 and os.geteuid() == 0:
      faults[0].update(what="fill")
    graphs = ["ring", "exponential", "one_peer_exponential"]
    return cls(
      ranks,
      str(random.choice(graphs)),
      int(random.choice(program.LENGTHS)),
      40,
      on_missing,
      operation,
      local_size,
      timeout,
      faults,
    )

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
    # A mount of this job alone, so that no other one runs out of it.
    mount = 'mount -t tmpfs -o size=48m tmpfs /dev/shm && exec "$@"'
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
    if plan.operation == "windows":
      return done
    logs = [
      np.load(pathlib.Path(folder) / f"{rank}.npy")
      for rank in range(plan.ranks)
    ]
  if plan.on_missing == "reweight":
    for rank in range(plan.ranks):
      for step in range(plan.steps):
        if logs[rank][step + 1, 0] == step + 1:
          check_average(plan, logs, rank, step)
  else:
    ranks = {tuple(launched) for _, launched, _ in ended}
    assert len(ranks) == 1 or plan.may_fail, said
    last = [logs[rank][plan.steps, 2:] for rank in sorted(left)]
    assert all(np.isfinite(x).all() for x in last), said
  return done


def check_average(plan, logs, rank, step):
  """Compares one average with those of all neighbors that can have been there."""
  matrix = program.graph_of(plan.graph, plan.ranks)[step].mixing_matrix
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
  assert wrong.max() < 1e-5, (plan, rank, step, wrong.max())


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
