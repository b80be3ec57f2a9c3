"""Native memory that runs out: an error on all ranks, and no process ends by it."""

import os
import textwrap

import pytest
from support import jobs

from jfog import runtime
from jfog.runtime import _shared_memory

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
DEADLINE = 240.0  # seconds; each of these takes a few when all is quiet
MIB = 2**20

HEAD = f"""
import os, pathlib, resource, sys, time
import jax, jax.numpy as jnp, numpy as np, jfog
MIB = {MIB}
folder = pathlib.Path(os.environ["FOLDER"])
world = jfog.init(timeout=60, local_size=LOCAL)
rank, size = world.rank, world.size
graph = jfog.topology.ring(size)
x = jnp.full(64 * MIB, float(rank), jnp.float32)  # 256 MiB
jax.block_until_ready(jfog.allreduce(x[:9]))
jfog.barrier()

def limit(mebibytes):
  # Above what this process has mapped, on rank 1.
  if rank != 1:
    return
  pages = int(open("/proc/self/statm").read().split()[0])
  soft = pages * resource.getpagesize() + mebibytes * MIB
  resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

def outcome(operation):
  try:
    jax.block_until_ready(operation())
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0]
  return "no error"

def end(text):
  resource.setrlimit(
    resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  )
  print(f"rank {{rank}}: {{text}}", flush=True)
  # The launcher ends the job once a rank whose world has failed has ended.
  (folder / str(rank)).touch()
  while not all((folder / str(other)).exists() for other in range(size)):
    time.sleep(0.01)
"""

# The names of operations by the room beside the value, in MiB, and a call. XLA
# allocates the results, or of a start the placeholders, before it starts.
CALLS = {
  "neighbor_allreduce": (384, "jfog.neighbor_allreduce_start(x, graph)"),
  "allreduce": (384, "jfog.allreduce(x)"),
  "broadcast": (384, "jfog.broadcast(x)"),
  "allgather": (896, "jfog.allgather_start(x)"),
}


def run(program, folder, local_size=None):
  head = HEAD.replace("LOCAL", str(local_size))
  return jobs.run_program(
    head + textwrap.dedent(program),
    2,
    deadline=DEADLINE,
    environment={"FOLDER": str(folder)},
  )


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_without_memory_is_an_error_on_all_ranks(name, tmp_path):
  room, call = CALLS[name]
  code, out, err = run(
    f"""
    limit({room})
    text = outcome(lambda: {call})
    if text == "no error":
      text = outcome(lambda: jfog.allreduce(jnp.ones(3)))
    end(text)
  """,
    tmp_path,
  )
  lines = {line[:6]: line for line in out.splitlines()}
  assert {"rank 0", "rank 1"} <= set(lines), (code, out, err)
  assert "RESOURCE_EXHAUSTED" in lines["rank 1"], out
  assert f"jfog: {name}" in lines["rank 1"], out
  assert "on rank 1" in lines["rank 1"] and "bytes" in lines["rank 1"], out
  assert "FAILED_PRECONDITION" in lines["rank 0"], out
  assert "rank 1 has no memory" in lines["rank 0"], out


@pytest.mark.full
def test_a_service_without_memory_is_an_error_on_all_ranks(tmp_path):
  """A put to another machine is received by a thread that no caller waits in."""
  code, out, err = run(
    """
    win = jfog.win_create(x, graph)
    jfog.barrier()
    limit(64)
    if rank == 0:
      text = outcome(lambda: jfog.win_put(win, x))
    else:
      text = outcome(jfog.barrier)
    end(text)
  """,
    tmp_path,
    local_size=1,
  )
  lines = {line[:6]: line for line in out.splitlines()}
  assert {"rank 0", "rank 1"} <= set(lines), (code, out, err)
  assert "RESOURCE_EXHAUSTED" in lines["rank 1"], out
  assert "on rank 1" in lines["rank 1"] and "bytes" in lines["rank 1"], out
  assert "rank 1 has no memory" in lines["rank 0"], out


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_the_memory_of_segments_is_reserved(tmp_path):
  free = os.statvfs("/dev/shm")
  sizes = {"small": 1 << 20, "large": free.f_bavail * free.f_frsize}
  maps = tmp_path / "maps"
  paths = {}
  try:
    for name, size in sizes.items():
      paths[name] = f"/dev/shm/sm_segment.test.{os.getpid()}.{name}"
      with open(paths[name], "wb") as file:
        file.truncate(size)
    lines = [f"7f00-7f10 rw-s 0 00:1a 7  {path}" for path in paths.values()]
    maps.write_text("\n".join([*lines, "7f20-7f30 rw-p 0 00:00 0  [heap]", ""]))
    for _ in range(2):
      _shared_memory.reserve(str(maps))
    taken = {k: 512 * os.stat(path).st_blocks for k, path in paths.items()}
    assert taken["small"] >= sizes["small"] and taken["large"] == 0
  finally:
    for path in paths.values():
      os.remove(path)
  _shared_memory.reserve(str(maps))  # whose files are gone
  _shared_memory.reserve(str(tmp_path / "none"))
