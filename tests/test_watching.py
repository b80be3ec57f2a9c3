"""Summaries, states in flight, places in warnings, and the check of programs."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

import jfog
from jfog import _compat, diagnostics
from jfog.runtime import _program_check
from jfog.runtime._summary import RankSummary, Summary

_DEADLINE = 300  # seconds, for a job on a machine that does other things


def _start(*words, program, **variables):
  command = [sys.executable, "-m", "jfog", "run", "--no-tag-output"]
  return subprocess.Popen(
    [*command, *words, sys.executable, "-c", program],
    env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _rank(rank, waited_for=()):
  waits = dict(waited_for)
  total = sum(waits.values())
  return RankSummary(rank, 10, 4000, 2_000_000, 12, 5.0, total, waits)


def test_the_slowest_rank_is_the_one_the_others_wait_for():
  ranks = (_rank(0, {2: 3.0, 1: 0.5}), _rank(1, {2: 1.0}), _rank(2, {0: 3.5}))
  summary = Summary(ranks)
  assert summary.slowest_rank == 2
  assert summary.waited_by_others(2) == 4.0
  lines = str(summary).splitlines()
  assert len({len(line) for line in lines[:4]}) == 1
  assert lines[1].split()[:6] == ["0", "10", "4", "kB", "2", "MB"]
  assert lines[1].endswith("rank 2, 3.000 s")
  assert lines[4].startswith("3 ranks, 5.0 s; the slowest is rank 2")


def test_without_waits_no_rank_is_slowest():
  summary = Summary((_rank(0), _rank(1)))
  assert summary.slowest_rank is None
  assert str(summary).endswith("2 ranks, 5.0 s")


def test_a_mesh_has_no_summary():
  with pytest.raises(ValueError, match="a mesh has no counters"):
    jfog.simulate(lambda x: diagnostics.summary() and x, 2)(jnp.zeros(2))


@pytest.mark.places("mpi")
@pytest.mark.mpi(3)
def test_a_late_rank_is_waited_for(place):
  """All ranks have the same summary, whose bytes are those of the counters."""
  ring = jfog.topology.ring(3, "right")  # from the rank before
  average = jax.jit(lambda x: jfog.neighbor_allreduce(x, ring))
  x = average(jnp.ones(10)).block_until_ready()
  diagnostics.reset_counters()
  jfog.barrier()
  if jfog.rank() == 1:
    time.sleep(0.5)
  average(x).block_until_ready()
  summary = diagnostics.summary()
  counted = diagnostics.counters()
  mine = summary.ranks[jfog.rank()]
  assert mine.bytes_sent == counted["bytes_sent"]
  assert mine.operations == counted["operations"]
  assert [each.rank for each in summary.ranks] == [0, 1, 2]
  # Of the ranks 1 sends to 2 alone.
  assert summary.slowest_rank == 1
  assert summary.ranks[2].seconds_waited_for[1] > 0.3
  assert summary.ranks[2].seconds_waited >= 0.3
  assert 2 not in summary.ranks[0].seconds_waited_for or (
    summary.ranks[0].seconds_waited_for[2] < 0.3
  )


@pytest.mark.full
def test_signal_warning_and_summary_of_a_job():
  """Rank 1 is late by more than a tenth of the timeout; meanwhile SIGUSR1 comes."""
  program = """
import pathlib, sys, time, jax.numpy as jnp, jfog
world = jfog.init(timeout=20)
ring = jfog.topology.ring(world.size)
def train(x):
  return jfog.neighbor_allreduce(x, ring)
x = train(jnp.ones(10)).block_until_ready()
print("begun", flush=True)
if world.rank == 1:
  time.sleep(6)
