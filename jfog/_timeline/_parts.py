"""Parts of a timeline: the file of one rank, read back."""

import base64
import dataclasses
import json
import struct
from typing import Any

# The layout of `TimelineEvent` in xla_ops/mpi/timeline.h.
_EVENT = struct.Struct("<qqQQQQIiQ")
BEGIN, POSTED, SENT, RECEIVED, STARTED = range(5)
AWAITED, PHASE, PUT, GOT, END = range(5, 10)


@dataclasses.dataclass
class Operation:
  """An operation as one rank has recorded it; times in ns, ranks of the world.

  Attributes:
    name: its name.
    sequence: its number on its communicator.
    communicator: 0 for the world, else the number of the part.
    bytes: those of its leaves.
    begin: when it was started.
    posted: the end of the post; 0 before.
    end: its end, or the last event of one that has not ended.
    has_ended: whether it ended.
    failed: whether it ended with an error.
    is_split: whether `..._start` has made it.
    awaited: when `jfog.wait` was called on it; 0 before.
    phases: names, begins and ends.
    sent: times, peers and bytes of messages.
    received: likewise, of the first part of each.
    transfers: whether it is a put, begins, ends, peers and bytes; of windows.
    threads: the threads of the system that have worked on it.
  """

  name: str
  sequence: int
  communicator: int
  bytes: int
  begin: int
  posted: int = 0
  end: int = 0
  has_ended: bool = False
  failed: bool = False
  is_split: bool = False
  awaited: int = 0
  phases: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
  sent: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
  received: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
  transfers: list[tuple[bool, int, int, int, int]] = dataclasses.field(
    default_factory=list
  )
  threads: list[int] = dataclasses.field(default_factory=list)

  @property
  def title(self) -> str:
    """As in error texts: `neighbor_allreduce #41`."""
    return f"{self.name} #{self.sequence}"


@dataclasses.dataclass
class Part:
  """The record of one rank.

  Attributes:
    world: the mark of the recording, equal on its ranks.
    rank: the rank.
    size: the number of ranks.
    host: the name of its host.
    process: the number of its process.
    clocks: measurements of rank 0's clock minus this one's: least and largest
      difference, and the time of this rank; in ns.
    operations: by their begin.
    spans: names, begins, ends and threads of Python.
    threads: names of these threads.
    lost: native events that were overwritten.
    is_complete: whether the rank has completed it.
  """

  world: str
  rank: int
  size: int
  host: str
  process: int
  clocks: list[tuple[int, int, int]]
  operations: list[Operation]
  spans: list[tuple[str, int, int, int]]
  threads: dict[int, str]
  lost: int
  is_complete: bool


def read(path: str) -> Part:
  """Reads a part; the last line of a rank that was killed may be cut off.

  Raises:
    ValueError: if it is not a part.
  """
  lines: dict[str, list[Any]] = {}
  with open(path, encoding="utf-8") as file:
    for text in file:
      try:
        line = json.loads(text)
      except ValueError:
        break
      for key, value in line.items():
        lines.setdefault(key, []).append(value)
  try:
    (header,) = lines["header"]
    own = {name: header[name] for name in ("world", "rank", "size")}
    host, process = header["host"], header["process"]
  except (KeyError, ValueError, TypeError):
    raise ValueError(
      f"{path} is not the part of a timeline; jfog writes NAME.rank-N."
    ) from None
  names = lines.get("names", [[]])[-1]
  events = b"".join(base64.b64decode(text) for text in lines.get("events", []))
  spans = [tuple(span) for spans in lines.get("spans", []) for span in spans]
  return Part(
    **own,
    host=host,
    process=process,
    clocks=[tuple(clock) for clock in lines.get("clock", [])],
    operations=_operations(events, names),
    spans=spans,
    threads={int(k): v for k, v in lines.get("threads", [{}])[-1].items()},
    lost=sum(lines.get("lost", [])),
    is_complete="end" in lines,
  )


def _operations(events: bytes, names: list[str]) -> list[Operation]:
  """The operations whose begin is among the events."""
  # Those of one operation come from several threads, and so from several rings. The
  # kind breaks ties: an operation begins before all and ends after all.
  ordered = sorted(
    (event[2], event[0] + event[1], event[6] & 255, event)
    for event in _EVENT.iter_unpack(events[: len(events) // 64 * 64])
  )
  found: dict[int, Operation] = {}
  for number, end, kind, event in ordered:
    begin, _, _, sequence, size, name, word, peer, thread = event
    if kind == BEGIN:
      found[number] = Operation(names[name], sequence, word >> 8, size, begin)
    operation = found.get(number)
    if operation is None:
      continue  # began before the timeline, or its begin is lost
    if kind != AWAITED:  # `jfog.wait` may come after the end
      operation.end = max(operation.end, end)
    if thread not in operation.threads:
      operation.threads.append(thread)
    if kind == POSTED:
      operation.posted = end
    elif kind == SENT:
      operation.sent.append((end, peer, size))
    elif kind == RECEIVED:
      operation.received.append((end, peer, size))
    elif kind == STARTED:
      operation.is_split = True
    elif kind == AWAITED:
      operation.awaited = end
    elif kind == PHASE:
      operation.phases.append((names[name], begin, end))
    elif kind in (PUT, GOT):
      operation.transfers.append((kind == PUT, begin, end, peer, size))
    elif kind == END:
      operation.has_ended, operation.failed = True, bool(size)
  for operation in found.values():
    if not operation.has_ended:
      operation.end = max(operation.end, operation.awaited)
  return sorted(found.values(), key=lambda operation: operation.begin)
