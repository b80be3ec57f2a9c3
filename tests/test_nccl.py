"""NCCL without a GPU: its library, errors without it, and jfog on an emulation."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from support import emulated, suite

import jfog
from jfog import launch
from jfog.runtime import _gpu_placement

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE = 300  # seconds; a quiet machine needs a tenth of it


def run(program, *, ranks=0, **environment):
  """The output and exit code of a program, on ranks if `ranks` is not 0."""
  command = (
    launch.command_line(["--no-tag-output", "-np", str(ranks)]) if ranks else []
  )
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


def extension():
  """Loads `jfog._nccl` without jfog and JAX, whose import takes long."""
  from jfog import _nccl

  return f"""
    import importlib.machinery, importlib.util
    loader = importlib.machinery.ExtensionFileLoader("_nccl", {_nccl.__file__!r})
    spec = importlib.util.spec_from_loader("_nccl", loader)
    _nccl = importlib.util.module_from_spec(spec)
    loader.exec_module(_nccl)
    """


def opened(path):
  return f"""{extension()}
    try:
      _nccl.open_nccl({str(path)!r})
      print("opened", _nccl.version(), _nccl.path())
    except RuntimeError as error:
      print("refused", error)
    """


def test_the_library_of_the_wheel_opens():
  """And its version is the one that it says itself."""
  suite.require("nvidia.nccl")
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
  output, _ = run(f"""{extension()}
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
    import jfog.runtime._extensions as native
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
  output, _ = run(f"""{extension()}
    _nccl.open_nccl({str(emulation)!r})
    _nccl.open_nccl({str(emulation)!r})  # the same is free
    try:
      _nccl.open_nccl({str(other)!r})
    except RuntimeError as error:
      print("refused", error)
    """)
  assert "refused jfog: another NCCL" in output and str(emulation) in output


@pytest.mark.skipif(not _gpu_placement.gpus().reason, reason="there is a GPU")
def test_a_world_on_gpus_needs_gpus():
  """All ranks get the same error before anything is sent by NCCL."""
  with pytest.raises(RuntimeError, match=r"the ranks \[0\] have none: JAX"):
    jfog.init(backend="nccl")
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


@pytest.mark.skipif(not _gpu_placement.gpus().reason, reason="there is a GPU")
def test_where_there_is_no_gpu_one_line_says_so():
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


# Failures on the emulation: the error of one rank, and its report on the others.
# One job runs all scenes, each in a world of its own.

HEAD = """
import os, pathlib, time, warnings
from support import emulated
library = emulated.carry_jfog(os.environ["EMULATION"])
import jax, jax.numpy as jnp, jfog

def say(text):
  print(f"<{name}:{rank}>{text}</>\\n", end="", flush=True)

def error_of(fun):
  \"\"\"What goes wrong in a call, or in the next one on the communicator.\"\"\"
  for call in (fun, lambda: jfog.allreduce(jnp.ones(2))):
    try:
      jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
      return str(error)
  return "nothing"

def average(x):
  return jfog.neighbor_allreduce(x, ring)

def set_in_library(name, value):
  library.setenv(f"JFOG_EMULATION_{name}".encode(), str(value).encode(), 1)
"""

