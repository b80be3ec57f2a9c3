"""The start of MPI between the ranks of a job, within the timeout of `init`."""

import threading
from collections.abc import Callable
from typing import Any

from jfog.runtime import _rank_process

_LOOK = 0.05  # seconds between two looks at a call in progress
# Seconds: processes of one job start seconds apart on a busy machine, so that a
# shorter timeout of operations says nothing about the start.
_LEAST = 15.0

_failure = ""  # why the start failed, which is not repeated in a process


class Start:
  """Calls that wait for all ranks, with one timeout for them together.

  MPI cannot be interrupted in such a call, MPI_Init least of all. So a thread
  makes the call, and is left behind in it after the timeout.
  """

  def __init__(self, timeout: float, size: int | None):
    """Starts no clock: only calls in progress count.

    Args:
      timeout: seconds, of which the start has at least 15.
      size: the number of ranks, None or 0 if it is not known.
    """
    if _failure:
      raise RuntimeError(
        f"jfog.init has failed in this process before, and MPI starts once; "
        f"start the job again. The failure was: {_failure}"
      )
    self.timeout = timeout  # of operations
    self._limit = self._left = max(timeout, _LEAST)
    self._size = size or 0

  def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that releases the GIL while it waits.

    Raises:
      RuntimeError: after the timeout, naming the missing ranks.
    """
    global _failure
    outcome: list[tuple[Any, BaseException | None]] = []
    ended = threading.Event()

    def run() -> None:
      try:
        outcome.append((function(*arguments), None))
      except BaseException as error:
        outcome.append((None, error))
      ended.set()

    threading.Thread(target=run, name="jfog.init", daemon=True).start()
    # Looks are counted and not the wall's time, in which this process may have
    # been suspended.
    while not ended.wait(min(_LOOK, self._left)):
      self._look()
      self._left -= _LOOK
      if self._left <= 0:
        _failure = self._late()
        raise RuntimeError(_failure)
    ((result, error),) = outcome
    if error is not None:
      raise error
    return result

  def _look(self) -> None:
    """Called now and then while a call is in progress."""

  def _late(self) -> str:
    """The text of the error after the timeout."""
    rank = _rank_process.rank()
    of = f" of {self._size}" if self._size else ""
    entered = _rank_process.ranks_with("entered") if self._size else None
    if entered is None:
      others = "other ranks; `jfog run` on one machine would name them"
    elif missing := sorted(set(range(self._size)) - entered):
      others = f"ranks {missing}, which have not called jfog.init"
    else:
      others = "other ranks; all have called jfog.init, is one of them stopped?"
    return (
      f"DEADLINE_EXCEEDED: jfog: init on rank {rank}{of} has waited "
      f"{self._limit:g} s for {others}. All ranks of a job call jfog.init; if "
      f"some only start late, pass a longer jfog.init(timeout=)."
    )
