"""Ranks that are alive and stuck, in jobs that go on when a rank fails."""

import json
import re

import pytest
from faults import check
from support import jobs

import jfog
from jfog import launch, runtime

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)

# A ring in which the neighbors of a stuck rank wait for it, and the others for them.
PROGRAM = """
import os, signal, time
import jax, jax.numpy as jnp, numpy as np, jfog
HOW, STUCK, STEPS, PAUSE_EVERY, PAUSE = {how!r}, {stuck}, {steps}, {every}, {pause}
world = jfog.init(timeout={timeout}, hang_timeout={hang}, on_missing={missing!r})
step, x = 0, jnp.full({size}, float(world.rank))
place, is_new = world.rank, bool(world.joined_ranks)
lost = is_new
begin = time.monotonic()
while step < STEPS:
  try:
    if lost:
      world = world if is_new else jfog.recover()
      is_new = lost = False
      step = int(jfog.allreduce(jnp.int32(step), "max"))
    graph = jfog.topology.ring(world.size)
    if place == STUCK and step == 40 and not world.launched_ranks:
      if HOW == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
      elif HOW == "sleep":
        time.sleep(600)
      elif HOW == "spin":
        while True:
          pass
    if place == STUCK and PAUSE_EVERY and step % PAUSE_EVERY == 5:
      time.sleep(PAUSE)
    time.sleep(0.005)
    average = jfog.allreduce if {collective} else (
      lambda x: jfog.neighbor_allreduce(x, graph)
    )
    x = jax.block_until_ready(average(x))
    step += 1
  except jax.errors.JaxRuntimeError as error:
    if not jfog.is_rank_failure(error):
      raise
    lost = True
print("END", place, world.size, sorted(jfog.missing_ranks()),
      round(time.monotonic() - begin, 1), flush=True)
"""


def run(ranks, *options, **values):
  """Ends of the ranks of a job, `(place, size, missing)`, and its stderr."""
  given = {"how": "", "stuck": 1, "steps": 80, "every": 0, "pause": 0.0}
  given |= {"timeout": 200.0, "hang": 1.0, "missing": "reweight", "size": 3}
  program = PROGRAM.format(**{**given, "collective": False, **values})
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", str(ranks), *options]
  )
  code, out, err = jobs.run_program(
    program, ranks, deadline=check.DEADLINE, command=command
  )
  assert code == 0, (out, err)
  ends = [
    (int(place), int(size), json.loads(missing))
    for place, size, missing in re.findall(r"END (\d+) (\d+) (\[.*?\])", out)
  ]
  return sorted(ends), err


@needs_mpi
@pytest.mark.parametrize(
  ("how", "size"),
  [("stop", 3), ("spin", 40_000)],
)
def test_averages_go_on_without_a_stuck_rank(how, size):
  ends, err = run(5, how=how, stuck=2, size=size)
  # Those that wait for the neighbors of the stuck rank are not taken for stuck.
  assert ends == [(rank, 5, [2]) for rank in (0, 1, 3, 4)], err
  assert (
    "rank 2 seems stuck, and is ended unless it answers: neighbor_allreduce #"
    in err
  )
  assert "while it waits in no operation" in err


@needs_mpi
@pytest.mark.parametrize(
  ("stuck", "options"),
  [(0, ()), (1, ("--spares", "1"))],
)
def test_a_stuck_rank_is_recovered_from(stuck, options):
  ends, err = run(
    3, *options, how="sleep", stuck=stuck, missing="error", collective=True
  )
  size = 3 if options else 2
  left = [rank for rank in range(3) if rank != stuck]
  assert [end[1:] for end in ends] == [(size, [])] * size, err
  if not options:
    assert [end[0] for end in ends] == left


@needs_mpi
def test_the_limit_adapts_to_pauses_of_the_run():
  # The first pause comes before there is a limit; the others are usual ones.
  ends, err = run(3, every=15, pause=1.5, steps=60, hang=0.5)
  assert ends == [(rank, 3, []) for rank in range(3)], err
  assert "stuck" not in err


@needs_mpi
def test_pretended_machines_and_their_parts():
  program = """
import os, signal, time
import jax, jax.numpy as jnp, jfog
world = jfog.init(local_size=2, timeout=200.0, hang_timeout=1.0)
x = jnp.ones(3) * world.rank
try:
  for step in range(200):
    if (step, world.rank) == (60, 3):
      os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.005)
    # Ranks 0 and 2 wait for 1 and 3 here, 0 and 1 for 2 and 3 below.
    x = jfog.allreduce(x, comm=world.local)
    x = jax.block_until_ready(jfog.allreduce(x, comm=world.machines))
except jax.errors.JaxRuntimeError as error:
  assert jfog.is_rank_failure(error), error
print("LEFT", world.rank, jfog.recover().size, flush=True)
"""
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", "4"]
  )
  code, out, err = jobs.run_program(
    program, 4, deadline=check.DEADLINE, command=command
  )
  assert code == 0, (out, err)
  assert sorted(out.splitlines()) == [f"LEFT {rank} 3" for rank in range(3)]
  assert err.count("seems stuck") >= 1


@pytest.mark.parametrize(
  ("value", "error", "match"),
  [
    (0.0, ValueError, "must be positive and less than timeout=300"),
    (300.0, ValueError, "must be positive and less than timeout=300"),
    ("5", TypeError, "must be a number of seconds"),
    (True, TypeError, "must be a number of seconds"),
  ],
)
def test_bad_hang_timeouts_are_named(value, error, match):
  with pytest.raises(error, match=f"hang_timeout={value!r}.*{match}"):
    jfog.init(hang_timeout=value, timeout=300)


@needs_mpi
def test_a_job_that_ends_with_its_ranks_has_none():
  program = """
import jfog
try:
  jfog.init(hang_timeout=5.0)
except RuntimeError as error:
  print(error)
"""
  code, out, err = jobs.run_program(program, 1, deadline=check.DEADLINE)
  assert code == 0, err
  assert "start it with `jfog run --fault-tolerant`" in out