# The seconds of the deadline, and what each rank does.
SCENES = {
  "a rank that does not come": (
    2,
    """
    x = average(jnp.ones(5))
    if rank == 0:
      say(error_of(lambda: average(jnp.ones(5))))
      met.touch()
    while not met.exists():
      time.sleep(0.01)
    """,
  ),
  "other operations of one size": (
    30,
    """
    x = jnp.ones(5)
    other = lambda: jfog.pair_gossip(x, 0)
    say(error_of(other if rank else lambda: average(x)))
    """,
  ),
  "other graphs": (
    30,
    """
    graph = ring if rank else ring.lazy()
    say(error_of(lambda: jfog.neighbor_allreduce(jnp.ones(5), graph)))
    """,
  ),
  # A message of another length never comes to its end.
  "other shapes": (5, "say(error_of(lambda: average(jnp.ones(5 + rank))))"),
  "other shapes of one length": (
    30,
    """
    x = [jnp.ones(3), jnp.ones(5)]
    say(error_of(lambda: average(x if rank else x[::-1])))
    """,
  ),
  "other collectives": (
    30,
    """
    op = "sum" if rank else "max"
    say(error_of(lambda: jfog.allreduce(jnp.ones(5), op)))
    """,
  ),
  "an error that comes later": (
    5,
    """
    jax.block_until_ready(jfog.allreduce(jnp.ones(3)))
    if rank == 0:
      library.jfog_emulation_fail(b"ncclCommGetAsyncError", 1, 6)
      say(error_of(lambda: average(jnp.ones(5))))
    """,
  ),
  "no device memory": (
    3,
    """
    x = jnp.ones(1 << 20)
    if rank == 0:
      set_in_library("MEMORY", 1_000_000)
    say(error_of(lambda: jfog.wait(jfog.neighbor_allreduce_start(x, ring))))
    set_in_library("MEMORY", 1 << 40)
    """,
  ),
  "what is started runs beside the program": (
    30,
    """
    start = jax.jit(lambda x: jfog.neighbor_allreduce_start(x, ring))
    wait = jax.jit(jfog.wait)
    wait(start(jnp.ones(9)))
    x = jnp.full(9, float(rank))
    set_in_library("DELAY_MS", 2000)
    begin = time.monotonic()
    handle = jax.block_until_ready(start(x))
    started = time.monotonic() - begin
    ready = bool(jfog.poll(handle))
    y = wait(handle).block_until_ready()
    waited = time.monotonic() - begin
    set_in_library("DELAY_MS", 0)
    say(f"{started < 1.5} {ready} {waited > 1.9} {bool((y == 0.5).all())}")
    """,
  ),
  "handles are waited on once": (
    30,
    """
    handle = jfog.allreduce_start(jnp.ones(3))
    copy = jax.tree.map(lambda x: x, handle)
    jfog.wait(handle)
    say(error_of(lambda: jfog.wait(copy)))
    """,
  ),
  "forgotten handles": (
    30,
    """
    handle = jfog.allreduce_start(jnp.ones(3))
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      jfog.shutdown()
    say(caught[0].message)
    """,
  ),
  "nothing is left behind": (
    30,
    """
    for k in range(20):
      handle = jfog.neighbor_allreduce_start(jnp.ones(1000 + k), ring)
      x = average(jnp.ones(77))
      jfog.wait(handle)
    jax.block_until_ready(x)
    jfog.shutdown()
    faults = library.jfog_emulation_faults()
    live = library.jfog_emulation_live(b"communicators")
    say(f"{faults} faults, {live} communicators")
    """,
  ),
}


@pytest.fixture(
  scope="module",
  params=["0", pytest.param("1", marks=pytest.mark.soak)],
  ids=["non-blocking", "blocking"],
)
def said(emulation, request, tmp_path_factory):
  """The output of both ranks in every scene, in both modes of communicators."""
  met = tmp_path_factory.mktemp("scenes") / "met"
  play = f"{HEAD}\nmet = pathlib.Path({str(met)!r})\n"
  for name, (deadline, scene) in SCENES.items():
    play += f"""
name = {name!r}
rank = jfog.init(backend="nccl", timeout={deadline}).rank
ring = jfog.topology.ring(2)
{textwrap.dedent(scene)}
jfog.shutdown()
"""
  output, code = run(
    play, ranks=2, EMULATION=str(emulation), JFOG_NCCL_BLOCKING=request.param
  )
  assert code == 0, output
  return {
    name: [
      re.findall(f"<{name}:{rank}>(.*?)</>", output, re.DOTALL)
      for rank in range(2)
    ]
    for name in SCENES
  }


def texts(said, name):
  """The one text of each rank."""
  ((first,), (second,)) = said[name]
  return [first, second]


