"""The recording of a timeline by all ranks: its begin and its end, which they agree on."""

import atexit
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from jfog import _timeline
from jfog.runtime import _extensions, _rank_process
from jfog.runtime._communicator import Communicator
from jfog.runtime._process_communicator import ProcessCommunicator

_VARIABLE = "JFOG_TIMELINE"
_NAME = "timeline.json"

_open: "Recording | None" = None
_closed: "list[Recording]" = []  # by `shutdown`, and not merged


class Recording:
  """A timeline that is recorded into a file."""

  def __init__(self, path: str, comm: Communicator | None, events: int):
    """Begins it. Collective over `comm`, which is None for this process alone.

    Raises:
      OSError: if some rank cannot write its part.
    """
    global _open
    self.path = path
    self.comm = comm if isinstance(comm, ProcessCommunicator) else None
    rank, size = (self.comm.rank, self.comm.size) if self.comm else (0, 1)
    world = self._agree(secrets.token_hex(8))[0]
    header = {
      "world": world,
      "rank": rank,
      "size": size,
      "host": socket.gethostname(),
      "process": os.getpid(),
    }
    error, recorder = "", None
    try:
      os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
      recorder = _timeline.Recorder(
        f"{path}.rank-{rank}", header, self._native()
      )
    except OSError as caught:
      error = caught.strerror or str(caught)
    # All ranks raise, so that none waits for one that has raised.
    errors = [text.strip() for text in self._agree(f"{error[:80]:80}")]
    failed = [k for k, text in enumerate(errors) if text]
    if failed:
      if recorder is not None:
        recorder.discard()
      raise OSError(
        f"timeline: ranks {failed} cannot write {path}.rank-N: "
        f"{errors[failed[0]]}; name a file in a folder that each rank can write."
      )
    assert recorder is not None
    self.recorder = recorder
    recorder.start(events)
    try:
      self._compare_clocks()
    except RuntimeError:
      recorder.stop()
      raise
    _open = self

  def end(self, *, alone: bool = False) -> None:
    """Ends it, and merges the parts that this host has.

    Args:
      alone: after a failure of this rank: without the others, and without a merge.
    """
    global _open
    if _open is not self:
      return
    _open = None
    self.recorder.pause()
    if not alone:
      try:
        self._compare_clocks()
      except RuntimeError as error:
        print(f"jfog: timeline: {error}", file=sys.stderr)
        alone = True
    self.recorder.stop()
    if self.recorder.error:
      _warn(f"the part of this rank is not complete: {self.recorder.error}")
    if self.recorder.lost:
      _warn(
        f"{self.recorder.lost} events of this rank were overwritten before they were "
        f"written; pass a larger `events`"
      )
    if alone:
      return
    try:
      self._agree("0")  # all parts are complete
    except RuntimeError as error:
      print(f"jfog: timeline: {error}", file=sys.stderr)
      return
    if self.comm is None or self.comm.rank == 0:
      self.merge()

  def merge(self) -> None:
    """Merges the parts that this host has."""
    try:
      for text in _timeline.merge(self.path):
        _warn(text)
    except (OSError, ValueError) as error:
      _warn(str(error))

  def _native(self) -> Any:
    return None if self.comm is None else _extensions.mpi()

  def _agree(self, text: str) -> list[str]:
    """The texts of all ranks, of one length."""
    if self.comm is None:
      return [text]
    found = _extensions.mpi().gather(self.comm.context, text.encode())
    return [each.decode(errors="replace") for each in found]

  def _compare_clocks(self) -> None:
    if self.comm is not None:
      clock = _extensions.mpi().measure_clock(self.comm.context)
      self.recorder.put_clock(clock)


def _warn(text: str) -> None:
  warnings.warn(f"timeline: {text}.", RuntimeWarning, stacklevel=4)


def begin(
  path: str, comm: Communicator | None, events: int = _timeline.EVENTS
) -> Recording:
  """Begins a recording.

  Raises:
    RuntimeError: if there is one.
    OSError: if some rank cannot write its part.
  """
  if _open is not None:
    by = os.environ.get(_VARIABLE)
    raise RuntimeError(
      f"timeline: one is recorded already, into {_open.path}; end it first"
      f"{f', or unset {_VARIABLE}' if by else ''}."
    )
  return Recording(path, comm, events)


def begin_from_environment(
  comm: Communicator, environ: Mapping[str, str]
) -> None:
  """Begins one in the folder that JFOG_TIMELINE names, if none is recorded."""
  folder = environ.get(_VARIABLE)
  if not folder or _open is not None:
    return
  recording = None
  if isinstance(comm, ProcessCommunicator):
    # Rank 0 chooses a name that it has not used: other worlds, and jobs, may have
    # recorded into the folder.
    names = _extensions.mpi().gather(
      comm.context, f"{_free(folder):8d}".encode()
    )
    ordinal = int(names[0])
    recording = begin(_path(folder, ordinal), comm)
  elif not _is_descendant(environ):
    recording = begin(_path(folder, _free(folder)), None)
    atexit.register(recording.end)
  del recording  # `end_open` finds it


def begin_in_next_world(comm: Communicator, environ: Mapping[str, str]) -> None:
  """Begins one as `begin_from_environment` does, after a recovery.

  Collective over the new world. If that fails, as where one more rank does, this rank
  goes on without a recording: the error is that of its next operation.
  """
  try:
    begin_from_environment(comm, environ)
  except (RuntimeError, OSError) as error:
    print(f"jfog: timeline: {error}", file=sys.stderr)


def _is_descendant(environ: Mapping[str, str]) -> bool:
  """Whether a rank has started this process, which then is not part of the job."""
  return bool(environ.get("JFOG_RANK_PROCESS")) and not _rank_process.is_rank()


def _path(folder: str, ordinal: int) -> str:
  stem, end = os.path.splitext(_NAME)
  name = _NAME if ordinal == 1 else f"{stem}-{ordinal}{end}"
  return os.path.join(folder, name)


def _free(folder: str) -> int:
  """The least ordinal of a timeline that the folder does not have."""
  ordinal = 1
  while os.path.exists(_path(folder, ordinal)) or _timeline.find_parts(
    _path(folder, ordinal)
  ):
    ordinal += 1
  return ordinal


def is_any() -> bool:
  """Whether there is a recording, or one that this rank has ended alone."""
  return _open is not None or bool(_closed)


def end_open(*, alone: bool = False) -> None:
  """Ends the recording, if there is one."""
  if _open is not None:
    if alone:
      _closed.append(_open)
    _open.end(alone=alone)


def merge_closed(all_left: bool) -> None:
  """Merges what was recorded until a shutdown, when all ranks have ended."""
  for recording in _closed if all_left else []:
    if recording.comm is None or recording.comm.rank == 0:
      recording.merge()
  _closed.clear()


os.register_at_fork(after_in_child=lambda: _forget())


def _forget() -> None:
  """Leaves the recording to the process that this one was forked from."""
  global _open
  if _open is not None:
    _open.recorder.pause()
  _open = None
  _closed.clear()
