"""Operations and spans as events of Chrome's trace format."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ._clocks import Clock
from ._parts import Operation, Part

Event = dict[str, Any]

# Tracks of a rank: threads of Python, operations in flight beside each other, its
# accesses to windows of other ranks, and those of other ranks to its own. 0 is the
# idle thread to Perfetto.
_PYTHON, _OPERATIONS, _TRANSFERS, _WINDOWS = 1, 1000, 2000, 3000


class Trace:
  """The events of all ranks; times in ns after `origin`, on rank 0's clock."""

  def __init__(self, parts: Sequence[Part], clocks: Mapping[int, Clock]):
    self.parts = {part.rank: part for part in parts}
    self.clocks = clocks
    self.origin = min(map(self._earliest, parts), default=0)
    self.events: list[Event] = []
    self.matched = self.unmatched = 0  # messages
    self._windows: dict[int, list[Event]] = {}  # accesses, by target
    self._last = _last_ranks(parts, clocks)

  def build(self) -> list[Event]:
    """All events."""
    for rank, part in self.parts.items():
      self._name_process(part)
      self._add_spans(part)
      lanes = _Lanes()
      for operation in part.operations:
        lane = lanes.take(operation.begin, operation.end)
        self._add_operation(rank, operation, _OPERATIONS + lane)
      self._name_lanes(rank, _OPERATIONS, len(lanes), "operations")
      self._add_transfers(part)
      self._add_counters(part)
    self._add_flows()
    for rank, accesses in self._windows.items():
      lanes = _Lanes()
      for event in sorted(accesses, key=lambda event: event["ts"]):
        end = event["ts"] + event.get("dur", 0)
        event["tid"] = _WINDOWS + lanes.take(event["ts"], end)
        flow = event.pop("flow")
        self.events += [event, {**flow, "tid": event["tid"]}]
      self._name_lanes(rank, _WINDOWS, len(lanes), "windows, by other ranks")
    return self.events

  def _earliest(self, part: Part) -> int:
    times = [operation.begin for operation in part.operations[:1]]
    times += [begin for _, begin, _, _ in part.spans]
    times += [at for _, _, at in part.clocks]
    return min(map(self.clocks[part.rank], times), default=0)

  def _at(self, rank: int, time: int) -> float:
    """A time of a rank in microseconds, as the format wants them."""
    return (self.clocks[rank](time) - self.origin) / 1000

  def _span(
    self, rank: int, track: int, begin: int, end: int, **fields: Any
  ) -> Event:
    start = self._at(rank, begin)
    event = {
      "ph": "X",
      "pid": rank + 1,
      "tid": track,
      "ts": start,
      "dur": round(max(self._at(rank, end) - start, 0.0), 3),
      **fields,
    }
    self.events.append(event)
    return event

  def _meta(self, rank: int, track: int, what: str, **args: Any) -> None:
    self.events.append(
      {"ph": "M", "name": what, "pid": rank + 1, "tid": track, "args": args}
    )

  def _name_process(self, part: Part) -> None:
    name = f"rank {part.rank} ({part.host}, process {part.process})"
    self._meta(part.rank, _PYTHON, "process_name", name=name)
    self._meta(part.rank, _PYTHON, "process_sort_index", sort_index=part.rank)

  def _name_lanes(self, rank: int, first: int, count: int, name: str) -> None:
    for lane in range(count):
      title = name if lane == 0 else f"{name} ({lane + 1})"
      self._meta(rank, first + lane, "thread_name", name=title)
      self._meta(
        rank, first + lane, "thread_sort_index", sort_index=first + lane
      )

  def _add_spans(self, part: Part) -> None:
    tracks = {thread: _PYTHON + k for k, thread in enumerate(part.threads)}
    for thread, track in tracks.items():
      name = f"Python: {part.threads[thread]}"
      self._meta(part.rank, track, "thread_name", name=name)
      self._meta(part.rank, track, "thread_sort_index", sort_index=track)
    for name, begin, end, thread in part.spans:
      track = tracks[thread]
      self._span(part.rank, track, begin, end, name=name, cat="span", args={})

  def _add_operation(self, rank: int, op: Operation, track: int) -> None:
    args = {
      "sequence": op.sequence,
      "communicator": op.communicator,
      "bytes": op.bytes,
      "to": sorted({peer for _, peer, _ in op.sent if peer != rank}),
      "from": sorted({peer for _, peer, _ in op.received if peer != rank}),
      "split": op.is_split,
      "ended": op.has_ended,
      "failed": op.failed,
      "threads": op.threads,
    }
    self._span(
      *(rank, track, op.begin, op.end),
      name=op.title,
      cat="operation",
      args=args,
    )
    for name, begin, end, more in phases_of(rank, op, self._waits(rank, op)):
      detail = {"operation": op.title, **more}
      self._span(
        *(rank, track, begin, end), name=name, cat="phase", args=detail
      )

  def _add_transfers(self, part: Part) -> None:
    """One-sided accesses, of which the target itself records nothing."""
    transfers = [
      (begin, end, op, ordinal)
      for op in part.operations
      for ordinal, (_, begin, end, _, _) in enumerate(op.transfers)
    ]
    lanes = _Lanes()
    for begin, end, op, k in sorted(transfers, key=lambda each: each[:2]):
      track = _TRANSFERS + lanes.take(begin, end)
      self._add_transfer(part.rank, op, track, k)
    self._name_lanes(part.rank, _TRANSFERS, len(lanes), "puts and gets")

  def _add_transfer(
    self, rank: int, op: Operation, track: int, ordinal: int
  ) -> None:
    is_put, begin, end, peer, size = op.transfers[ordinal]
    name = "put" if is_put else "get"
    args = {"peer": peer, "bytes": size, "operation": op.title}
    here = self._span(
      *(rank, track, begin, end), name=name, cat="phase", args=args
    )
    there = {
      **here,
      "name": f"{op.name} of rank {rank}",
      "cat": "window",
      "pid": peer + 1,
      "args": {"rank": rank, "operation": op.title, "bytes": size},
    }
    # Windows count their operations each for itself.
    key = self._key(op, rank, peer, f"window {op.begin} {ordinal}")
    last = round(here["ts"] + here["dur"], 3)
    first, second = (here, there) if is_put else (there, here)
    start = self._flow("s", key, first["pid"], track, first["ts"])
    finish = self._flow("f", key, second["pid"], track, last)
    self.events.append(start if is_put else finish)
    there["flow"] = finish if is_put else start
    self._windows.setdefault(peer, []).append(there)
    self.matched += 1

  def _key(self, op: Operation, sender: int, receiver: int, more: Any) -> str:
    """The number of a message, equal at both of its ends."""
    world = next(iter(self.parts.values())).world
    text = f"{world}/{op.communicator}/{op.sequence}/{sender}/{receiver}/{more}"
    return "0x" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  def _flow(
    self, phase: str, key: str, process: int, track: int, time: float
  ) -> Event:
    event = {
      "ph": phase,
      "name": "message",
      "cat": "message",
      "id": key,
      "pid": process,
      "tid": track,
      "ts": time,
    }
    return {**event, "bp": "e"} if phase == "f" else event

  def _add_flows(self) -> None:
    """An arrow for each message whose two ends were recorded."""
    tracks = {
      (event["pid"] - 1, event["name"], event["args"]["communicator"]): event
      for event in self.events
      if event.get("cat") == "operation"
    }

    def end(rank: int, op: Operation, kind: str, time: int, key: str) -> Event:
      track = tracks[rank, op.title, op.communicator]["tid"]
      return self._flow(kind, key, rank + 1, track, self._at(rank, time))

    sent: dict[str, tuple[int, Operation, int]] = {}
    received: dict[str, tuple[int, Operation, int]] = {}
    for rank, part in self.parts.items():
      for op in part.operations:
        for key, time in messages_of(op.sent, rank, op, self._key, True):
          sent[key] = rank, op, time
        for key, time in messages_of(op.received, rank, op, self._key, False):
          received[key] = rank, op, time
    for key in sent.keys() & received.keys():
      for kind, ends in (("s", sent), ("f", received)):
        rank, op, time = ends[key]
        self.events.append(end(rank, op, kind, time, key))
      self.matched += 1
    self.unmatched += len(sent.keys() ^ received.keys())

  def _waits(self, rank: int, op: Operation) -> list[tuple[int, int, int]]:
    """Times, peers and ns of the waits in an operation."""
    waits = [
      (end, end - begin) for name, begin, end in op.phases if name == "wait"
    ]
    if not waits:
      return waits_of(rank, op)
    # MPI reports no rank that a collective waits for: it is the last to come.
    last = self._last.get((op.communicator, op.title), rank)
    return [(end, last, waited) for end, waited in waits if last != rank]

  def _add_counters(self, part: Part) -> None:
    """Cumulative bytes to each peer, and time waited for each."""
    samples = []
    for op in part.operations:
      samples += [
        (time, f"bytes sent to rank {peer}", "bytes", size)
        for time, peer, size in op.sent
        if peer != part.rank
      ]
      samples += [
        (end, f"bytes put to rank {peer}", "bytes", size)
        for is_put, _, end, peer, size in op.transfers
        if is_put
      ]
      samples += [
        (time, f"waited for rank {peer}", "seconds", waited / 1e9)
        for time, peer, waited in self._waits(part.rank, op)
      ]
    totals: dict[str, float] = {}
    for time, name, unit, value in sorted(samples):
      totals[name] = round(totals.get(name, 0) + value, 9)
      self.events.append(
        {
          "ph": "C",
          "name": name,
          "pid": part.rank + 1,
          "tid": _OPERATIONS,
          "ts": self._at(part.rank, time),
          "args": {unit: totals[name]},
        }
      )


