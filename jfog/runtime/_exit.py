"""The end of a process: atexit and excepthook, for MPI, NCCL and mpi4py."""

import atexit
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import jax

from jfog import _compat
from jfog.runtime import _extensions, _rank_process, _recording


@functools.cache
def mpi4py_ends_mpi() -> bool:
  """Whether mpi4py started MPI in this process, and so finalizes it at exit.

  Cached at the first call, which comes before jfog itself starts MPI: later
  mpi4py would report jfog's MPI as initialized, too.
  """
  theirs = sys.modules.get("mpi4py.MPI")
  return theirs is not None and theirs.Is_initialized()


# Called at a clean end, when all operations have completed, before MPI's end.
before_finish: Callable[[], None] | None = None


@functools.cache
def install_hooks() -> None:
  """Installs the exit hooks: a clean end of MPI, and a failure that is fast.

  A rank that ends normally drains its operations and finalizes MPI, which waits
  for all ranks. A rank that fails by an exception must not: its peers may wait
  for a message of it, and MPI_Finalize would wait for them.
  """
  atexit.register(_finish)
  _compat.report_failures(_failure)
  os.register_at_fork(after_in_child=_compat.forget_backends)
  previous = sys.excepthook

  def excepthook(
    kind: type[BaseException],
    value: BaseException,
    traceback: types.TracebackType | None,
  ) -> None:
    # An interactive process continues, and a fork's end is not the rank's.
    ends = not hasattr(sys, "ps1") and _rank_process.is_rank()
    if ends:
      _rank_process.mark("failing")  # before the launcher reads the traceback
    previous(kind, value, traceback)
    if not ends:
      return
    # Pending waits for peers fail at once and MPI is not finalized. The launcher
    # then observes a nonzero exit code and ends the other ranks.
    atexit.unregister(_finish)
    _recording.end_open(alone=True)
    _abandon(f"this rank failed with {kind.__name__}: {value}")

  sys.excepthook = excepthook


def wait_for_operations() -> str:
  """Waits for the operations so far; returns the error of one that failed.

  Its program may have raised it already, or never, if its results were dropped.
  """
  try:
    jax.effects_barrier()
  except Exception as error:
    _compat.reset_runtime_tokens()
    return str(error)
  return _failure()


def _failure() -> str:
  """The error of an open communicator that has failed; "" if none has."""
  return next((text for m in _in_use() for text in m.failures()), "")


def _abandon(reason: str) -> None:
  """Fails all operations, and skips every wait for peers at exit."""
  # JAX's own hook waits for effects after this one, and would raise the failure.
  _compat.report_failures(None)
  for module in _in_use():
    module.abandon(reason)
  if mpi4py_ends_mpi():
    # The exit hook of mpi4py would call MPI_Finalize, which waits for the peers;
    # with an abort status it calls MPI_Abort.
    from mpi4py import run

    run.set_abort_status(1)


def _finish() -> None:
  """Completes what is in flight, then finalizes the native modules."""
  if not _rank_process.is_rank():
    return
  # Operations in flight need their peers and MPI, so they come first.
  error = wait_for_operations()
  if not error and before_finish is not None:
    before_finish()
  if error or not _recording.is_any():
    _recording.end_open(alone=True)
  else:
    # After all ranks have announced their end, so that none waits for one that
    # compares clocks here.
    left = _extensions.mpi().leave()
    _recording.end_open(alone=not left)
    _recording.merge_closed(left)
  if error:
    print(f"jfog: an operation failed at exit: {error}", file=sys.stderr)
    _rank_process.mark_failure_at_exit(error)
    _abandon(f"an operation failed at exit: {error}")
  for module in _in_use():
    module.finish()


def _in_use() -> list[Any]:
  """The loaded native modules; NCCL, which depends on MPI, comes first."""
  nccl = _extensions.nccl.cache_info().currsize > 0
  return [*([_extensions.nccl()] if nccl else []), _extensions.mpi()]
