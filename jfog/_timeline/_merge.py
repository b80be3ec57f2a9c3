"""Merging of parts into one file in Chrome's trace format, and profiles into it."""

import glob
import gzip
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ._chrome import Event, Trace
from ._clocks import Message, clock_of, fit
from ._parts import Part, read

# From this process number on are those of profiles, a range for each rank.
_PROFILES = 1_000_000
_PART = re.compile(r"(.*)\.rank-(\d+)$")


def find_parts(path: str) -> list[str]:
  """The parts of the timeline with this path, by rank."""
  found = [
    (int(match[2]), each)
    for each in glob.glob(f"{glob.escape(path)}.rank-*")
    if (match := _PART.match(each))
  ]
  return [each for _, each in sorted(found)]


def merge_folder(folder: str) -> list[str]:
  """Merges the parts of each timeline in a folder; returns what there is to say."""
  names = {
    match[1]
    for each in glob.glob(f"{glob.escape(folder)}/*.rank-*")
    if (match := _PART.match(each))
  }
  said: list[str] = []
  for path in sorted(names):
    said += merge(path)
  return said


def merge(path: str) -> list[str]:
  """Merges the parts of a timeline into its file; returns what there is to say.

  The parts are removed if all ranks' are there.

  Raises:
    ValueError: if there is no part, or one is not a part.
    OSError: if the file cannot be written.
  """
  paths = find_parts(path)
  if not paths:
    raise ValueError(
      f"{path}.rank-N: there is no part of a timeline; name the file of "
      f"jfog.timeline, or the folder of `jfog run --timeline`."
    )
  parts = [read(each) for each in paths]
  # A folder may hold parts of an earlier job, with more ranks.
  newest = max(
    zip(map(os.path.getmtime, paths), parts, strict=True), key=lambda x: x[0]
  )[1]
  kept = [part for part in parts if part.world == newest.world]
  said = [
    f"{each} belongs to another recording, and is left out"
    for each, part in zip(paths, parts, strict=True)
    if part.world != newest.world
  ]
  document, more = merged(kept)
  _write(path, document)
  if len(kept) == newest.size and all(part.is_complete for part in kept):
    for each, part in zip(paths, parts, strict=True):
      if part.world == newest.world:
        os.remove(each)
  return said + [f"{path}: {text}" for text in more]


def merged(parts: Sequence[Part]) -> tuple[dict[str, Any], list[str]]:
  """The document of some parts of one recording, and what there is to say."""
  clocks = {part.rank: clock_of(part) for part in parts}
  too_early = fit(clocks, _messages(parts))
  trace = Trace(parts, clocks)
  events = trace.build()
  events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0)))
  size = max(part.size for part in parts)
  missing = sorted(set(range(size)) - {part.rank for part in parts})
  incomplete = sorted(part.rank for part in parts if not part.is_complete)
  lost = {str(part.rank): part.lost for part in parts if part.lost}
  said = []
  if missing:
    said.append(
      f"the parts of ranks {missing} are missing; copy them beside the others, "
      f"and run `jfog timeline merge`"
    )
  if incomplete:
    said.append(f"ranks {incomplete} have not ended the recording")
  for rank, count in lost.items():
    said.append(f"rank {rank} has lost {count} events: its ring was too short")
  about = {
    "world": parts[0].world,
    "ranks": size,
    "missing_ranks": missing,
    "incomplete_ranks": incomplete,
    "lost_events": lost,
    "messages": trace.matched,
    "messages_with_one_end": trace.unmatched,
    "received_too_early_ns": round(too_early),
    "origin_ns": trace.origin,
    "clocks": {
      str(rank): {
        "points": [
          (at, offset + shift)
          for (at, offset), shift in zip(
            clock.points, clock.shifts, strict=True
          )
        ],
        "uncertainty_ns": clock.uncertainty,
      }
      for rank, clock in clocks.items()
    },
  }
  document = {
    "traceEvents": events,
    "displayTimeUnit": "ns",
    "otherData": {"producer": "jfog"},
    "jfog": about,
  }
  return document, said


