"""`jfog.timeline`: what all ranks do, recorded into one file."""

import contextlib
import os
from collections.abc import Iterator

import jax

from jfog import _validation
from jfog._timeline import EVENTS
from jfog.runtime import _bootstrap, _recording
from jfog.runtime._communicator import NotInitializedError
from jfog.runtime._world import world


@contextlib.contextmanager
def timeline(
  path: "str | os.PathLike[str]", *, events: int = EVENTS
) -> Iterator[None]:
  """Records what all ranks do into a file in Chrome's trace format.

  Perfetto (ui.perfetto.dev), `chrome://tracing` and speedscope open the file. It has
  a process for each rank, on one clock: the operations of MPI with their phases, an
  arrow for each message, the spans of `jfog.span`, and counters of bytes sent to and
  time waited for each peer. In simulation, on a mesh and with NCCL the spans are
  recorded alone; there XLA moves the data, and `jax.profiler` shows it.

  Collective over the world at its begin and its end: there it waits for the
  operations so far, and the clocks of the ranks are compared with rank 0's by
  messages. Each rank writes its part, `path.rank-N`, while it runs; rank 0 merges
  them at the end, and removes them if all are on its host. `jfog timeline merge`
  merges them later. `jfog run --timeline DIR` records a whole job, without a change
  of the script.

  If the body raises on some rank, that rank ends its part without the others and
  nothing is merged. A call of `jfog.recover` in the body ends the recording: a timeline
  is that of one world.

  Args:
    path: of the merged file; equal on all ranks.
    events: the room in the ring of each native thread, 64 bytes each. A ring is
      written to the part four times a second. Events beyond are lost, which a
      `RuntimeWarning` and the file count.

  Raises:
    TypeError: if `path` is not a path, or `events` not an integer.
    ValueError: if `events` is not positive.
    RuntimeError: if a timeline is recorded already.
    NotInitializedError: in a job of MPI before `jfog.init`.
    OSError: on all ranks, if one cannot write its part.

  Example:
    >>> import json, os, tempfile, jfog
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = os.path.join(folder, "run.json")
    ...   with jfog.timeline(path):
    ...     with jfog.span("forward"):
    ...       pass
    ...   with open(path) as file:
    ...     events = json.load(file)["traceEvents"]
    >>> [event["name"] for event in events if event["ph"] == "X"]
    ['forward']

  Source: the timeline of Horovod and BlueFog; the Trace Event Format of Chrome.
  """
  try:
    text = os.fspath(path)
  except TypeError:
    text = b""
  if not isinstance(text, str):
    raise TypeError(f"timeline: path={path!r} must be a path.")
  events = _validation.positive(events, "events")
  comm = world()
  if comm is None and _bootstrap.launched_size() is not None:
    raise NotInitializedError(
      "timeline: this process is a rank of a job; call jfog.init() first."
    )
  # The ranks agree by collectives of MPI, as operations do about a new graph: all
  # ranks have to start these in one order.
  jax.effects_barrier()
  recording = _recording.begin(text, comm, events)
  try:
    yield
    jax.effects_barrier()
  except BaseException:
    recording.end(alone=True)
    raise
  recording.end()
