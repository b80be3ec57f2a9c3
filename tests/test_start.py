"""The start of a job: ranks that do not come to it, and descendants of a rank."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import pytest
from support import jobs

from jfog import launch, runtime
from jfog.launch import marks

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
DEADLINE = 180.0  # seconds; each of these takes a few when all is quiet
ROOT = pathlib.Path(__file__).resolve().parents[1]

RANK = """
import os, subprocess, sys, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", 0)))
import jfog
"""


def run(program, ranks=3, command=None):
  """Runs a program on ranks; returns code, stdout and stderr."""
  return jobs.run_program(
    RANK + textwrap.dedent(program), ranks, deadline=DEADLINE, command=command
  )


def python(program, **environment):
  """Runs a program in a process that no launcher has started."""
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )


def test_a_rank_that_ends_before_init_ends_the_job():
  code, _, err = run("""
    if rank == 1:
      sys.exit(0)
    jfog.init()
  """)
  assert code == 1
  last = err.strip().splitlines()[-1]
  assert last.startswith(
    "jfog run: rank 1 ended with exit code 0 before jfog.init, in which rank"
  )


@pytest.mark.full
def test_a_rank_that_fails_in_init_ends_the_job():
  code, _, err = run("""
    if rank == 2:
      os.environ["JFOG_ORDER"] = "random"
    jfog.init()
  """)
  assert code == 1
  assert "jfog run: rank 2 failed first" in err
  assert "JFOG_ORDER='random'" in err


def test_a_rank_whose_init_failed_gives_the_others_time_to_fail(tmp_path):
  for name in ("0.entered", "1.entered", "0.failed", "0.ended"):
    (tmp_path / name).touch()
  assert marks.lost(str(tmp_path)) == ""
  then = time.time() - 60
  os.utime(tmp_path / "0.ended", (then, then))
  assert "in which rank 1 waited" in marks.lost(str(tmp_path))
  (tmp_path / "1.failed").touch()
  assert marks.lost(str(tmp_path)) == ""


@pytest.mark.full
@pytest.mark.parametrize(
  "where", ["before", pytest.param("inside", marks=pytest.mark.soak)]
)
def test_init_has_a_deadline(where):
  """Also where MPI_Init itself waits, which nothing can interrupt."""
  code, out, err = run(f"""
    from jfog.runtime import _extensions
    if rank == 1:
      if {where == "inside"}:
        _extensions.mpi().start()
      time.sleep(1000)
    for _ in range(2):
      try:
        jfog.init(timeout=3)
      except RuntimeError as error:
        print(f"RAISED {{error}}", flush=True)
    time.sleep(10)  # the other one, too
    sys.exit(5)
  """)
  assert code == 5, err
  first, *later = re.findall("RAISED (.*)", out)
  assert "DEADLINE_EXCEEDED: jfog: init on rank" in first
  # Another one may be late as well.
  missing = (
    r"15 s for ranks \[(0, )?1(, 2)?\], which have not called jfog\.init"
  )
  assert re.search(missing, first)
  assert any("MPI starts once; start the job again" in text for text in later)


@pytest.mark.full
def test_a_rank_that_leaves_without_an_end_is_named():
  code, _, err = run(
    """
    import jax.numpy as jnp
    jfog.init()
    jfog.barrier()
    if rank == 1:
      os._exit(0)
    jfog.allreduce(jnp.ones(3)).block_until_ready()
    """,
    ranks=2,
  )
  assert code != 0
  last = err.strip().splitlines()[-1]
  assert "rank 1 ended first (exit code 0) and has left MPI unfinished" in last


SUBPROCESSES = """
before = dict(os.environ)
world = jfog.init()
def child(backend, environ):
  program = f"import jfog; print(jfog.init(backend={backend!r}).size)"
  done = subprocess.run([sys.executable, "-c", program], env=environ,
                        capture_output=True, text=True)
  print("CHILD", done.stdout, done.stderr.splitlines()[-1:], flush=True)
if rank == 0:
  for environ in (None, before):
    child(None, environ)
  child("single", None)
import jax.numpy as jnp
total = jfog.allreduce(jnp.ones(()), "sum")
print("SUM", total, flush=True)
"""


@pytest.mark.full
def test_a_subprocess_is_not_the_rank():
  """Its environment may be older than the rank's init."""
  code, out, err = run(SUBPROCESSES, ranks=2)
  assert code == 0, err
  assert out.count("SUM 2.0") == 2
  refused = "which is rank 0 of the job, and a rank is one process"
  assert out.count(refused) == 2
  assert "jfog.init(backend='single')" in out
  assert "CHILD 1\n []" in out


FORKS = """
import warnings
warnings.simplefilter("ignore")  # JAX warns at a fork
import jax, jax.numpy as jnp, multiprocessing
world = jfog.init(timeout=100)
x = jnp.ones(3)
jfog.allreduce(x).block_until_ready()
handle = jfog.allreduce_start(x)
win = jfog.win_create(x, jfog.topology.ring(2))

def mutex():
  with jfog.win_mutex(win):
    pass

def single():
  own = jfog.init(backend="single")
  assert own is jfog.init() and own.size == 1

def fail():
  raise ValueError("in the fork")

def attempt(name):
  try:
    ATTEMPTS[name]()
  except Exception as error:
    if name == "fail":
      raise
    print("RAISED", name, error, flush=True)
  sys.exit(7)

ATTEMPTS = {
  "allreduce": lambda: jfog.allreduce(x),
  "wait": lambda: jfog.wait(handle),
  "win_put": lambda: jfog.win_put(win, x),
  "win_mutex": mutex,
  "init": jfog.init,
  "single": single,
  "rank": lambda: print("RANK", jfog.rank(), jfog.size(), flush=True),
  "shutdown": jfog.shutdown,
  "nothing": lambda: None,
  "fail": fail,
}
for name in ATTEMPTS if rank == 0 else ():
  if (pid := os.fork()) == 0:
    attempt(name)
  begin, ended = time.monotonic(), 0
  while not ended and time.monotonic() - begin < 60:
    ended, status = os.waitpid(pid, os.WNOHANG)
    time.sleep(0.02)
  print("ENDED", name, ended and os.waitstatus_to_exitcode(status), flush=True)
  if not ended:
    os.kill(pid, 9)
y = jfog.wait(handle)
jfog.win_free(win)
print("SUM", jfog.allreduce(y, "sum"), flush=True)
"""


@pytest.mark.full
def test_a_fork_is_not_the_rank():
  """It ends, its operations are refused, and the rank's go on."""
  code, out, err = run(FORKS, ranks=2)
  assert code == 0, err
  assert out.count("SUM [2. 2. 2.]") == 2
  for name in ("allreduce", "wait", "win_put", "win_mutex"):
    assert (
      f"RAISED {name} FAILED_PRECONDITION: jfog: {name} in a fork of a rank"
      in out
    )
  refused = r"RAISED init this process \(\d+\) was forked from process \d+"
  assert re.search(refused, out)
  assert "RANK 0 2" in out
  assert "ValueError: in the fork" in err
  ends = dict(re.findall(r"ENDED (\w+) (\d+)", out))
  assert ends.pop("fail") == "1"
  assert set(ends.values()) == {"7"}, ends


@pytest.mark.full
def test_importing_in_a_fork_is_harmless():
  done = python("""
    import multiprocessing, jfog
    world = jfog.init(backend="mpi")
    def square(k):
      import jfog.optimizers
      return k * k + jfog.size() - 1
    with multiprocessing.get_context("fork").Pool(2) as pool:
      assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
    jfog.barrier()
  """)
  assert done.returncode == 0, done.stderr


def test_a_world_without_a_launcher_leaves_no_shared_memory():
  done = python("""
    import os, jfog
    jfog.init(backend="mpi")
    assert "OMPI_MCA_btl" not in os.environ  # for jobs that it starts
    print(open("/proc/self/maps").read().count("sm_segment"))
  """)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "0"


LISTENERS = """
import glob
jfog.init()
jfog.barrier()
inodes = set()
for fd in glob.glob("/proc/self/fd/*"):
  try:
    inodes.add(os.readlink(fd))
  except OSError:
    pass
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
  for line in open(table).read().splitlines()[1:]:
    words = line.split()
    if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
      print("LISTENS", words[1], flush=True)
jfog.barrier()
print("DONE", flush=True)
"""


def test_no_rank_listens_on_one_host():
  code, out, err = run(LISTENERS, ranks=2)
  assert code == 0, err
  assert out.count("DONE") == 2
  assert "LISTENS" not in out


def _marked(mark):
  """The processes with a mark in their environment."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if mark.encode() in (path / "environ").read_bytes():
        found.append((path / "cmdline").read_bytes())
    except OSError:
      pass
  return found


@pytest.mark.soak
def test_an_interrupted_session_ends_its_jobs():
  mark = f"JFOG_TEST_MARK={uuid.uuid4()}"
  name, _, value = mark.partition("=")
  words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--full"]
  session = subprocess.Popen(
    [sys.executable, *words, "tests/test_collectives.py"],
    cwd=ROOT,
    env={**os.environ, name: value, "JFOG_STALE_OK": "1"},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  try:
    end = time.monotonic() + DEADLINE
    while not any(b"--rank-main" in words for words in _marked(mark)):
      assert time.monotonic() < end and session.poll() is None
      time.sleep(0.1)
    session.send_signal(signal.SIGINT)
    session.wait(DEADLINE)
    end = time.monotonic() + 30
    while (left := _marked(mark)) and time.monotonic() < end:
      time.sleep(0.1)
    assert not left
  finally:
    session.kill()


def test_words_of_colons_reach_the_program():
  words = ["-np", "1", sys.executable, "-c", "import sys; print(sys.argv[1:])"]
  done = subprocess.run(
    [*launch.command_line(words), ":", "a", "::", ":b"],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "[':', 'a', '::', ':b']\n"
