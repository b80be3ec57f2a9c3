"""Starts a job of several ranks: `jfog run`, and the wrapper of each rank.

This file is also a program, and as a program it needs nothing but the standard
library. Started with the arguments of `jfog run` it starts mpirun; mpirun
starts it again around every rank, with `--rank-main`. The wrapper of a rank
runs the user's command, keeps the end of what it writes to stderr, and leaves
a record when it fails, from which the launcher tells who failed first. Both
start without jax; modules that only a launcher needs are imported where they
are used, because a job pays the wrapper's start once per rank.
"""

import _thread
import collections
import ctypes
import os
import signal
import sys
import time

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_TAIL = 64 * 1024  # bytes of stderr that a wrapper keeps
_EAGER_LIMIT = 64 * 1024  # bytes that shared memory sends without a handshake
_GRACE = 5.0  # seconds mpirun has to end after a failure or a signal
_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80  # the sender of a signal that came from the terminal's keys
_FORWARDED = (
  signal.SIGTERM,
  signal.SIGINT,
  signal.SIGHUP,
  signal.SIGQUIT,
  signal.SIGUSR1,
  signal.SIGUSR2,
)
_ENDING = _FORWARDED[:4]
_WAITED = (*_FORWARDED, signal.SIGCHLD)

Mpi = collections.namedtuple("Mpi", ["launcher", "family", "library"])
Mpi.__doc__ = """The MPI that jfog was built with.

`launcher` is the path of its mpirun, `family` is `"openmpi"` or `"mpich"`, and
`library` is the version text of the library.
"""


def built_package() -> str:
  """Returns the directory of jfog in which the build left `_build.py`.

  That is this file's own, but for Python started in jfog's source tree or an
  editable installation.
  """
  folders = [_PACKAGE, *getattr(sys.modules.get("jfog"), "__path__", ())]
  folders += [os.path.join(path, "jfog") for path in sys.path]
  for folder in folders:
    if os.path.exists(os.path.join(folder, "_build.py")):
      return os.path.abspath(folder)
  return _PACKAGE


def installed_mpi(package: str | None = None) -> Mpi:
  """Returns the MPI that jfog was built with.

  Args:
    package: the directory of the jfog package, in which the build leaves
      `_build.py`; by default found as `built_package` says.

  Raises:
    RuntimeError: if jfog was built without MPI, or its launcher is gone.
  """
  remedy = (
    "reinstall jfog where MPI is found (`pip install --force-reinstall jfog`, "
    "or with JFOG_MPI=system and mpicxx on PATH); jfog.simulate and jfog.spmd "
    "need no MPI."
  )
  package = package or built_package()
  build = {}
  path = os.path.join(package, "_build.py")
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      exec(compile(file.read(), path, "exec"), build)
  launcher = build.get("MPI_LAUNCHER", "")
  if not launcher:
    raise RuntimeError(f"this jfog was installed without MPI: {remedy}")
  launcher = os.path.normpath(os.path.join(package, launcher))
  if not os.access(launcher, os.X_OK):
    raise RuntimeError(
      f"the MPI that jfog was built with is gone ({launcher}): {remedy}"
    )
  return Mpi(launcher, build["MPI_FAMILY"], build["MPI_LIBRARY"])


def command_line(arguments: list[str]) -> list[str]:
  """Returns the command that does `jfog run` with these arguments.

  The command starts a fresh interpreter that imports neither jax nor jfog.

  Example:
    >>> command_line(["-np", "2", "hostname"])[-3:]
    ['-np', '2', 'hostname']
  """
  return [*_self(), "--package", built_package(), *arguments]


