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

import numpy as np

from faults import rank as program
from jfog import launch

_RANK = pathlib.Path(program.__file__)
DEADLINE = 200.0  # seconds; a job takes a few when all is quiet


@dataclasses.dataclass
class Plan:
  """A job: its ranks, its graph, and who dies when."""

  ranks: int
  graph: str
  length: int
  steps: int
  on_missing: str
  kills: list

  @classmethod
  def of_seed(cls, seed, on_missing):
    """A random plan, of 3 to 6 ranks, of which at least two stay."""
    random = np.random.RandomState(seed)
    ranks = random.randint(3, 7)
    dying = random.choice(ranks, random.randint(1, ranks - 1), replace=False)
    kills = []
    for each in dying:
      when = random.choice(["step", "any"])
      if on_missing == "error" and kills and random.rand() < 0.5:
        when = "recovery"
      delay = None if when == "step" else float(random.rand() * 0.02)
      if when == "recovery":
        delay = float(random.rand() * 0.5)
      step = int(random.randint(1, 25))
      kills.append(
        {"rank": int(each), "step": step, "when": str(when), "delay": delay}
      )
    graphs = ["ring", "exponential", "one_peer_exponential"]
    return cls(
      int(ranks),
      str(random.choice(graphs)),
      int(random.choice(program.LENGTHS)),
      40,
      on_missing,
      kills,
    )


def run(plan):
  """Runs a job to its end, and checks what is left of it and its averages."""
  with tempfile.TemporaryDirectory() as folder:
    command = launch.command_line(
      ["--no-tag-output", "--fault-tolerant", "-np", str(plan.ranks)]
    )
    arguments = [folder, json.dumps(dataclasses.asdict(plan))]
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
      [*command, sys.executable, str(_RANK), *arguments],
      env={**inherited, "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=DEADLINE,
    )
    said = f"{plan}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    ended = [json.loads(text) for text in re.findall("DONE (.*)", done.stdout)]
    killed = {kill["rank"] for kill in plan.kills}
    left = {each[0] for each in ended}
    # A kill that comes late, or in a recovery that does not come, kills nothing.
    assert left >= set(range(plan.ranks)) - killed, said
    for each in killed - left:
      assert f"jfog run: rank {each} was killed by SIGKILL" in done.stderr, said
    nothing_is_left(done.stdout)
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
    assert len(ranks) == 1, said
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
