"""The recorder of one rank: its spans, and the thread that writes its part."""

import base64
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# Of the ring of each thread; 8 MB. An operation has about ten.
EVENTS = 131072
_EVERY = 0.25  # seconds between two writes

_current: "Recorder | None" = None


def current() -> "Recorder | None":
  """The recorder that runs."""
  return _current


class Recorder:
  """Writes what this rank does to a part, until `stop`.

  A thread writes every quarter of a second, so that the part of a rank that is
  killed ends shortly before.
  """

  def __init__(self, path: str, header: dict[str, Any], native: Any = None):
    """Opens the part.

    Args:
      path: of the part.
      header: its first line; `world` and `rank` mark the clock in profiles.
      native: `jfog._mpi`, whose events are recorded, too.

    Raises:
      OSError: if the file cannot be written.
    """
    self.path = path
    self.lost = 0
    self.error = ""  # why the part is not complete
    self._marks = {"jfog_world": header["world"], "jfog_rank": header["rank"]}
    self._native = native
    self._spans: list[tuple[str, int, int, int]] = []
    self._threads: dict[int, str] = {}
    self._num_names = 0
    self._process = os.getpid()
    self._ended = threading.Event()
    # Without a buffer, which a fork would write again.
    self._file = open(path, "wb", buffering=0)  # noqa: SIM115
    self._put("header", header)

  def start(self, events: int = EVENTS) -> None:
    """Begins; `events` is the room in the ring of each native thread."""
    global _current
    if self._native is not None:
      self._native.begin_timeline(events)
    self._thread = threading.Thread(
      target=self._write_regularly, name="jfog timeline", daemon=True
    )
    _current = self
    self._thread.start()

  def discard(self) -> None:
    """Removes the part of a recording that does not start."""
    self._file.close()
    os.remove(self.path)

  def put_clock(self, clock: tuple[int, int, int]) -> None:
    """Writes the difference to rank 0's clock, as `measure_clock` returns it."""
    self._put("clock", clock)

  def pause(self) -> None:
    """Records nothing more; what was recorded is written by `stop`."""
    global _current
    if self._native is not None:
      self._native.end_timeline()
    if _current is self:
      _current = None

  def stop(self) -> None:
    """Ends the recording, and completes the part."""
    self.pause()
    if os.getpid() != self._process:
      return  # a fork, which has no such thread
    self._ended.set()
    self._thread.join()
    try:
      self._write()
      self._put("end", {"lost": self.lost})
      self._file.close()
    except OSError as error:
      self.error = self.error or str(error)

  def add_span(self, name: str, begin: int, end: int) -> None:
    """Records a span of the calling thread."""
    thread = threading.get_ident()
    if thread not in self._threads:
      self._threads[thread] = threading.current_thread().name
    self._spans.append((name, begin, end, thread))  # atomic

  def annotation(self, name: str) -> Any:
    """A mark for `jax.profiler`, with the clock of the timeline."""
    return _annotation(name, jfog_ns=time.monotonic_ns(), **self._marks)

  def _write_regularly(self) -> None:
    while not self._ended.wait(_EVERY):
      if "jax" in sys.modules:
        with self.annotation("jfog.clock"):
          pass
      try:
        self._write()
      except OSError as error:
        self.error = str(error)
        return

  def _write(self) -> None:
    if self._native is not None:
      events, lost = self._native.read_timeline()
      self.lost += lost
      names = self._native.timeline_names()
      if len(names) > self._num_names:
        self._num_names = len(names)
        self._put("names", names)
      if events:
        self._put("events", base64.b64encode(events).decode())
      if lost:
        self._put("lost", lost)
    spans, self._spans = self._spans, []
    if spans:
      self._put("threads", dict(self._threads))
      self._put("spans", spans)

  def _put(self, key: str, value: Any) -> None:
    self._file.write((json.dumps({key: value}) + "\n").encode())


def _annotation(name: str, **marks: Any) -> Any:
  import jax

  return jax.profiler.TraceAnnotation(name, **marks)


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
  """Records a part of the program under a name: `with jfog.span("forward"):`.

  The span is that of the Python code inside, on this rank and thread; nothing is
  sent. It is part of `jfog.timeline`, and an annotation of `jax.profiler`. Without
  either it costs about a microsecond.

  JAX dispatches programs asynchronously: around a call of a jitted function the
  span ends when the program is dispatched, which on CPUs may be before it has
  ended. Call `jax.block_until_ready` inside to measure the program itself. Inside of
  a jitted function it is the time of tracing, once; `jax.named_scope` names parts of
  the program there.

  Args:
    name: of the span; equal names may nest and repeat.

  Raises:
    TypeError: if `name` is not a string.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> with jfog.span("forward"):
    ...   y = jax.block_until_ready(jnp.ones(3) * 2)
  """
  if not isinstance(name, str):
    raise TypeError(f"span: name={name!r} must be a string.")
  recorder = _current
  if recorder is None:
    if "jax" in sys.modules:
      with _annotation(name):
        yield
    else:
      yield
    return
  begin = time.monotonic_ns()
  try:
    with recorder.annotation(name):
      yield
  finally:
    recorder.add_span(name, begin, time.monotonic_ns())
