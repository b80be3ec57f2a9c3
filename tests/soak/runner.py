"""Jobs of the soak: a deadline, signals from outside, and what a job leaves behind.

Each job has a folder of its own for temporary files and another for shared memory,
and a variable in its environment by which all of its processes are found.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jfog.launch

TESTS = pathlib.Path(__file__).resolve().parents[1]
PATIENCE = 15.0  # seconds in which processes and files of an ended job vanish
_MARK = "JFOG_SOAK_FOLDER"
_SHARED = pathlib.Path("/dev/shm")
# The parameters of Open MPI for the places of its shared memory.
_BACKING = ("btl_sm", "btl_vader", "osc_sm", "osc_rdma")


@dataclasses.dataclass
class Ended:
  """The end of a job; its code is None if it was ended at the deadline."""

  code: int | None
  output: str
  seconds: float
  left: list[str]


class Job:
  """A running job: `finish` waits for its end."""

  def __init__(self, process: subprocess.Popen, folder: pathlib.Path):
    self._process, self.folder = process, folder
    self.start = time.monotonic()

  @property
  def launcher(self) -> int:
    """The process id of the launcher."""
    return self._process.pid

  @property
  def is_running(self) -> bool:
    return self._process.poll() is None

  def output(self) -> str:
    """Stdout and stderr so far."""
    return (self.folder / "output").read_text(errors="replace")

  def ranks(self) -> dict[int, int]:
    """The process ids of the ranks that have written them."""
    found = {}
    for path in (self.folder / "own").glob("pid-*"):
      if text := path.read_text():
        found[int(path.name.removeprefix("pid-"))] = int(text)
    return found

  def await_line(self, text: str, deadline: float) -> bool:
    """Waits until the output has a text; False at the deadline or end."""
    while text not in self.output():
      if not self.is_running or time.monotonic() - self.start > deadline:
        return False
      time.sleep(0.02)
    return True

  def processes(self) -> list[tuple[int, str]]:
    """The processes of the job that live, with their command lines."""
    mark = f"{_MARK}={self.folder}".encode()
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        if mark in (path / "environ").read_bytes().split(b"\0"):
          state = (path / "stat").read_text().rpartition(")")[2].split()[0]
          line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
          if state != "Z":
            found.append((int(path.name), line.strip()[:100]))
    return found

  def files(self) -> list[str]:
    """The files in the job's folders for temporary files and shared memory."""
    folders = self.folder / "tmp", _shared_folder(self.folder)
    return [
      str(path)
      for folder in folders
      for path in folder.rglob("*")
      if not path.is_dir() or not any(path.iterdir())
    ]

  def finish(self, deadline: float) -> Ended:
    """Waits for the end; at the deadline, in seconds from the start, ends it."""
    code = None
    left = self.start + deadline - time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
      code = self._process.wait(max(0.0, left))
    seconds = time.monotonic() - self.start
    if code is None:
      self._kill()
      return Ended(None, self.output(), seconds, [])
    return Ended(code, self.output(), seconds, self._left())

  def _left(self):
    end = time.monotonic() + PATIENCE
    while True:
      processes, files = self.processes(), self.files()
      if not (processes or files) or time.monotonic() > end:
        break
      time.sleep(0.05)
    self._kill()
    return [f"process {pid}: {line}" for pid, line in processes] + files

  def _kill(self):
    """Ends the processes of this job."""
    for pid, _ in self.processes():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(5.0)


_running: set[Job] = set()


def end_all() -> None:
  """Ends the processes of all jobs that run."""
  for job in list(_running):
    job._kill()


def _shared_folder(folder):
  return _SHARED / folder.name if _SHARED.is_dir() else folder / "shm"


@contextlib.contextmanager
def job(
  arguments: list[str],
  ranks: int,
  *,
  environment: dict[str, str] | None = None,
  command: list[str] | None = None,
) -> Iterator[Job]:
  """Starts a job of a Python program; its folders are removed in the end.

  Args:
    arguments: of Python.
    ranks: their number.
    environment: variables beside the inherited ones.
    command: the launcher; by default jfog's.
  """
  folder = pathlib.Path(tempfile.mkdtemp(prefix="jfog-soak-"))
  shared = _shared_folder(folder)
  for path in (folder / "tmp", folder / "own", shared):
    path.mkdir()
  inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  variables = {
    **inherited,
    _MARK: str(folder),
    "TMPDIR": str(folder / "tmp"),
    "PYTHONPATH": str(TESTS),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
    **{f"OMPI_MCA_{name}_backing_directory": str(shared) for name in _BACKING},
    **(environment or {}),
  }
  command = command or jfog.launch.command_line(
    ["--no-tag-output", "-np", str(ranks)]
  )
  with open(folder / "output", "wb") as output:
    process = subprocess.Popen(
      [*command, sys.executable, *arguments],
      cwd=folder / "own",
      env=variables,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
  running = Job(process, folder)
  _running.add(running)
  try:
    yield running
  finally:
    _running.discard(running)
    running._kill()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(shared, ignore_errors=True)


def run(
  arguments: list[str],
  ranks: int,
  *,
  deadline: float,
  environment: dict[str, str] | None = None,
  watch: Callable[[Job], None] | None = None,
) -> Ended:
  """Runs a job to its end.

  Args:
    arguments: of Python.
    ranks: their number.
    deadline: seconds; then the job is ended.
    environment: variables beside the inherited ones.
    watch: is called with the running job.
  """
  with job(arguments, ranks, environment=environment) as running:
    if watch is not None:
      watch(running)
    return running.finish(deadline)
