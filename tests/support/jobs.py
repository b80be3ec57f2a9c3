"""MPI jobs that run the MPI forms of tests, one for each number of ranks."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading

import jfog.launch

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_END = 5.0  # seconds that a launcher has to end its ranks

_lock = threading.Lock()  # of a start against an interrupt
_interrupted = threading.Event()
_running: list[subprocess.Popen] = []


@dataclasses.dataclass
class Job:
  """One MPI job that runs all selected tests of its number of ranks."""

  size: int
  results: dict[str, dict[int, tuple[str, str]]]
  output: str


def _machines(nodeid: str) -> str:
  """The local size of a test's MPI form."""
  found = re.search(r"mpi-\d+x(\d+)", nodeid)
  return found[1] if found else ""


def run(
  size: int,
  nodeids: list[str],
  *,
  soak: bool,
  backend: str,
  deadline: float,
  programs: str,
) -> Job:
  """Runs tests on `size` ranks and collects the reports of all ranks.

  Args:
    size: the number of ranks.
    nodeids: the tests.
    soak: whether stress tests run at length.
    backend: "mpi", "nccl" or "emulated".
    deadline: seconds; then the job ends, with the reports up to then.
    programs: the folder of compiled programs that all jobs share.
  """
  with tempfile.TemporaryDirectory() as folder:
    arguments = pathlib.Path(folder) / "tests"
    # One world of machines after the other: making one costs all compiled code.
    arguments.write_text("\n".join(sorted(nodeids, key=_machines)))
    environment = {
      **os.environ,
      "JFOG_TEST_RANKS": str(size),
      "JFOG_TEST_RESULTS": folder,
      "JFOG_TEST_PROGRAMS": programs,
      "JFOG_TEST_BACKEND": backend,
    }
    environment.pop("XLA_FLAGS", None)
    if backend == "mpi":
      environment["JAX_PLATFORMS"] = "cpu"
    command = [
      *jfog.launch.command_line(["--no-tag-output", "-np", str(size)]),
      *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
      *(["--soak"] if soak else []),
      f"@{arguments}",
    ]
    with _lock:
      if _interrupted.is_set():
        return Job(size, {}, "the session was interrupted")
      job = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
      _running.append(job)
    try:
      output = job.communicate(timeout=deadline)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
      job.kill()
      output = job.communicate()[0].decode(errors="replace")
      output += f"\nthe job did not end within {deadline:g} s"
    _running.remove(job)
    results: dict[str, dict[int, tuple[str, str]]] = {}
    for path in pathlib.Path(folder).glob("rank-*"):
      rank = int(path.name.removeprefix("rank-"))
      for line in path.read_text().splitlines():
        nodeid, outcome, text = json.loads(line)
        results.setdefault(nodeid, {})[rank] = (outcome, text)
  return Job(size, results, output)


def interrupt() -> None:
  """Ends the job that `run` has started in another thread, and starts no more."""
  with _lock:
    _interrupted.set()
  for job in list(_running):
    job.terminate()  # the launcher then ends all ranks
    try:
      job.wait(_END)
    except subprocess.TimeoutExpired:
      job.kill()


def run_program(program, ranks, *, deadline, command=None, environment=None):
  """Runs a Python program on ranks; returns its exit code, stdout and stderr.

  Args:
    program: its text.
    ranks: their number.
    deadline: seconds; then `subprocess.TimeoutExpired`.
    command: what to launch it by instead of jfog's launcher.
    environment: variables beside the inherited ones, of which XLA_FLAGS is left
      out.
  """
  command = command or jfog.launch.command_line(
    ["--no-tag-output", "-np", str(ranks)]
  )
  inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [*command, sys.executable, "-c", program],
    env={**inherited, **(environment or {})},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=deadline,
  )
  return done.returncode, done.stdout, done.stderr


def printed(command, *, deadline, folder=None, environment=None):
  """Runs a command that has to do well; returns what it printed.

  Args:
    command: its words.
    deadline: seconds; then `subprocess.TimeoutExpired`.
    folder: where it runs; by default here.
    environment: all of its variables; by default the inherited ones.
  """
  done = subprocess.run(
    list(map(str, command)),
    cwd=folder,
    env=environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=deadline,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout
