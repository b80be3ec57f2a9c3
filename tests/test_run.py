"""`jfog.run`: functions of a Python session on ranks."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from support import jobs

import jfog
from jfog import launch

DEADLINE = 120.0

try:
  launch.installed_mpi()
except RuntimeError as error:
  pytest.skip(str(error), allow_module_level=True)


def test_results_come_in_the_order_of_ranks(capsys):
  """Of a closure, with arrays and other values both ways."""
  scale = np.arange(3.0)

  def fun(offset, *, name):
    import jax.numpy as jnp

    import jfog

    world = jfog.init()
    print("here", world.rank, flush=True)
    total = jfog.allreduce(jnp.asarray(scale, jnp.float32) + world.rank, "sum")
    return {"rank": world.rank, name: total + offset}

  results = jfog.run(fun, (np.float32(1),), {"name": "y"}, np=3, timeout=100)
  assert [result["rank"] for result in results] == [0, 1, 2]
  for result in results:
    np.testing.assert_array_equal(result["y"], 3 * scale + 3 + 1)
  lines = capsys.readouterr().out.splitlines()
  assert sorted(lines) == ["[0] here 0", "[1] here 1", "[2] here 2"]


@pytest.mark.full
def test_a_failure_names_the_rank():
  def fun():
    import jfog

    if jfog.init().rank == 1:
      raise KeyError("samples")
    jfog.barrier()

  with pytest.raises(RuntimeError) as error:
    jfog.run(fun, np=2)
  text = str(error.value)
  assert "exit code 1" in text and "rank 1 failed first" in text
  assert "KeyError: 'samples'" in text


@pytest.mark.full
def test_a_timeout_and_variables():
  def fun():
    import os
    import time

    if os.environ["PATIENCE"] == "none":
      time.sleep(60)
    return os.environ["PATIENCE"]

  with pytest.raises(TimeoutError, match=r"within 3 s"):
    jfog.run(fun, np=1, timeout=3, env={"PATIENCE": "none"})
  assert jfog.run(fun, np=1, env={"PATIENCE": "some"}) == ["some"]


def test_bad_arguments():
  with pytest.raises(TypeError, match="np='two'"):
    jfog.run(print, np="two")  # type: ignore[reportArgumentType]
  with pytest.raises(TypeError, match="np=True"):
    jfog.run(print, np=True)
  with pytest.raises(ValueError, match="np=0"):
    jfog.run(print, np=0)
  with pytest.raises(ValueError, match="timeout=-1"):
    jfog.run(print, np=1, timeout=-1)
  with pytest.raises(TypeError, match="cannot be pickled"):
    jfog.run(print, (threading.Lock(),), np=1)


@pytest.mark.soak
def test_ranks_of_a_job_start_jobs_of_their_own():
  """The inner ranks are not those of the outer job."""
  code, out, err = jobs.run_program(
    """
import jfog
world = jfog.init()
def inner():
  import jfog
  return jfog.init().size
print(world.rank, jfog.run(inner, np=3), flush=True)
jfog.barrier()
""",
    2,
    deadline=DEADLINE,
  )
  assert code == 0, err
  assert sorted(out.splitlines()) == ["0 [3, 3, 3]", "1 [3, 3, 3]"]


@pytest.mark.full
def test_an_interrupt_ends_the_job():
  program = """
import signal, threading, os, time, jfog
# Ignored where a shell without job control has started the tests with "&".
signal.signal(signal.SIGINT, signal.default_int_handler)
def fun():
  import time
  print("begun", flush=True)
  time.sleep(600)
threading.Timer(8, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.time()
try:
  jfog.run(fun, np=2)
except KeyboardInterrupt:
  print("interrupted", time.time() - start < 60)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  assert done.stdout.endswith("interrupted True\n"), done.stdout + done.stderr
