"""The wrapper of one rank: its environment, its output, its signals."""

import os
import signal
import time
from collections.abc import Mapping

from . import marks, output, processes, report

# Seconds that a failed rank waits for mpirun to read its output, and for a daemon of
# another host to pass its record on.
_READ_WITHIN = 2.0
_PASSED_ON_WITHIN = 0.5


def rank_environment(
  environ: dict[str, str], *, cores: int, gpus: int
) -> dict[str, str]:
  """Returns the environment of one rank's command.

  The cores of a machine are divided between its ranks, at least one each, and
  each rank sees one GPU. Variables that the user has set are kept, but a list
  in `CUDA_VISIBLE_DEVICES` is dealt out to the ranks.

  Args:
    environ: the environment of the wrapper, in which MPI sets the number of
      ranks of this machine.
    cores: the number of cores that the ranks of this machine may use.
    gpus: the number of GPUs of this machine.
  """
  ranks = int(_first(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
  if marks.job(environ) != "-":  # all are on this machine
    ranks -= int(_first(environ, "JFOG_SPARES"))  # which compute nothing
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


def rank_main(arguments: list[str]) -> int:
  """Runs the command of one rank and returns its exit code.

  Signals are blocked and taken by `sigtimedwait`, together with SIGCHLD, so that
  one loop forwards signals, reaps the command and watches mpirun.

  Args:
    arguments: `[--tag-output] [--all-tracebacks] [--output-dir DIR] -- command
      ...`.
  """
  split = arguments.index("--")
  tagged = "--tag-output" in arguments[:split]
  is_shown = "--all-tracebacks" in arguments[:split]
  folder = ""
  if "--output-dir" in arguments[:split]:
    folder = arguments[arguments.index("--output-dir") + 1]
  # Without the colon that the launcher puts before a word of colons.
  command = [w[set(w) == {":"} :] for w in arguments[split + 1 :]]
  signal.pthread_sigmask(signal.SIG_BLOCK, processes.WAITED)
  rank = _first(os.environ, "OMPI_COMM_WORLD_RANK", "PMI_RANK")
  marks.leave(int(rank), "begun")
  environ = rank_environment(
    dict(os.environ), cores=len(os.sched_getaffinity(0)), gpus=gpus()
  )
  environ["JFOG_RUN_JOB"] = marks.job(os.environ)
  prefix = f"[{rank}] ".encode() if tagged else b""
  files = [_file(folder, f"rank-{rank}{end}") for end in (".out", ".err")]
  lines = [output.Prefixed(prefix)] if tagged else []
  held = output.WithoutTraceback(prefix, lambda: marks.is_failing(int(rank)))
  if tagged:
    environ.setdefault("PYTHONUNBUFFERED", "1")  # a pipe would delay lines
  parent = os.getppid()
  leader = os.getpgrp() == os.getpid()
  # The files get what the command writes, before it is tagged or held back.
  stderr = processes.Pump(2, *files[1], *lines, held)
  stdout = None
  if tagged or folder:
    lines = [output.Prefixed(prefix)] if tagged else []
    stdout = processes.Pump(1, *files[0], *lines)
  pumps = [pump for pump in (stdout, stderr) if pump]
  pid = processes.spawn(
    command, environ, death_signal=signal.SIGKILL, pumps=pumps
  )
  for pump in pumps:
    pump.start()
  torn_down = False
  while True:
    event = signal.sigtimedwait(processes.WAITED, 0.5)
    if event is not None and event.si_signo in processes.FORWARDED:
      # mpirun signals the whole process group of a rank: if this process leads
      # the group, the command has received the signal already.
      from_mpirun = event.si_pid == parent
      torn_down |= from_mpirun and event.si_signo in processes.ENDING
      if not (from_mpirun and leader):
        os.kill(pid, event.si_signo)
      continue
    code = processes.reaped(pid)
    if code is not None:
      break
    if os.getppid() != parent:  # mpirun was killed, so the job is over
      os.killpg(0, signal.SIGKILL) if leader else os.kill(pid, signal.SIGKILL)
  ended = time.time()
  fault_tolerant = os.environ.get("JFOG_FAULT_TOLERANT") == "1"
  for pump in pumps:
    # In a job that outlives this rank, the others may wait for the end of it.
    pump.finish(0.2 if fault_tolerant else 1.0)
  is_reported = False
  if code:
    is_reported = report.leave_record(
      int(rank),
      code,
      ended,
      stderr.tail,
      torn_down=torn_down,
      held=held.held,
      is_shown=is_shown,
    )
  elif not (torn_down or marks.leave(int(rank), "ended")) and fault_tolerant:
    report.send_end(int(rank))
  if not is_reported:
    stderr.write(held.held)
  if code and not torn_down and not fault_tolerant:
    # mpirun ends the job, and drops what it has not read or passed on.
    for target in (1, 2):
      processes.wait_for_reader(target, _READ_WITHIN)
    if not is_reported:
      time.sleep(_PASSED_ON_WITHIN)
  if fault_tolerant:
    # Of the ways in which this process can end, Open MPI takes a signal alone for one
    # that the other ranks are to know. A rank that ends in order is gone, too.
    os.kill(os.getpid(), signal.SIGKILL)
  return processes.shell_code(code)


def _file(folder: str, name: str) -> list[output.Filter]:
  """The filter that copies output into a file; none without a folder."""
  if not folder:
    return []
  try:
    os.makedirs(folder, exist_ok=True)
    return [output.Copied(os.path.join(folder, name))]
  except OSError as error:
    processes.say(f"jfog run: --output-dir {folder}: {error.strerror}\n")
    return []


def _first(environ: Mapping[str, str], *names: str) -> str:
  """Returns the first of these variables that is set, else "0"."""
  return next((environ[name] for name in names if name in environ), "0")


def gpus() -> int:
  """The number of GPUs of the NVIDIA driver, read without loading CUDA."""
  directory = "/proc/driver/nvidia/gpus"
  return len(os.listdir(directory)) if os.path.isdir(directory) else 0
