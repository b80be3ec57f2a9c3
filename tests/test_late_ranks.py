"""Ranks that are late, and peers that wait in other operations meanwhile."""

import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jobs

import jfog
from jfog import runtime, topology

TIMEOUT = 8.0
LATE = 2.0  # seconds, a quarter of that
LONG = 300_000  # elements, several chunks

STARTS = {
  "collective": lambda x: jfog.allreduce_start(x),
  "exchange": lambda x: jfog.neighbor_allreduce_start(
    x, topology.fully_connected(jfog.size())
  ),
  "machines": lambda x: jfog.hierarchical_neighbor_allreduce_start(
    x, topology.fully_connected(jfog.machine_size())
  ),
}


@pytest.mark.places("mpi-3")
@pytest.mark.host("NCCL runs operations in the order of their start")
@pytest.mark.parametrize("name", STARTS)
def test_handles_in_another_order_beside_a_late_rank(place, name):
  """A later number of a peer proves nothing: it waits on another handle."""
  jfog.shutdown()
  jfog.init(timeout=TIMEOUT)
  rank, start = jfog.rank(), STARTS[name]
  wait = jax.jit(jfog.wait)
  # Compiled by all before one of them is late.
  np.testing.assert_allclose(wait(start(jnp.ones(LONG))), 1)
  if rank == 2:
    time.sleep(LATE)
  handles = [start(jnp.full(LONG, float(rank + k))) for k in range(3)]
  for k in ([0, 1, 2], [2, 1, 0], [1, 0, 2])[rank]:
    np.testing.assert_allclose(wait(handles[k]), k + 1.0, rtol=1e-6)
  jfog.shutdown()
  jfog.init(timeout=60)


HEAD = """
import time
import jax, jax.numpy as jnp, numpy as np, jfog
from jfog import topology
world = jfog.init(timeout=TIMEOUT, local_size=LOCAL)
rank, size = world.rank, world.size
ring = topology.ring(size)
"""


def run(program, *, timeout=TIMEOUT, local_size=None, **variables):
  head = HEAD.replace("TIMEOUT", str(timeout)).replace("LOCAL", str(local_size))
  return jobs.run_program(
    head + textwrap.dedent(program), 3, deadline=120, environment=variables
  )


needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)


@needs_mpi
def test_a_peer_that_has_passed_by_is_a_mismatch():
  """It waits in a later operation, and its header of this one differs."""
  code, out, err = run("""
    jfog.barrier()
    if rank == 0:
      run = lambda: jfog.neighbor_allreduce(jnp.ones(3), ring)
    else:
      peers = jfog.Peers(0.5, {3 - rank: 0.5}, [3 - rank])
      jax.block_until_ready(jfog.neighbor_allreduce(jnp.ones(3), peers))
      run = lambda: jfog.allreduce(jnp.ones(3))
    start = time.monotonic()
    try:
      jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:
      print(f"rank {rank}:", str(error).splitlines()[0], flush=True)
    waited = time.monotonic() - start
    print(f"rank {rank} waited {waited}", flush=True)
    time.sleep(1)
  """)
  texts = {line[:6]: line for line in out.splitlines() if ": " in line[:8]}
  assert "rank 0" in texts, (code, out, err)
  assert "FAILED_PRECONDITION" in texts["rank 0"], out
  assert "neighbor_allreduce #1 on rank 0" in texts["rank 0"], out
  assert "does not match rank" in texts["rank 0"], out


@needs_mpi
@pytest.mark.parametrize(
  "operation",
  ["exchange", pytest.param("machines", marks=pytest.mark.soak)],
)
def test_chunks_of_operations_with_one_tag_are_not_swapped(operation):
  """Tags repeat. An operation waits until the ones before it with its tag end.

  Rank 0 cannot receive the chunks of its first operation before rank 2 comes,
  while rank 1 has sent them and goes on.
  """
  average = {
    "exchange": "jfog.neighbor_allreduce_start(x, "
    "topology.fully_connected(size))",
    "machines": "jfog.hierarchical_neighbor_allreduce_start(x, "
    "topology.fully_connected(size))",
  }[operation]
  code, out, err = run(
    f"""
    start = jax.jit(lambda x: {average})
    pair = jax.jit(lambda x: jfog.neighbor_allreduce_start(
      x, jfog.Peers(0.5, {{1 - rank: 0.5}}, [1 - rank], check=False)
      if rank < 2 else jfog.Peers(1.0, {{}}, [], check=False)))
    wait = jax.jit(jfog.wait)
    x = jnp.full(300_000, float(rank))
    for f in (start, pair):
      jax.block_until_ready(wait(f(x)))
    jfog.barrier()
    if rank == 2:
      time.sleep(2)
    handles = []
    for k in range(4):
      handles.append((start(x + k), k + 1.0))
      handles.append((pair(x - k), (0.5 if rank < 2 else 2.0) - k))
    for handle, value in handles:
      y = wait(handle)
      np.testing.assert_allclose([y.min(), y.max()], value, rtol=1e-6)
    jfog.barrier()
    print("RIGHT", flush=True)
    """,
    timeout=60,
    local_size=1,
    JFOG_TEST_CHUNK_TAGS="1",
  )
  assert code == 0, (out, err)
  assert out.count("RIGHT") == 3, (out, err)


@needs_mpi
@pytest.mark.full
@pytest.mark.parametrize(
  "memory", ["1", pytest.param("0", marks=pytest.mark.soak)]
)
def test_ranks_that_are_suspended_do_not_wait_for_a_mutex(memory):
  """All are suspended for longer than the timeout, while one waits for another."""
  code, out, err = run(
    """
    import os, subprocess
    win = jfog.win_create(jnp.ones(3), ring)
    pids = np.asarray(jfog.allgather(jnp.array([os.getpid()], jnp.int32)))
    jfog.barrier()
    jax.effects_barrier()
    if rank == 1:
      with jfog.win_mutex(win, [0]):
        time.sleep(0.5)
        names = " ".join(map(str, pids))
        subprocess.run(
          ["sh", "-c", f"kill -STOP {names}; sleep 8; kill -CONT {names}"])
        time.sleep(1)
    else:
      time.sleep(0.3)
      with jfog.win_mutex(win, [0]):
        print("TAKEN", time.monotonic(), flush=True)
    jfog.barrier()
    jfog.win_free(win)
    """,
    timeout=5.0,
    JFOG_SHARED_MEMORY=memory,
  )
  assert code == 0, err
  assert out.count("TAKEN") == 2, out