def _last_ranks(
  parts: Sequence[Part], clocks: Mapping[int, Clock]
) -> dict[tuple[int, str], int]:
  """For each collective of the world: the rank that was the last to start it."""
  starts: dict[tuple[int, str], list[tuple[int, int]]] = {}
  for part in parts:
    for op in part.operations:
      # Parts of different machines have one number, so only the world is clear.
      if op.communicator == 0 and any(
        name == "queue" for name, *_ in op.phases
      ):
        start = clocks[part.rank](op.begin), part.rank
        starts.setdefault((0, op.title), []).append(start)
  size = max((part.size for part in parts), default=0)
  return {
    key: max(found)[1] for key, found in starts.items() if len(found) == size
  }


class _Lanes:
  """Tracks on which spans do not overlap: each span takes the first free one."""

  def __init__(self) -> None:
    self._ends: list[float] = []

  def __len__(self) -> int:
    return len(self._ends)

  def take(self, begin: float, end: float) -> int:
    """The track of a span; spans come by their begin."""
    for lane, busy_until in enumerate(self._ends):
      if busy_until <= begin:
        self._ends[lane] = end
        return lane
    self._ends.append(end)
    return len(self._ends) - 1


def messages_of(
  ends: Iterable[tuple[int, int, int]],
  rank: int,
  op: Operation,
  key: Callable[..., str],
  is_sender: bool,
) -> Iterable[tuple[str, int]]:
  """The key and time of each message; those of a collective are inside of MPI."""
  counts: dict[int, int] = {}
  for time, peer, _ in ends:
    if peer == rank:
      continue
    ordinal = counts[peer] = counts.get(peer, 0) + 1
    sender, receiver = (rank, peer) if is_sender else (peer, rank)
    yield key(op, sender, receiver, ordinal), time


