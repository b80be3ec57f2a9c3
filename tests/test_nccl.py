"""NCCL without a GPU: its library, how it is missed, and jfog on an emulation."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import emulated
import pytest

import jfog.runtime
from jfog import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE = 300  # seconds; a quiet machine needs a tenth of it


def run(program, *, ranks=0, **environment):
  """What a program prints, and its exit code; on ranks if there are any."""
  command = launch.command_line(["-np", str(ranks)]) if ranks else []
  done = subprocess.run(
    [*command, sys.executable, "-c", textwrap.dedent(program)],
    env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment},
    cwd=ROOT / "tests",
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=DEADLINE,
  )
  return done.stdout, done.returncode


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
  """The emulation of NCCL and of the CUDA driver."""
  return emulated.build(tmp_path_factory.mktemp("emulation"))


def opened(path):
  return f"""
    from jfog import _nccl
    try:
      _nccl.open_nccl({str(path)!r})
      print("opened", _nccl.version(), _nccl.path())
    except RuntimeError as error:
      print("refused", error)
    """


def test_the_library_of_the_wheel_opens():
  """And its version is the one that it says itself."""
  output, _ = run("""
    import ctypes, jfog.runtime
    version, path = jfog.runtime.nccl_library()
    own = ctypes.c_int()
    assert ctypes.CDLL(path).ncclGetVersion(ctypes.byref(own)) == 0
    print("found", version, own.value, path)
    """)
  found = re.search(r"found (\d+)\.(\d+)\.(\d+) (\d+) (.*)", output)
  assert found, output
  major, minor, patch, number = map(int, found.groups()[:4])
  assert number == 10_000 * major + 100 * minor + patch
  assert (major, minor) >= (2, 18)
  assert found[5].endswith("/libnccl.so.2") and "nvidia" in found[5]


def test_the_library_that_is_loaded_comes_first(emulation, tmp_path):
  """It is the one that JAX uses."""
  library = tmp_path / "libnccl.so.2"
  library.write_bytes(emulation.read_bytes())
  output, _ = run(f"""
    import ctypes
    ctypes.CDLL({str(library)!r})
    import jfog.runtime
    print(*jfog.runtime.nccl_library())
    """)
  assert str(library) in output


def test_an_old_library_is_refused_with_both_versions(emulation):
  output, _ = run(opened(emulation), JFOG_EMULATION_VERSION="21705")
  assert "refused" in output and "2.17.5" in output and "2.18" in output
  output, _ = run(opened(emulation), JFOG_EMULATION_VERSION="21800")
  assert "opened 21800" in output


def test_a_missing_library_is_named(tmp_path):
  output, _ = run(opened(tmp_path / "libnccl.so.2"))
  assert "refused jfog:" in output and str(tmp_path) in output
  output, _ = run("""
    from jfog import _nccl
    try:
      _nccl.open_cuda("no-such-driver.so")
    except RuntimeError as error:
      print("refused", error)
    """)
  assert "refused jfog:" in output and "no-such-driver.so" in output


def test_no_library_at_all():
  """Where the loader finds none, the text says what would bring one."""
  output, _ = run(
    """
    import jfog.runtime._native as native
    native._nccl_path = lambda: ""
    try:
      print("found", native.nccl_library())
    except RuntimeError as error:
      print("refused", error)
    """,
  )
  assert "found" in output or ("pip install" in output and "nccl" in output)


def test_missing_functions_are_named(tmp_path):
  source = tmp_path / "nccl.cc"
  source.write_text(
    'extern "C" int ncclGetVersion(int* v) { *v = 22800; return 0; }\n'
    'extern "C" int ncclSend() { return 0; }\n'
  )
  library = tmp_path / "libnccl.so.2"
  emulated.compile_shared(library, [source])
  output, _ = run(opened(library))
  assert "refused jfog:" in output and str(library) in output
  assert "ncclRecv" in output and "ncclCommAbort" in output
  assert "ncclSend" not in output


def test_another_library_later_is_an_error(emulation, tmp_path):
  other = tmp_path / "libnccl.so.2"
  other.write_bytes(emulation.read_bytes())
  output, _ = run(f"""
    from jfog import _nccl
    _nccl.open_nccl({str(emulation)!r})
    _nccl.open_nccl({str(emulation)!r})  # the same is free
    try:
      _nccl.open_nccl({str(other)!r})
    except RuntimeError as error:
      print("refused", error)
    """)
  assert "refused jfog: another NCCL" in output and str(emulation) in output


def test_a_world_on_gpus_needs_gpus():
  """All ranks get the same error before anything is sent by NCCL."""
  if not jfog.runtime._devices.gpus().reason:
    pytest.skip("there is a GPU")
  output, code = run(
    """
    import jfog
    try:
      jfog.init(backend="nccl")
    except RuntimeError as error:
      print(f"{error}\\n", end="")
    """,
    ranks=2,
  )
  assert code == 0, output
  assert output.count("needs a GPU on every rank, and the ranks [0, 1]") == 2
  assert output.count("backend='mpi'") == 2


def test_without_gpus_a_world_takes_mpi():
  output, code = run(
    "import jfog; print(jfog.init().backend, end=';')",
    ranks=2,
    JAX_PLATFORMS="cpu",
  )
  assert (output.count("mpi;"), code) == (2, 0), output


def test_where_there_is_no_gpu_one_line_says_so():
  if not jfog.runtime._devices.gpus().reason:
    pytest.skip("there is a GPU")
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
      *("--backend", "nccl", "tests/test_order.py"),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "NOTE: no test ran by NCCL, for there is no GPU" in done.stdout
  assert "passed" not in done.stdout


# Failures, on the emulation: what one rank does wrong, and what the others say.

HEAD = """
import emulated, os, sys, time
library = emulated.carry_jfog(os.environ["EMULATION"])
import jax, jax.numpy as jnp, jfog
world = jfog.init(backend="nccl", timeout=float(os.environ.get("TIMEOUT", 60)))
rank, size = world.rank, world.size
ring = jfog.topology.ring(size)

