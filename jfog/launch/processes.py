"""Processes: starting and reaping a command, and copying its output."""

import _thread
import contextlib
import ctypes
import os
import signal
import sys
import time

from . import output

_TAIL = 64 * 1024  # bytes of stderr that a wrapper keeps
_PR_SET_PDEATHSIG = 1
FORWARDED = (
  signal.SIGTERM,
  signal.SIGINT,
  signal.SIGHUP,
  signal.SIGQUIT,
  signal.SIGUSR1,
  signal.SIGUSR2,
)
ENDING = FORWARDED[:4]  # those that end a job
WAITED = (*FORWARDED, signal.SIGCHLD)


class Pump:
  """Copies a pipe to a file descriptor and keeps the last of its bytes.

  Args:
    target: the descriptor that the pipe replaces.
    filters: what the bytes go through, one after the other.
  """

  def __init__(self, target: int, *filters: output.Filter):
    self.target = target
    self.tail = b""
    self._filters = filters
    self._source, self.sink = os.pipe()
    self._finished = _thread.allocate_lock()

  def start(self) -> None:
    """Starts the thread that copies the output of the holder of `sink`."""
    os.close(self.sink)
    self._finished.acquire()
    _thread.start_new_thread(self._copy, ())

  def finish(self, timeout: float = 1.0) -> None:
    """Waits for the end of the pipe, at most so many seconds.

    A process that outlives the command may hold the pipe open for longer; its
    later output is dropped.
    """
    self._finished.acquire(timeout=timeout)

  def write(self, chunk: bytes) -> None:
    """Writes bytes that have gone through all filters."""
    _write(self.target, chunk)

  def _copy(self) -> None:
    while True:
      self._expire()
      if not (chunk := os.read(self._source, 65536)):
        break
      # Before the write, which blocks while the terminal is stopped.
      self.tail = (self.tail + chunk)[-_TAIL:]
      self.write(self._through(chunk, 0))
    for k, each in enumerate(self._filters):
      self.write(self._through(each.finish(), k + 1))
    self._finished.release()

  def _through(self, chunk: bytes, first: int) -> bytes:
    """The chunk after the filters from the one of this number on."""
    for each in self._filters[first:]:
      chunk = each.feed(chunk)
    return chunk

  def _expire(self) -> None:
    """Waits for something to read; lets filters go on whose time has come."""
    import select

    while True:
      until, k = min(
        ((each.until, k) for k, each in enumerate(self._filters)),
        default=(float("inf"), 0),
      )
      if until == float("inf"):
        return
      wait = max(0.0, until - time.monotonic())
      if select.select([self._source], [], [], wait)[0]:
        return
      self.write(self._through(self._filters[k].expire(), k + 1))


def wait_for_reader(target: int, timeout: float) -> None:
  """Waits until all that was written to a pipe has been read, at most so long."""
  import fcntl
  import stat
  import termios

  end = time.monotonic() + timeout
  with contextlib.suppress(OSError):
    if not stat.S_ISFIFO(os.fstat(target).st_mode):
      return
    while time.monotonic() < end:
      unread = fcntl.ioctl(target, termios.FIONREAD, bytes(4))
      if not any(unread):
        return
      time.sleep(0.005)


def _write(target: int, chunk: bytes) -> None:
  try:
    while chunk:
      chunk = chunk[os.write(target, chunk) :]
  except OSError:
    pass  # the reader has closed its end; the command goes on


def spawn(
  command: list[str],
  environ: dict[str, str],
  *,
  death_signal: int,
  pumps: list[Pump] | None = None,
) -> int:
  """Forks and executes a command; returns its process id.

  The kernel sends it `death_signal` when this process dies, so that no rank
  outlives its wrapper, and no mpirun its launcher.
  """
  parent = os.getpid()
  # Looked up before the fork: after it, only async-signal-safe calls are safe.
  prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
  pid = os.fork()
  if pid:
    return pid
  try:
    # In the child: its output goes into the pipes, whose other ends stay with
    # the parent's threads.
    for pump in pumps or ():
      os.dup2(pump.sink, pump.target)
    if prctl is not None:
      prctl(_PR_SET_PDEATHSIG, int(death_signal))
      # A parent that died before the call above sends no signal any more.
      if os.getppid() != parent:
        os._exit(128 + death_signal)
    # The mask is inherited through exec; the command expects none.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED)
    # Python ignores these two, and exec would pass that on to the command.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execvpe(command[0], command, environ)
  except OSError as error:
    say(f"jfog run: cannot run {command[0]}: {error.strerror}\n")
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)
  finally:
    os._exit(126)


def reaped(pid: int) -> int | None:
  """Returns the exit code of a child, -n for signal n, None if it runs."""
  ended, status = os.waitpid(pid, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if ended else None


def shell_code(code: int) -> int:
  """The exit code by which a shell reports `code`: 128 + n for signal n."""
  return code if code >= 0 else 128 - code


def say(text: str) -> None:
  """Writes to stderr, past Python's buffers."""
  sys.stdout.flush()
  _write(2, text.encode(errors="replace"))
