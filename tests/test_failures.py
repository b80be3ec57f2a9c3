"""Jobs in which a rank dies or errs: they end soon, with a plain message."""

import re
import textwrap
import time

import pytest
from support import jobs

from jfog import launch, runtime

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
DEADLINE = 120.0  # seconds; each of these takes a few when all is quiet
ENDS_WITHIN = 10.0  # from the moment at which a rank dies

HEAD = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np, jfog
world = jfog.init()
rank, size = world.rank, world.size
graph = jfog.topology.ring(size)
average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
x = average(jnp.ones(1000)).block_until_ready()
jfog.barrier()
def falls():
  print("FALLS", time.time(), flush=True)
"""


def run(program, ranks=3, head=HEAD, command=None):
  """Runs a program on ranks; returns code, stdout, stderr and the end time."""
  program = head + textwrap.dedent(program)
  done = jobs.run_program(program, ranks, deadline=DEADLINE, command=command)
  return *done, time.time()


def seconds_after(stdout, end):
  """How long the job went on after a rank fell."""
  return end - min(float(t) for t in re.findall(r"FALLS ([\d.]+)", stdout))


def test_an_exception_on_one_rank():
  code, out, err, end = run("""
    for k in range(1000):
      x = average(x)
      if rank == 1 and k == 5:
        falls()
        raise RuntimeError("the data of rank 1 is broken")
    x.block_until_ready(); time.sleep(100)
  """)
  assert code == 1
  assert seconds_after(out, end) < ENDS_WITHIN
  last = err.strip().splitlines()[-1]
  assert last == "RuntimeError: the data of rank 1 is broken"
  assert "jfog run: rank 1 failed first" in err


def test_sigkill_on_one_rank():
  code, out, err, end = run("""
    if rank == 2:
      falls()
      os.kill(os.getpid(), signal.SIGKILL)
    while True:
      x = average(x).block_until_ready()
  """)
  assert code == 128 + 9
  assert seconds_after(out, end) < ENDS_WITHIN
  assert "rank 2 was killed by SIGKILL" in err


def test_sys_exit_on_one_rank_while_others_wait():
  code, out, err, end = run("""
    if rank == 0:
      falls()
      sys.exit(3)
    average(x).block_until_ready()
  """)
  assert code != 0
  assert seconds_after(out, end) < ENDS_WITHIN
  assert "rank 0, which has already ended" in err


def test_a_rank_that_ends_early_is_named():
  code, out, err, end = run("""
    if rank == 1:
      falls()
    else:
      jfog.allreduce(x).block_until_ready()
  """)
  assert code == 1
  assert seconds_after(out, end) < ENDS_WITHIN
  assert re.search(r"ABORTED: jfog: allreduce #\d+ on rank \d", err)
  assert "rank 1, which has already ended" in err


def test_ranks_may_end_at_different_times():
  code, out, err, _ = run("""
    time.sleep(rank)
    print("DONE", flush=True)
  """)
  assert code == 0, err
  assert out.count("DONE") == 3


SUSPENDED = {
  "the waiting rank": (300.0, "kill -STOP {0}; sleep 3; kill -CONT {0}"),
  "all ranks": (2.0, "kill -STOP {0} {1}; sleep 4; kill -CONT {0} {1}"),
}


@pytest.mark.parametrize("memory", ["shared memory", "messages"])
@pytest.mark.parametrize("who", SUSPENDED)
def test_a_rank_that_is_suspended_is_late_and_not_wrong(who, memory):
  """Also where the other rank has ended meanwhile, or for longer than the timeout."""
  timeout, commands = SUSPENDED[who]
  code, out, err, _ = run(
    f"""
    import subprocess
    jfog.shutdown()
    jfog.init(timeout={timeout})
    pids = jfog.allgather(jnp.array([os.getpid()], jnp.int32))
    if rank == 1:
      time.sleep(0.5)  # rank 0 waits
      subprocess.Popen(["sh", "-c", {commands!r}.format(*pids)])
      time.sleep(1)
    y = average(jnp.full(3, float(rank))).block_until_ready()
    print("MEAN", y[0], flush=True)
    """,
    ranks=2,
    command=[
      *("env", f"JFOG_SHARED_MEMORY={int(memory == 'shared memory')}"),
      *launch.command_line(["--no-tag-output", "-np", "2"]),
    ],
  )
  assert code == 0, err
  assert out.count("MEAN 0.5") == 2


def test_operations_under_way_at_the_end_are_finished():
  code, _, err, _ = run("""
    for k in range(50):
      x = average(x)
  """)
  assert code == 0, err


@pytest.mark.parametrize(
  ("program", "error"),
  [
    (
      "jfog.neighbor_allreduce(x, jfog.topology.ring(size + 1))",
      "ValueError: neighbor_allreduce: the graph has 4 ranks",
    ),
    (
      "jfog.shutdown(); jfog.neighbor_allreduce(x, graph)",
      "jfog.runtime._communicator.NotInitializedError: there is no",
    ),
  ],
)
def test_wrong_input_ends_the_job_with_its_error(program, error):
  code, _, err, _ = run(program)
  assert code == 1
  assert err.count("Traceback") == 1
  assert err.strip().splitlines()[-1].startswith(error)


def test_plain_mpirun_works():
  mpi = launch.installed_mpi()
  flags = ["--allow-run-as-root", "--oversubscribe"]
  command = [mpi.launcher, *(flags if mpi.family == "openmpi" else [])]
  code, out, err, _ = run(
    "print('SUM', float(jfog.allreduce(jnp.float32(rank), 'sum')), flush=True)",
    command=[*command, "-np", "3"],
  )
  assert code == 0, err
  assert out.count("SUM 3.0") == 3


def test_one_thread_is_enough():
  code, _, err, _ = run(
    """
    assert os.environ["NPROC"] == "1"
    y = jax.jit(lambda x: jfog.allreduce(x @ x))(jnp.ones((300, 300)))
    assert float(y[0, 0]) == 300
    """,
    command=[
      "env",
      "NPROC=1",
      *launch.command_line(["--no-tag-output", "-np", "3"]),
    ],
  )
  assert code == 0, err