def ready_at(op: Operation) -> int:
  """When this rank began to wait; 0 if no caller waits for the operation."""
  if not op.is_split:
    return op.posted
  return max(op.posted, op.awaited) if op.awaited else 0


def waits_of(rank: int, op: Operation) -> list[tuple[int, int, int]]:
  """Times, peers and ns: how long the first part of each message was waited for."""
  ready = ready_at(op)
  if not ready:
    return []
  return [
    (time, peer, time - ready)
    for time, peer, _ in op.received
    if peer != rank and time > ready
  ]


def phases_of(
  rank: int, op: Operation, waits: Sequence[tuple[int, int, int]]
) -> list[tuple[str, int, int, dict[str, Any]]]:
  """The phases of an operation: name, begin, end, and details."""
  found: list[tuple[str, int, int, dict[str, Any]]] = []
  if op.posted:
    sizes = {str(p): size for _, p, size in op.sent if p != rank}
    found.append(("post", op.begin, op.posted, {"bytes_to": sizes}))
  recorded = {name for name, _, _ in op.phases}
  # A collective records its exchange, and a transfer of a window each peer.
  if op.posted and "exchange" not in recorded and not op.transfers:
    found.append(("exchange", op.posted, op.end, {}))
  seconds = {str(peer): waited / 1e9 for _, peer, waited in waits}
  if waits and "wait" not in recorded:
    # A sum needs the messages of all.
    sums = [begin for name, begin, _ in op.phases if name != "queue"]
    end = min([max(time for time, _, _ in waits), *sums])
    if end > ready_at(op):
      found.append(("wait", ready_at(op), end, {"seconds_for": seconds}))
  for name, begin, end in op.phases:
    if begin < op.posted < end:
      begin = op.posted  # the check of a collective is part of its post
    detail = {"seconds_for": seconds} if name == "wait" else {}
    found.append((name, begin, end, detail))
  return found