def mpirun_command(
  mpi: Mpi,
  ranks: int,
  command: list[str],
  *,
  host: str | None = None,
  hostfile: str | None = None,
  tag_output: bool = False,
) -> list[str]:
  """Returns the mpirun command that starts `command` on every rank.

  Args:
    mpi: the MPI whose launcher is used.
    ranks: the number of ranks; more than there are cores is fine.
    command: the program of every rank and its arguments.
    host: `host:slots,...`, passed on to mpirun.
    hostfile: the path of a hostfile, passed on to mpirun.
    tag_output: prefix every line of output with the rank.
  """
  words = [mpi.launcher, "-np", str(ranks)]
  if mpi.family == "openmpi":
    words += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if host:
      words += ["-H", host]
    if hostfile:
      words += ["--hostfile", hostfile]
    if host or hostfile:
      words += ["-x", "JFOG_RUN_DIR"]  # Open MPI sends no others to hosts
  else:
    words += ["-bind-to", "none"]
    if host:
      words += ["-hosts", host]
    if hostfile:
      words += ["-f", hostfile]
  words += [*_self(), "--rank-main"]
  if tag_output:
    words.append("--tag-output")
  return [*words, "--", *command]


def job_environment(environ: dict[str, str], run_dir: str) -> dict[str, str]:
  """Returns the environment of mpirun: `environ` and what jfog adds to it.

  Variables that the user has set are kept.
  """
  added = {}
  for prefix in ("OMPI", "PRTE"):
    added[f"{prefix}_ALLOW_RUN_AS_ROOT"] = "1"
    added[f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
  for transport in ("sm", "vader"):  # Open MPI 5, Open MPI 4
    added[f"OMPI_MCA_btl_{transport}_eager_limit"] = str(_EAGER_LIMIT)
  added["OMPI_MCA_osc"] = "^ucx"  # without UCX it prints an error
  return {**added, **environ, "JFOG_RUN_DIR": run_dir}


def rank_environment(
  environ: dict[str, str], *, cores: int, gpus: int
) -> dict[str, str]:
  """Returns the environment of one rank's command.

  The cores of a machine are divided between its ranks, at least one each, and
  each rank sees one GPU. Variables that the user has set are kept, but a list
  in `CUDA_VISIBLE_DEVICES` is dealt out to the ranks.

  Args:
    environ: the environment of the wrapper, in which MPI says how many ranks
      this machine has.
    cores: the number of cores that the ranks of this machine may use.
    gpus: the number of GPUs of this machine.
  """
  ranks = int(_first(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
  local = int(_first(environ, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"))
  threads = str(max(1, cores // max(1, ranks)))
  added = {
    "OMP_NUM_THREADS": threads,
    "OPENBLAS_NUM_THREADS": threads,
    "MKL_NUM_THREADS": threads,
    "NPROC": threads,  # sizes the thread pools of XLA on CPU
  }
  environ = {**added, **environ}
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  devices = [str(gpu) for gpu in range(gpus)]
  if visible is not None:
    devices = [name for name in visible.split(",") if name]
  if devices:
    environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
  return environ


def first_failure(records: list[dict]) -> dict | None:
  """Returns the record of the rank that failed first, or None without one.

  A rank that ended because mpirun was ending the job did not fail first,
  whatever its clock says.
  """
  causes = [record for record in records if not record["torn_down"]]
  return min(causes, key=lambda record: record["time"], default=None)


def failure_report(record: dict) -> str:
  """Returns what `jfog run` prints last about the rank that failed first."""
  rank, stderr = record["rank"], record["stderr"].rstrip("\n")
  if record["signal"]:
    head = f"jfog run: rank {rank} was killed by {record['signal']}"
    shown = _last_lines(stderr)
  else:
    head = f"jfog run: rank {rank} failed first (exit code {record['code']})"
    shown = _last_traceback(stderr) or _last_lines(stderr)
  return f"{head}:\n{shown}\n" if shown else f"{head}\n"


def main(arguments: list[str] | None = None) -> int:
  """Does `jfog run` with these arguments and returns its exit code.

  The code is that of the rank that failed first, 128 + n for a rank killed by
  signal n; 124 after `--timeout`, 126 and 127 for a command that cannot be run
  or is not found, 2 for bad arguments.
  """
  options = _parse(sys.argv[1:] if arguments is None else arguments)
  try:
    mpi = installed_mpi(options.package)
  except RuntimeError as error:
    _say(f"jfog run: {error}\n")
    return 1
  if not (options.host or options.hostfile):
    code, problem = _command_problem(options.command)
    if problem:
      _say(f"jfog run: {problem}\n")
      return code
  import shutil
  import tempfile

  run_dir = tempfile.mkdtemp(prefix="jfog-run-")
  try:
    command = mpirun_command(
      mpi,
      options.np,
      options.command,
      host=options.host,
      hostfile=options.hostfile,
      tag_output=options.tag_output,
    )
    environ = job_environment(dict(os.environ), run_dir)
    return _run_job(command, environ, run_dir, options.timeout)
  finally:
    shutil.rmtree(run_dir, ignore_errors=True)


def _parse(arguments: list[str]):
  import argparse

  parser = argparse.ArgumentParser(
    prog="jfog run",
    usage="jfog run -np N [-H HOST:SLOTS,... | --hostfile FILE] "
    "[--tag-output] [--timeout SECONDS] command ...",
    description="Runs a command on N ranks, with the MPI jfog was built with.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "-np", "-n", type=int, required=True, metavar="N", help="number of ranks"
  )
  hosts = parser.add_mutually_exclusive_group()
  hosts.add_argument(
    "-H", "--host", metavar="HOST:SLOTS,...", help="hosts to run on"
  )
  hosts.add_argument(
    "--hostfile", metavar="FILE", help="file that lists the hosts to run on"
  )
  parser.add_argument(
    "--tag-output",
    action="store_true",
    help="begin every line of output with [rank]",
  )
  parser.add_argument(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help="end the job after that long, with exit code 124",
  )
  parser.add_argument("--package", help=argparse.SUPPRESS)
  parser.add_argument(
    "command", nargs=argparse.REMAINDER, help="command that every rank runs"
  )
  options = parser.parse_args(arguments)
  if options.command[:1] == ["--"]:
    del options.command[0]
  if options.np < 1:
    parser.error(f"-np must be at least 1, got {options.np}.")
  if options.timeout is not None and options.timeout <= 0:
    parser.error(f"--timeout must be positive, got {options.timeout}.")
  if not options.command:
    parser.error("no command; for example: jfog run -np 2 python train.py")
  return options


def _command_problem(command: list[str]) -> tuple[int, str]:
  """Returns the exit code and text for a command that no rank can start."""
  import shutil

  name = command[0]
  if shutil.which(name):
    return 0, ""
  if os.path.isfile(name) and name.endswith(".py"):
    script = " ".join(command)
    return (
      126,
      f"{name} is not a command; put `python` before it: `python {script}`.",
    )
  if os.path.isfile(name) and os.path.dirname(name):
    return 126, f"{name} is not executable; `chmod +x {name}` makes it so."
  return 127, f"command not found: {name}; give a path or a command on PATH."


def _run_job(
  command: list[str],
  environ: dict[str, str],
  run_dir: str,
  timeout: float | None,
) -> int:
  """Runs mpirun, sees to it that it ends, and tells who failed first."""
  signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
  pid = _spawn(command, environ, death_signal=signal.SIGTERM)
  end = None if timeout is None else time.monotonic() + timeout
  asked = 0  # the exit code of who ended the job from outside
  stops = None  # when to send which signal to an mpirun that does not end
  while True:
    event = signal.sigtimedwait(_WAITED, 0.2)
    code = _reaped(pid)
    if code is not None:
      break
    now = time.monotonic()
    if event is not None and event.si_signo in _FORWARDED:
      from_keys = event.si_code == _SI_KERNEL  # mpirun has received it too
      if event.si_signo not in _ENDING:
        os.kill(pid, event.si_signo)
      else:
        asked = 128 + event.si_signo
        stops = stops or _stops(now + (_GRACE if from_keys else 0.0))
    if end is not None and now > end and stops is None:
      asked, stops = 124, _stops(now)
      _say(f"jfog run: ended after --timeout {timeout:g} s\n")
    if stops is None and any(os.scandir(run_dir)):
      stops = _stops(now + _GRACE)
    if stops and now >= stops[0][0]:
      os.kill(pid, stops.pop(0)[1])
  if asked:
    return asked
  if code == 0:
    return 0
  record = first_failure(_records(run_dir))
  if record is not None:
    _say("\n" + failure_report(record))
    return record["code"]
  code = _shell_code(code)
  _say(f"\njfog run: mpirun ended with exit code {code}\n")
  return code


def _stops(start: float) -> list[tuple[float, int]]:
  # mpirun itself kills its ranks a second after SIGTERM. When it is killed,
  # the wrappers notice and kill theirs.
  return [
    (start, signal.SIGTERM),
    (start + 2.0, signal.SIGKILL),
    (float("inf"), 0),
  ]


def _rank_main(arguments: list[str]) -> int:
  """Runs the command of one rank and returns its exit code."""
  split = arguments.index("--")
  tagged, command = "--tag-output" in arguments[:split], arguments[split + 1 :]
  signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
  rank = _first(os.environ, "OMPI_COMM_WORLD_RANK", "PMI_RANK")
  environ = rank_environment(
    dict(os.environ), cores=len(os.sched_getaffinity(0)), gpus=_gpus()
  )
  prefix = b""
  if tagged:
    prefix = f"[{rank}] ".encode()
    environ.setdefault("PYTHONUNBUFFERED", "1")  # a pipe would delay lines
  parent = os.getppid()
  leader = os.getpgrp() == os.getpid()
  stderr = _Pump(2, prefix)
  stdout = _Pump(1, prefix) if tagged else None
  pumps = [pump for pump in (stdout, stderr) if pump]
  pid = _spawn(command, environ, death_signal=signal.SIGKILL, pumps=pumps)
  for pump in pumps:
    pump.start()
  torn_down = False
  while True:
    event = signal.sigtimedwait(_WAITED, 0.5)
    if event is not None and event.si_signo in _FORWARDED:
      # mpirun signals the process group of a rank, so the command has it.
      from_mpirun = event.si_pid == parent
      torn_down |= from_mpirun and event.si_signo in _ENDING
      if not (from_mpirun and leader):
        os.kill(pid, event.si_signo)
      continue
    code = _reaped(pid)
    if code is not None:
      break
    if os.getppid() != parent:  # mpirun was killed: nobody waits for this job
      os.killpg(0, signal.SIGKILL) if leader else os.kill(pid, signal.SIGKILL)
  ended = time.time()
  for pump in pumps:
    pump.finish()
  if code:
    _leave_record(int(rank), code, ended, torn_down, stderr.tail)
  return _shell_code(code)


def _leave_record(
  rank: int, code: int, ended: float, torn_down: bool, stderr: bytes
) -> None:
  import json

  run_dir = os.environ.get("JFOG_RUN_DIR", "")
  record = {
    "rank": rank,
    "time": ended,
    "code": _shell_code(code),
    "signal": _signal_name(-code) if code < 0 else "",
    "torn_down": torn_down,
    "stderr": stderr.decode(errors="replace"),
  }
  path = os.path.join(run_dir, f"{rank}.json")
  try:
    with open(path + ".part", "w", encoding="utf-8") as file:
      json.dump(record, file)
    os.replace(path + ".part", path)
  except OSError:
    pass  # another host, where the launcher's directory does not exist


def _signal_name(number: int) -> str:
  try:
    return signal.Signals(number).name
  except ValueError:  # a real-time signal
    return f"signal {number}"


def _records(run_dir: str) -> list[dict]:
  import json

  records = []
  for name in sorted(os.listdir(run_dir)):
    if name.endswith(".json"):
      with open(os.path.join(run_dir, name), encoding="utf-8") as file:
        records.append(json.load(file))
  return records


class _Pump:
  """Copies a pipe to a file descriptor and keeps the last of its bytes."""

  def __init__(self, target: int, prefix: bytes):
    self.target = target  # the descriptor that the pipe replaces
    self.tail = b""
    self._prefix = prefix
    self._source, self.sink = os.pipe()
    self._finished = _thread.allocate_lock()

  def start(self) -> None:
    """Starts to copy, in a thread, what the holder of `sink` writes."""
    os.close(self.sink)
    self._finished.acquire()
    _thread.start_new_thread(self._copy, ())

  def finish(self) -> None:
    """Waits until the pipe is read to its end.

    A process that outlives the command may hold the pipe open: what it has not
    written after one second is not waited for.
    """
    self._finished.acquire(timeout=1.0)

  def _copy(self) -> None:
    line = b""  # what has come of a line that is to be prefixed
    while chunk := os.read(self._source, 65536):
      self.tail = (self.tail + chunk)[-_TAIL:]
      if self._prefix:
        *lines, line = (line + chunk).split(b"\n")
        chunk = b"".join(self._prefix + each + b"\n" for each in lines)
      _write(self.target, chunk)
    if line:
      _write(self.target, self._prefix + line + b"\n")
    self._finished.release()


def _write(target: int, chunk: bytes) -> None:
  try:
    while chunk:
      chunk = chunk[os.write(target, chunk) :]
  except OSError:
    pass  # nobody reads any more, and the command need not know


def _spawn(
  command: list[str],
  environ: dict[str, str],
  *,
  death_signal: int,
  pumps: list[_Pump] | None = None,
) -> int:
  """Starts a command that gets `death_signal` when this process dies."""
  parent = os.getpid()
  prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
  pid = os.fork()
  if pid:
    return pid
  try:
    for pump in pumps or ():
      os.dup2(pump.sink, pump.target)
    if prctl is not None:
      prctl(_PR_SET_PDEATHSIG, int(death_signal))
      if os.getppid() != parent:
        os._exit(128 + death_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
    # Python ignores these two; the command expects their default.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execvpe(command[0], command, environ)
  except OSError as error:
    _say(f"jfog run: cannot run {command[0]}: {error.strerror}\n")
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
  finally:
    os._exit(126)


def _reaped(pid: int) -> int | None:
  """Returns the exit code of a child, -n for signal n, None if it runs."""
  ended, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if ended else None


def _shell_code(code: int) -> int:
  return code if code >= 0 else 128 - code


def _self() -> list[str]:
  # Isolated from PYTHON* variables and site-packages, which are the command's.
  return [sys.executable, "-I", "-S", os.path.join(_PACKAGE, "launch.py")]


def _first(environ, *names: str) -> str:
  """Returns the first of these variables that is set, else "0"."""
  return next((environ[name] for name in names if name in environ), "0")


def _gpus() -> int:
  directory = "/proc/driver/nvidia/gpus"
  return len(os.listdir(directory)) if os.path.isdir(directory) else 0


def _last_traceback(text: str) -> str:
  """Returns the last traceback with the exceptions it was chained from."""
  head = "Traceback (most recent call last):"
  chained = (
    "During handling of the above exception, another exception occurred:\n\n",
    "The above exception was the direct cause of the following exception:\n\n",
  )
  start = text.rfind(head)
  while start > 0 and text[:start].endswith(chained):
    earlier = text.rfind(head, 0, start)
    if earlier < 0:
      break
    start = earlier
  if start < 0:
    return ""
  return text[text.rfind("\n", 0, start) + 1 :]


def _last_lines(text: str, count: int = 30) -> str:
  return "\n".join(text.split("\n")[-count:])


def _say(text: str) -> None:
  sys.stdout.flush()
  _write(2, text.encode(errors="replace"))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--rank-main"]:
    sys.stdout.flush()
    os._exit(_rank_main(sys.argv[2:]))
  sys.exit(main())