def _messages(parts: Sequence[Part]) -> list[Message]:
  """The messages of which both ends were recorded."""
  sent: dict[tuple[Any, ...], int] = {}
  received: dict[tuple[Any, ...], int] = {}
  for part in parts:
    for op in part.operations:
      for ends, times, is_sender in (
        (op.sent, sent, True),
        (op.received, received, False),
      ):
        for time, peer, _ in ends:
          edge = (part.rank, peer) if is_sender else (peer, part.rank)
          if peer != part.rank:
            # Of several on one edge the first: they are in order.
            times.setdefault((op.communicator, op.sequence, *edge), time)
  return [
    (key[2], key[3], sent[key], received[key])
    for key in sent.keys() & received.keys()
  ]


def _write(path: str, document: dict[str, Any]) -> None:
  """Writes a document, an event in a line, whole or not at all."""
  rest = {k: v for k, v in document.items() if k != "traceEvents"}
  scratch = f"{path}.{os.getpid()}.tmp"
  with open(scratch, "w", encoding="utf-8") as file:
    file.write('{"traceEvents": [\n')
    file.write(",\n".join(map(json.dumps, document["traceEvents"])))
    file.write("\n],\n" + json.dumps(rest)[1:] + "\n")
  os.replace(scratch, path)


def add_profile(path: str, folder: str) -> list[str]:
  """Adds profiles of `jax.profiler` to a merged timeline.

  A profile is that of the rank, and on the clock, of the annotations that jfog
  leaves in it while a timeline is recorded.

  Args:
    path: the merged file.
    folder: the folder of `jax.profiler.trace`, of one or more ranks.

  Returns:
    What there is to say.

  Raises:
    ValueError: if `path` is not a merged timeline, or no profile fits.
  """
  with open(path, encoding="utf-8") as file:
    document = json.load(file)
  about = document.get("jfog")
  if about is None:
    raise ValueError(f"{path} is not a merged timeline of jfog.")
  found = sorted(
    glob.glob(f"{glob.escape(folder)}/**/*.trace.json.gz", recursive=True)
  )
  document["traceEvents"] = [
    event for event in document["traceEvents"] if event["pid"] < _PROFILES
  ]
  said, added = [], 0
  for profile in found:
    with gzip.open(profile, "rt", encoding="utf-8") as file:
      events = json.load(file)["traceEvents"]
    moved = _on_clock(events, about)
    if moved is None:
      said.append(f"{profile} has no mark of this recording, and is left out")
      continue
    document["traceEvents"] += moved
    added += 1
  if not added:
    raise ValueError(
      f"{folder} has no *.trace.json.gz that was recorded during {path}; run "
      f"jax.profiler.trace inside of the timeline, for half a second or longer."
    )
  _write(path, document)
  return said


def _on_clock(events: list[Event], about: dict[str, Any]) -> list[Event] | None:
  """The events of a profile on the clock of a timeline; None without a mark."""
  marks = [
    (event["ts"], event["args"])
    for event in events
    if event.get("args", {}).get("jfog_world") == about["world"]
  ]
  if not marks:
    return None
  rank = int(marks[0][1]["jfog_rank"])
  clock = about["clocks"].get(str(rank))
  if clock is None:
    return None
  (at, offset), *rest = clock["points"]
  moved, shift = [], []
  for ts, args in marks:
    own = int(args["jfog_ns"])
    there = offset
    if rest:
      there += (rest[-1][1] - offset) * (own - at) / max(rest[-1][0] - at, 1)
    on_origin = own + there - about["origin_ns"]
    shift.append(on_origin / 1000 - ts)
  # An annotation begins after its mark was made, and the largest is the closest.
  best = max(shift)
  first = _PROFILES * (rank + 1)
  for event in events:
    if "pid" not in event:
      continue
    event = {**event, "pid": first + event["pid"]}
    if "ts" in event:
      event["ts"] = round(event["ts"] + best, 3)
    if event.get("name") == "process_name":
      name = event["args"]["name"]
      event["args"] = {"name": f"rank {rank} profile: {name}"}
    moved.append(event)
  return moved
