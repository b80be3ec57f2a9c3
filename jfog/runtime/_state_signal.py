"""SIGUSR1: prints where each rank is, and its operations in flight."""

import contextlib
import faulthandler
import signal
import sys
import threading

from jfog.runtime import _extensions


def install() -> None:
  """Prints the state of this rank at SIGUSR1, if nothing else handles it.

  A handler of the program, installed before or after, takes the place of this
  one. The state is printed although the main thread may be blocked: the traceback
  by `faulthandler` in the signal handler, and the operations by a thread of C++.
  """
  # Python's own view is looked at as well, since another thread may change it.
  if threading.current_thread() is not threading.main_thread():
    return
  if signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
    return
  if not _extensions.mpi().handle_state_signal(int(signal.SIGUSR1)):
    return
  if (stderr := sys.__stderr__) is None:
    return
  # Where stderr has no file, the operations are printed alone.
  with contextlib.suppress(OSError, RuntimeError, ValueError):
    # After the traceback it calls the handler before it, which is C++'s.
    faulthandler.register(
      signal.SIGUSR1, file=stderr, all_threads=False, chain=True
    )