def test_a_rank_that_does_not_come(said):
  """The next call's error names the waiting rank, its peer and the time."""
  ((text,), _) = said["a rank that does not come"]
  assert "DEADLINE_EXCEEDED" in text and "float32 x 5" in text
  assert "jfog: neighbor_allreduce #1 on rank 0 waited 2." in text
  assert "for rank 1" in text


def test_ranks_in_other_operations_of_one_size(said):
  """Nothing hangs, and the numbers are wrong: the headers tell."""
  for text in texts(said, "other operations of one size"):
    assert "FAILED_PRECONDITION" in text and "does not match rank" in text
    assert "neighbor_allreduce #0" in text and "pair_gossip #0" in text


def test_ranks_with_other_graphs(said):
  for text in texts(said, "other graphs"):
    assert "FAILED_PRECONDITION" in text and "another graph" in text


@pytest.mark.parametrize("name", ["other shapes", "other shapes of one length"])
def test_ranks_with_other_shapes(said, name):
  for text in texts(said, name):
    assert "FAILED_PRECONDITION" in text and "other dtypes or shapes" in text


def test_ranks_in_other_collectives(said):
  for text in texts(said, "other collectives"):
    assert "FAILED_PRECONDITION" in text and "allreduce #0" in text


def test_an_error_that_nccl_reports_later(said):
  ((text,), _) = said["an error that comes later"]
  assert "ABORTED" in text and "neighbor_allreduce #1 on rank 0" in text
  assert "rank 1" in text


def test_no_device_memory(said):
  """The error names the memory there, and the missing peer on the neighbor."""
  first, second = texts(said, "no device memory")
  assert "jfog:" in first and "OUT_OF_MEMORY" in first
  assert "neighbor_allreduce #0 on rank 1" in second


def test_what_is_started_runs_beside_the_program(said):
  """The start returns while NCCL is at it; waiting takes what is left."""
  for text in texts(said, "what is started runs beside the program"):
    assert text == "True False True True"


def test_handles_are_waited_on_once(said):
  for text in texts(said, "handles are waited on once"):
    assert "FAILED_PRECONDITION" in text and "not open" in text
  for text in texts(said, "forgotten handles"):
    assert "1 operations were started and never waited on" in text


def test_nothing_is_left_behind(said):
  """Nor has any scene called NCCL or the driver in a wrong way."""
  for text in texts(said, "nothing is left behind"):
    assert text == "0 faults, 0 communicators"


@pytest.mark.parametrize(
  "blocking",
  ["0", pytest.param("1", marks=pytest.mark.soak)],
  ids=["non-blocking", "blocking"],
)
def test_a_rank_that_never_connects(emulation, blocking):
  program = """
    import os
    from support import emulated
    emulated.carry_jfog(os.environ["EMULATION"])
    import jfog
    try:
      jfog.init(backend="nccl", timeout=2)
    except RuntimeError as error:
      print(f"{error}\\n", end="", flush=True)
    os._exit(0)
  """
  output, _ = run(
    program,
    ranks=2,
    EMULATION=str(emulation),
    JFOG_EMULATION_HANG_INIT="1",
    JFOG_NCCL_BLOCKING=blocking,
  )
  assert "DEADLINE_EXCEEDED" in output
  assert "communicator of 2 ranks on rank 0" in output


def test_ranked_tests_pass_on_the_emulation():
  """All of jfog's own NCCL code, with another library below it."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
      *("--full", "--backend", "emulated", "-k", "mpi-2"),
      *(f"tests/test_{name}.py" for name in EMULATED),
    ],
    cwd=ROOT,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=3 * DEADLINE,
  )
  assert done.returncode == 0, done.stdout[-8000:]
  passed = re.search(r"(\d+) passed", done.stdout)
  assert passed and int(passed[1]) > 20, done.stdout[-2000:]


# A part of what has a rendition for GPUs: the rehearsal of the GPU check runs each
# operation, and all ranked tests run with --backend emulated.
EMULATED = ("peers", "handles", "hierarchical")