train(x).block_until_ready()
"""
  job = _start("-np", "3", "--summary", program=program)
  timer = threading.Timer(_DEADLINE, job.kill)
  timer.start()
  assert job.stdout is not None
  for _ in range(3):
    assert job.stdout.readline() == "begun\n"
  time.sleep(1)
  job.send_signal(signal.SIGUSR1)
  _, err = job.communicate()
  timer.cancel()
  assert job.returncode == 0, err
  waits = "neighbor_allreduce #1 on rank {} has waited"
  for rank in (0, 2):
    states = [line for line in err.splitlines() if waits.format(rank) in line]
    assert any("(1 leaf, float32 x 10)" in line for line in states), err
    # The string is the program, and its line 6 the call.
    assert all("called at <string>:6 in train" in line for line in states)
    assert all("for rank 1" in line for line in states)
  last = (
    "jfog: rank 1 of 3: the last operation started is neighbor_allreduce #0"
  )
  assert last in err
  assert "jfog: no operation is in flight" in err
  assert err.count("Stack (most recent call first)") == 3
  assert "3 ranks, " in err
  assert "the slowest is rank 1" in err


@pytest.mark.full
def test_a_handler_of_the_program_stays():
  program = """
import os, signal, time, jfog
signal.signal(signal.SIGUSR1, lambda *_: print("mine", flush=True))
jfog.init()
os.kill(os.getpid(), signal.SIGUSR1)
jfog.shutdown()
jfog.init()
"""
  job = _start("-np", "1", program=program)
  out, err = job.communicate(timeout=_DEADLINE)
  assert job.returncode == 0, err
  assert out == "mine\n"
  assert "Stack" not in err


_CHECKED = """
import jax, jax.numpy as jnp, jfog
world = jfog.init(timeout=100)
ring = jfog.topology.ring(world.size)
x = jnp.ones(10)

@jax.jit
def train_step(x):
  x = jfog.neighbor_allreduce(x, ring)
  return jax.lax.fori_loop(0, 2, lambda _, x: jfog.allreduce(x), x)

x = train_step(x)
win = jfog.win_create(x, ring)
if world.rank == 0:
  win = jfog.win_put(win, x)  # legal on one rank alone
x, win = jfog.win_update(win, x)
print("equal", flush=True)
if world.rank == 1:
  x = jax.jit(lambda x: jfog.allreduce(2 * x, "sum"))(x)
else:
  x = jax.jit(lambda x: jfog.neighbor_allreduce(x, ring))(x)
x.block_until_ready()
print("unreachable")
"""


@pytest.mark.full
def test_programs_that_differ_are_named_on_all_ranks():
  job = _start("-np", "3", "--check-programs", program=_CHECKED)
  out, err = job.communicate(timeout=_DEADLINE)
  assert job.returncode == 1
  assert out == "equal\n" * 3
  assert "check_programs: the ranks differ in program 3" in err
  assert "ranks 0, 2: <lambda> at <string>:21" in err
  assert "neighbor_allreduce of f32[10], graph=Topology(size=3" in err
  assert "rank 1: <lambda> at <string>:19, with 1 operation: allreduce" in err


def test_where_two_lists_of_operations_differ():
  texts = ["f at a.py:1\nallreduce\nbarrier"] * 2 + ["g at a.py:2\nallreduce"]
  text = _program_check._difference(texts, 7)
  assert "the ranks differ in program 7" in text
  assert (
    "ranks 0, 1: f at a.py:1, with 2 operations: allreduce; barrier" in text
  )
  assert "rank 2: g at a.py:2, with 1 operation: allreduce" in text
  assert text.endswith("They differ from operation 1 on.")


@pytest.mark.parametrize("name", ["JFOG_CHECK_PROGRAMS", "JFOG_SUMMARY"])
def test_bad_switches_are_named(monkeypatch, name):
  jfog.shutdown()
  monkeypatch.setenv(name, "yes")
  with pytest.raises(ValueError, match=f"{name}='yes' must be 0 or 1"):
    jfog.init(backend="single")


def test_a_jax_that_does_not_show_its_programs_is_refused(monkeypatch):
  _compat.report_programs(None)  # the wrapper is there from now on
  monkeypatch.setattr(_compat, "_sees_programs", False)
  with pytest.raises(RuntimeError, match="does not show the programs"):
    _compat.report_programs(print)
