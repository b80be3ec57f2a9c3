"""Checkpoints of orbax: a killed training goes on, on any number of ranks."""

import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import jobs

from jfog import launch, runtime

EXAMPLE = (
  pathlib.Path(__file__).resolve().parents[1] / "examples/checkpoints.py"
)
DEADLINE = 300.0  # seconds; a job takes about ten when all is quiet
needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)


def command(ranks, folder, steps):
  return [
    *launch.command_line(["--no-tag-output", "-np", str(ranks)]),
    *(sys.executable, str(EXAMPLE), "--folder", str(folder)),
    *("--steps", str(steps), "--every", "10"),
  ]


def train(ranks, folder, steps):
  """Runs the example to its end; returns what it printed."""
  return jobs.printed(command(ranks, folder, steps), deadline=DEADLINE)


def steps(path):
  """The steps that a process has saved."""
  return ocp.utils.checkpoint_steps(path) if path.exists() else []


def saved(job, step):
  """The state that all processes of a job have saved, ranks along axis 0."""
  trees = []
  for path in sorted(job.iterdir()):
    with ocp.CheckpointManager(path) as checkpoints:
      args = ocp.args.StandardRestore()
      trees.append(checkpoints.restore(step, args=args))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def ranks_of(folder):
  """The processes of a training into a folder, by their command lines."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_text().split("\0")
    except OSError:  # it has ended meanwhile
      continue
    if words[1:2] == [str(EXAMPLE)] and str(folder) in words:
      found.append(int(path.parent.name))
  return found


@needs_mpi
def test_a_killed_training_goes_on(tmp_path, soak):
  """On 4 ranks bit for bit, on 2 and 8 from the mean of the models."""
  others = (2, 8) if soak else (2,)  # 8 also below, on virtual ranks
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  job = killed / "4ranks-4processes"
  running = subprocess.Popen(
    command(4, killed, 1_000_000),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  end = time.monotonic() + DEADLINE
  while not any(step >= 30 for step in steps(job / "process2")):
    assert running.poll() is None
    assert time.monotonic() < end
    time.sleep(0.05)
  os.kill(ranks_of(killed)[0], signal.SIGKILL)
  assert running.wait(DEADLINE) == 128 + signal.SIGKILL
  assert not ranks_of(killed)
  common = set.intersection(*(set(steps(p)) for p in job.iterdir()))
  last = max(common)
  for ranks in others:
    shutil.copytree(killed, tmp_path / f"on{ranks}")

  text = train(4, killed, last + 20)
  assert f"goes on after step {last} of 4ranks-4processes" in text
  assert "goes on" not in train(4, whole, last + 20)
  jax.tree.map(
    np.testing.assert_array_equal,
    saved(job, last + 20),
    saved(whole / job.name, last + 20),
  )

  old = saved(tmp_path / "on2" / job.name, last)
  for ranks in others:
    text = train(ranks, tmp_path / f"on{ranks}", last + 10)
    assert f"goes on after step {last} of 4ranks-4processes" in text
    here = tmp_path / f"on{ranks}" / f"{ranks}ranks-{ranks}processes"
    new = saved(here, last)
    for name, values in old["params"].items():
      mean = values.mean(axis=0, dtype=np.float64)
      assert new["params"][name].shape == (ranks, *values.shape[1:])
      for own in new["params"][name]:
        np.testing.assert_allclose(own, mean, rtol=0, atol=1e-7)
    assert not np.array_equal(
      saved(here, last + 10)["params"]["out"], new["params"]["out"]
    )


def run_here(monkeypatch, capsys, *arguments):
  """Runs the example in this process; returns its names and what it printed."""
  monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
  names = runpy.run_path(str(EXAMPLE))
  return names, capsys.readouterr().out


@pytest.mark.parametrize(
  ("optimizer", "ranks"),
  [("choco", 2), ("gradient_tracking", 8), ("relay_sum", 8)],
)
def test_states_of_the_old_graph_are_made_anew(
  tmp_path, monkeypatch, capsys, optimizer, ranks
):
  """The state of the inner optimizer is kept, the others are those of `init`."""
  arguments = ("--optimizer", optimizer, "--folder", tmp_path, "--every", 40)
  run_here(monkeypatch, capsys, *arguments, "--ranks", 4, "--steps", 40)
  old = saved(tmp_path / "4ranks-1processes", 40)
  names, text = run_here(
    monkeypatch, capsys, *arguments, "--ranks", ranks, "--steps", 40 + 80
  )
  assert "goes on after step 40 of 4ranks-1processes" in text
  folder = tmp_path / f"{ranks}ranks-1processes"
  with ocp.CheckpointManager(folder / "process0") as checkpoints:
    args = ocp.args.StandardRestore(names["state"])
    new = checkpoints.restore(40, args=args)
  fresh = names["init"](new["params"])["opt_state"]
  inner_state = new["opt_state"].inner_state
  jax.tree.map(
    np.testing.assert_array_equal,
    new["opt_state"],
    fresh._replace(inner_state=inner_state),
  )
  moment = old["opt_state"]["inner_state"][0]["mu"]["out"].mean(axis=0)
  for own in inner_state[0].mu["out"]:
    np.testing.assert_allclose(own, moment, rtol=1e-4, atol=1e-7)
  assert set(np.asarray(inner_state[0].count)) == {40}
  assert float(re.findall(r"([\d.]+) %", text)[0]) > 40  # chance: 10