def say(text):
  print(f"rank {rank} says: {text};\\n", end="", flush=True)

def error_of(fun, *args):
  \"\"\"What goes wrong in a call, or in the next one on the communicator.\"\"\"
  for call in (fun, jfog.allreduce):
    try:
      jax.block_until_ready(call(*(args if call is fun else (jnp.ones(2),))))
    except jax.errors.JaxRuntimeError as error:
      return str(error)
  return "nothing"

def end():
  \"\"\"Lets nobody wait for this rank, nor for what it has broken.\"\"\"
  try:
    jfog.shutdown()
  except jax.errors.JaxRuntimeError:
    pass  # said before
  assert library.jfog_emulation_faults() == 0
  say("ends")
"""


def said(emulation, program, *, ranks=2, **environment):
  """What each rank says."""
  output, code = run(
    HEAD + textwrap.dedent(program) + "\nend()\n",
    ranks=ranks,
    EMULATION=str(emulation),
    **environment,
  )
  assert code == 0, output
  texts = {
    rank: re.findall(f"rank {rank} says: (.*?);\n", output, re.DOTALL)
    for rank in range(ranks)
  }
  assert all(each[-1:] == ["ends"] for each in texts.values()), output
  return [each[:-1] for each in texts.values()]


def test_a_rank_that_does_not_come(emulation):
  """Its neighbours' next call says who waited for whom, and how long."""
  first, _, third = said(
    emulation,
    """
    x = jfog.neighbor_allreduce(jnp.ones(5), ring)
    if rank == 0:
      say(error_of(lambda: jfog.neighbor_allreduce(jnp.ones(5), ring)))
    elif rank == 2:
      say(error_of(lambda: jfog.neighbor_allreduce(jnp.ones(5), ring)))
    else:
      time.sleep(4)
    """,
    ranks=3,
    TIMEOUT="2",
  )
  for rank, (text,) in ((0, first), (2, third)):
    assert "DEADLINE_EXCEEDED" in text
    assert f"jfog: neighbor_allreduce #1 on rank {rank} waited 2." in text
    assert "rank 1" in text or "ranks" in text
    assert "float32 x 5" in text


def test_ranks_in_other_operations_of_one_size(emulation):
  """Nothing hangs, and the numbers are wrong: the headers tell."""
  for (text,) in said(
    emulation,
    """
      x = jnp.ones(5)
      if rank == 0:
        say(error_of(lambda: jfog.neighbor_allreduce(x, ring)))
      else:
        say(error_of(lambda: jfog.pair_gossip(x, 0)))
      """,
  ):
    assert "FAILED_PRECONDITION" in text and "does not match rank" in text
    assert "neighbor_allreduce #0" in text and "pair_gossip #0" in text


def test_ranks_with_other_graphs(emulation):
  for (text,) in said(
    emulation,
    """
      graph = ring if rank else ring.lazy()
      say(error_of(lambda: jfog.neighbor_allreduce(jnp.ones(5), graph)))
      """,
  ):
    assert "FAILED_PRECONDITION" in text and "another graph" in text


def test_ranks_with_other_shapes(emulation):
  """A message of another length never comes to its end."""
  for (text,) in said(
    emulation,
    """
      x = jnp.ones(5 + rank)
      say(error_of(lambda: jfog.neighbor_allreduce(x, ring)))
      """,
    TIMEOUT="5",
  ):
    assert "FAILED_PRECONDITION" in text and "other dtypes or shapes" in text


def test_ranks_in_other_collectives(emulation):
  for (text,) in said(
    emulation,
    """
      op = "sum" if rank else "max"
      say(error_of(lambda: jfog.allreduce(jnp.ones(5), op)))
      """,
  ):
    assert "FAILED_PRECONDITION" in text and "allreduce #0" in text


def test_an_error_that_nccl_reports_later(emulation):
  first, _ = said(
    emulation,
    """
    jfog.allreduce(jnp.ones(3))
    if rank == 0:
      library.jfog_emulation_fail(b"ncclCommGetAsyncError", 1, 6)
      say(error_of(lambda: jfog.neighbor_allreduce(jnp.ones(5), ring)))
    """,
    TIMEOUT="5",
  )
  (text,) = first
  assert "ABORTED" in text and "neighbor_allreduce #1 on rank 0" in text
  assert "rank 1" in text


def test_no_device_memory(emulation):
  """The rank that has none says so, its neighbour by its deadline."""
  first, second = said(
    emulation,
    """
    x = jnp.ones(1 << 20)
    if rank == 0:
      library.setenv(b"JFOG_EMULATION_MEMORY", b"1000000", 1)
    say(error_of(lambda: jfog.wait(jfog.neighbor_allreduce_start(x, ring))))
    """,
    TIMEOUT="3",
  )
  assert "jfog:" in first[0] and "OUT_OF_MEMORY" in first[0]
  assert "neighbor_allreduce #0 on rank 1" in second[0]


def test_a_rank_that_never_connects(emulation):
  output, _ = run(
    HEAD.split("world =")[0]
    + textwrap.dedent("""
    try:
      jfog.init(backend="nccl", timeout=2)
    except RuntimeError as error:
      print(f"{error}\\n", end="", flush=True)
    os._exit(0)
    """),
    ranks=2,
    EMULATION=str(emulation),
    JFOG_EMULATION_HANG_INIT="1",
  )
  assert "DEADLINE_EXCEEDED" in output
  assert "communicator of 2 ranks on rank 0" in output


def test_what_is_started_runs_beside_the_program(emulation):
  """The start returns while NCCL is at it; waiting takes what is left."""
  for text, *_ in said(
    emulation,
    """
    average = lambda x: jfog.neighbor_allreduce_start(x, ring)
    jfog.wait(average(jnp.ones(9)))
    os.environ["JFOG_EMULATION_DELAY_MS"] = "1000"
    library.setenv(b"JFOG_EMULATION_DELAY_MS", b"1000", 1)
    begin = time.monotonic()
    handle = jax.block_until_ready(average(jnp.full(9, float(rank))))
    started = time.monotonic() - begin
    ready = bool(jfog.poll(handle))
    y = jfog.wait(handle).block_until_ready()
    waited = time.monotonic() - begin
    assert (y == 0.5).all(), y
    say(f"{started < 0.5} {ready} {waited > 0.9}")
    """,
  ):
    assert text == "True False True"


def test_handles_are_waited_on_once(emulation):
  for text, forgotten in said(
    emulation,
    """
    import warnings
    handle = jfog.allreduce_start(jnp.ones(3))
    copy = jax.tree.map(lambda x: x, handle)
    jfog.wait(handle)
    say(error_of(lambda: jfog.wait(copy)))
    open = jfog.allreduce_start(jnp.ones(3))
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      jfog.shutdown()
    say(caught[0].message)
    """,
  ):
    assert "FAILED_PRECONDITION" in text and "not open" in text
    assert "1 operations were started and never waited on" in forgotten


def test_nothing_is_left_behind(emulation):
  """Memory, streams and events of the driver are given back."""
  for (text,) in said(
    emulation,
    """
    for k in range(50):
      handle = jfog.neighbor_allreduce_start(jnp.ones(1000 + k), ring)
      x = jfog.neighbor_allreduce(jnp.ones(77), ring)
      jfog.wait(handle)
    jax.block_until_ready(x)
    jfog.shutdown()
    live = {
      kind: library.jfog_emulation_live(kind.encode())
      for kind in ("communicators", "streams", "contexts")
    }
    say(live)
    """,
  ):
    assert "'communicators': 0" in text
