"""The timeline of a job of four ranks, event by event."""

import collections
import json
import re

import pytest
from support import jobs

from jfog import runtime

DEADLINE = 240.0  # seconds; the longest takes ten when all is quiet
RANKS = range(4)

PROGRAM = """
import json, os, warnings
import jax, jax.numpy as jnp
import jfog
from jfog.runtime import _extensions
from jfog.diagnostics import counters

folder = os.environ["FOLDER"]
said = {}


def refused(name, path):
  try:
    with jfog.timeline(path):
      pass
  except (OSError, RuntimeError) as error:
    said[name] = [type(error).__name__, str(error)]


refused("before init", f"{folder}/early.json")
world = jfog.init(timeout=120, local_size=2)
ring, right = jfog.topology.ring(4), jfog.topology.ring(4, "right")
exponential = jfog.topology.one_peer_exponential(4)
x = jnp.ones(256) * world.rank


@jax.jit
def twice(x):
  return jfog.neighbor_allreduce(jfog.neighbor_allreduce(x, ring), ring)


twice(x).block_until_ready()
said["off"] = [len(_extensions.mpi().read_timeline()[0]), sorted(os.listdir(folder))]
jfog.barrier()
refused("unwritable", f"{folder}/{'file/' * (world.rank == 1)}bad.json")
before = counters()
with jfog.timeline(f"{folder}/run.json"):
  refused("nested", f"{folder}/nested.json")
  with jfog.span("forward"):
    with jfog.span("inner"):
      x = jax.block_until_ready(twice(x))
  big = jax.block_until_ready(jfog.neighbor_allreduce(jnp.ones(100000), ring))
  handle = jfog.neighbor_allreduce_start(x, ring)
  later = jfog.allreduce_start(x)
  y = jfog.wait(handle)
  jfog.wait(later)
  jfog.hierarchical_neighbor_allreduce(x, jfog.topology.ring(2))
  jfog.broadcast(x, 1)
  jfog.allgather(x)
  jfog.neighbor_allgather(x, right)
  jfog.finite_time_average(x, exponential)
  jfog.pair_gossip(x, world.rank ^ 1)
  jfog.allreduce(x, comm=world.local)
  window = jfog.win_create(x, right)
  window = jfog.win_put(window, x)
  jfog.barrier()
  x, window = jfog.win_update(window, x)
  window = jfog.win_get(window)
  jfog.barrier()
  window = jfog.win_free(window)
  jax.effects_barrier()
  after = counters()
said["counters"] = [before, after]
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter("always")
  with jfog.timeline(f"{folder}/short.json", events=16):
    for _ in range(20):
      x = twice(x)
    jax.block_until_ready(x)
said["warnings"] = [str(each.message) for each in caught]
with open(f"{folder}/said-{world.rank}", "w") as file:
  json.dump(said, file)
"""

# The operations of the program on the world, in order, with their edges.
RING = {rank: {(rank + 1) % 4, (rank - 1) % 4} for rank in RANKS}
ALL = {rank: set() for rank in RANKS}
EXPECTED = [
  *[("neighbor_allreduce", RING)] * 4,
  *[("allreduce", ALL)],
  # The other rank of the machine, and its like on the other machine.
  ("hierarchical_neighbor_allreduce", {r: {r ^ 1, r ^ 2} for r in RANKS}),
  *[("broadcast", ALL), ("allgather", ALL)],
  ("neighbor_allgather", {r: {(r + 1) % 4} for r in RANKS}),
  ("finite_time_average", ALL),
  ("finite_time_average", {r: {(r + 1) % 4} for r in RANKS}),
  ("finite_time_average", {r: {r ^ 2} for r in RANKS}),
  ("pair_gossip", {r: {r ^ 1} for r in RANKS}),
  *[("win_create", ALL), ("win_create", ALL)],
  *[("barrier", ALL), ("barrier", ALL), ("win_free", ALL)],
]
COLLECTIVES = {"allreduce", "broadcast", "allgather", "barrier"}
COLLECTIVES |= {"win_create", "win_free"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """The files of one job of four ranks, and the text of each rank."""
  if not runtime.build().MPI_FAMILY:
    pytest.skip("jfog was installed without MPI")
  folder = tmp_path_factory.mktemp("timeline")
  (folder / "file").write_text("")
  code, _, err = jobs.run_program(
    PROGRAM, 4, deadline=DEADLINE, environment={"FOLDER": str(folder)}
  )
  assert code == 0, err
  said = [json.loads((folder / f"said-{r}").read_text()) for r in RANKS]
  return folder, said


@pytest.fixture(scope="module")
def document(job):
  """The merged file of the main timeline."""
  return json.loads((job[0] / "run.json").read_text())


def of(document, rank, category):
  """The spans of a category on one rank, by time."""
  spans = [
    event
    for event in document["traceEvents"]
    if event["pid"] == rank + 1 and event.get("cat") == category
  ]
  return sorted(spans, key=lambda event: event["ts"])


def operations(document, rank):
  """The operations on the world, without checks of graphs and peers, and windows'."""
  return [
    event
    for event in of(document, rank, "operation")
    if event["args"]["communicator"] == 0
    and not re.match("win_(put|get|update)|.*_agreement", event["name"])
  ]


def end(event):
  """The end of a span."""
  return event["ts"] + event["dur"]


def check_format(event):
  """Compares one event with the Trace Event Format."""
  number, text = (int, float), str
  fields = {
    "X": {"ts": number, "dur": number, "name": text, "cat": text, "args": dict},
    "M": {"name": text, "args": dict},
    "C": {"ts": number, "name": text, "args": dict},
    "s": {"ts": number, "name": text, "cat": text, "id": text},
    "f": {"ts": number, "name": text, "cat": text, "id": text, "bp": text},
  }[event["ph"]]
  fields = {**fields, "ph": text, "pid": int, "tid": int}
  assert event.keys() == fields.keys(), event
  for name, kind in fields.items():
    assert isinstance(event[name], kind), event
  assert event["pid"] > 0 and event["tid"] > 0
  assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
  if event["ph"] == "M":
    (name,) = event["args"]
    assert event["name"] in (
      {"name": ("process_name", "thread_name")}.get(name)
      or ("process_sort_index", "thread_sort_index")
    )
  if event["ph"] == "C":
    (value,) = event["args"].values()
    assert isinstance(value, number)
  if event["ph"] == "f":
    assert event["bp"] == "e"  # of the slice around it


def test_each_event_has_chromes_format(document):
  assert set(document) == {
    *("traceEvents", "displayTimeUnit", "otherData", "jfog")
  }
  for event in document["traceEvents"]:
    check_format(event)
  names = {
    event["pid"]: event["args"]["name"]
    for event in document["traceEvents"]
    if event["name"] == "process_name"
  }
  assert sorted(names) == [1, 2, 3, 4]
  assert all(names[k].startswith(f"rank {k - 1} (") for k in names)


def test_spans_of_a_track_nest(document):
  tracks = collections.defaultdict(list)
  for event in document["traceEvents"]:
    if event["ph"] == "X":
      tracks[event["pid"], event["tid"]].append(event)
  for events in tracks.values():
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    around = []
    for event in events:
      while around and end(around[-1]) <= event["ts"] + 1e-3:
        around.pop()
      # A thousandth of a microsecond is the rounding.
      assert not around or end(event) <= end(around[-1]) + 2e-3, event
      around.append(event)


@pytest.mark.parametrize("rank", RANKS)
def test_each_operation_of_each_rank(document, rank):
  found = operations(document, rank)
  assert [e["name"].split(" #")[0] for e in found] == [n for n, _ in EXPECTED]
  # Two and a barrier came before the timeline.
  assert [e["args"]["sequence"] for e in found] == [
    3 + k for k in range(len(EXPECTED))
  ]
  for k, (event, (name, edges)) in enumerate(zip(found, EXPECTED, strict=True)):
    args = event["args"]
    sources = {r for r in RANKS if rank in edges[r]}
    assert args["to"] == sorted(edges[rank]), event
    assert args["from"] == sorted(sources), event
    assert args["ended"] and not args["failed"]
    assert args["split"] == (k in (3, 4))
    bytes_ = {"barrier": 0, "win_free": 0}.get(name, 1024)
    if k != 14:  # win_create's second operation is a barrier
      assert args["bytes"] == (400_000 if k == 2 else bytes_), event


@pytest.mark.parametrize("rank", RANKS)
def test_the_phases_of_each_operation(document, rank):
  phases = collections.defaultdict(list)
  for event in of(document, rank, "phase"):
    phases[event["args"]["operation"]].append(event)
  for k, operation in enumerate(operations(document, rank)):
    name = operation["name"].split(" #")[0]
    inside = phases[operation["name"]]
    names = [event["name"] for event in inside]
    assert names[0] == "post" and inside[0]["ts"] == operation["ts"]
    for event in inside:
      assert operation["ts"] <= event["ts"]
      assert end(event) <= end(operation) + 2e-3
    if name in COLLECTIVES:
      assert sorted(names) == ["copy", "exchange", "post", "queue", "wait"]
      continue
    (exchange,) = [event for event in inside if event["name"] == "exchange"]
    assert exchange["ts"] == pytest.approx(end(inside[0]), abs=2e-3)
    for event in inside:
      if event["name"] == "wait":
        waited = event["args"]["seconds_for"]
        assert set(map(int, waited)) <= set(operation["args"]["from"])
        longest = max(waited.values()) * 1e6
        assert event["dur"] <= longest * 1.001 + 2e-3  # clocks drift
    count = collections.Counter(names)
    if name == "finite_time_average" and not operation["args"]["to"]:
      assert not count["sum"]  # its rounds are operations of their own
    elif name == "neighbor_allgather":
      assert count["copy"] == 1
    elif name == "hierarchical_neighbor_allreduce":
      assert (count["mean"], count["sum"]) == (1, 1)
    elif k == 2:
      assert count["sum"] > 1  # one for each chunk
    else:
      assert count["sum"] == 1
  awaited = phases[operations(document, rank)[3]["name"]]
  assert awaited[0]["name"] == "post"


def flows(document):
  """The start and the end of each arrow, by its number."""
  found = collections.defaultdict(dict)
  for event in document["traceEvents"]:
    if event["ph"] in "sf":
      assert event["ph"] not in found[event["id"]], "one arrow, one message"
      found[event["id"]][event["ph"]] = event
  return found


def around(document, event, category):
  """The spans of a category around an event on its track."""
  return [
    span
    for span in document["traceEvents"]
    if span.get("cat") == category
    and (span["pid"], span["tid"]) == (event["pid"], event["tid"])
    and span["ts"] <= event["ts"] <= end(span) + 2e-3
  ]


def test_each_message_has_an_arrow(document, job):
  arrows = flows(document)
  edges = collections.Counter()
  for pair in arrows.values():
    start, finish = pair["s"], pair["f"]  # both
    # On one clock, after the correction.
    assert start["ts"] <= finish["ts"]
    sender, receiver = start["pid"] - 1, finish["pid"] - 1
    operation = around(document, start, "operation")
    window = around(document, start, "window")
    if not (operation and around(document, finish, "operation")):
      (put,) = window or around(document, finish, "window")
      edges[put["name"].split(" of ")[0], sender, receiver] += 1
      continue
    titles = {event["name"] for event in operation}
    titles &= {e["name"] for e in around(document, finish, "operation")}
    (title,) = titles
    assert [
      event["name"]
      for event in around(document, start, "phase")
      if event["args"]["operation"] == title
    ].count("post"), start
    edges[title.split(" #")[0], sender, receiver] += 1
  expected = collections.Counter()
  for name, targets in EXPECTED:
    for rank in RANKS:
      for target in targets[rank]:
        expected[name, rank, target] += 1
  for rank in RANKS:
    after, before = (rank + 1) % 4, (rank - 1) % 4
    expected["win_put", rank, after] += 1
    expected["win_get", before, rank] += 1
  assert edges == expected
  # As many as the native core has counted; a collective is under the rank itself.
  counted = 0
  for rank, said in enumerate(job[1]):
    before, after = said["counters"]
    for peer, values in after["peers"].items():
      if int(peer) != rank:
        sent = before["peers"].get(peer, {}).get("messages_sent", 0)
        counted += values["messages_sent"] - sent
  gets = sum(n for (name, _, _), n in edges.items() if name == "win_get")
  assert len(arrows) - gets == counted
  assert document["jfog"]["messages"] == len(arrows)
  assert document["jfog"]["messages_with_one_end"] == 0
  assert document["jfog"]["received_too_early_ns"] == 0


@pytest.mark.parametrize("rank", RANKS)
def test_counters_of_bytes_and_waits(document, job, rank):
  samples = collections.defaultdict(list)
  for event in document["traceEvents"]:
    if event["ph"] == "C" and event["pid"] == rank + 1:
      samples[event["name"]] += event["args"].values()
  for values in samples.values():
    assert values == sorted(values)
  before, after = job[1][rank]["counters"]
  for peer in RANKS:
    peer = str(peer)
    if int(peer) == rank or peer not in after["peers"]:
      continue
    sent = before["peers"].get(peer, {}).get("bytes_sent", 0)
    last = [
      samples[f"bytes {way} to rank {peer}"][-1:] for way in ("sent", "put")
    ]
    counted = sum(sum(values) for values in last)
    assert counted == after["peers"][peer]["bytes_sent"] - sent
  assert any(name.startswith("waited for rank") for name in samples)


@pytest.mark.parametrize("rank", RANKS)
def test_spans_of_python_and_windows(document, rank):
  outer, inner = of(document, rank, "span")
  assert (outer["name"], inner["name"]) == ("forward", "inner")
  for event in operations(document, rank)[:2]:
    assert outer["ts"] <= inner["ts"] <= event["ts"]
    assert end(event) <= end(inner) <= end(outer) + 2e-3
  before, after = (rank - 1) % 4, (rank + 1) % 4
  found = {event["name"] for event in of(document, rank, "window")}
  assert found == {f"win_put of rank {before}", f"win_get of rank {after}"}
  names = {
    event["name"].split(" #")[0] for event in of(document, rank, "operation")
  }
  assert {"win_put", "win_update", "win_get", "graph_agreement"} <= names
  update = [
    event["name"]
    for event in of(document, rank, "phase")
    if event["args"]["operation"].startswith("win_update")
  ]
  assert update == ["lock", "sum"]


def test_nothing_is_written_unless_asked(job):
  for said in job[1]:
    assert said["off"] == [0, ["file"]]
  names = sorted(path.name for path in job[0].iterdir())
  # Complete parts are removed, and those of what was refused.
  assert names == [
    *("file", "run.json", *(f"said-{r}" for r in RANKS), "short.json")
  ]


def test_refusals_are_those_of_all_ranks(job):
  for said in job[1]:
    kind, text = said["before init"]
    assert kind == "NotInitializedError" and "call jfog.init() first" in text
    kind, text = said["unwritable"]
    assert kind == "OSError" and "ranks [1] cannot write" in text
    assert "name a file in a folder" in text
    kind, text = said["nested"]
    assert kind == "RuntimeError" and "run.json; end it first" in text


def test_an_overrun_of_the_ring_is_counted(job):
  short = json.loads((job[0] / "short.json").read_text())
  lost = short["jfog"]["lost_events"]
  assert set(lost) == {"0", "1", "2", "3"}
  for rank, said in enumerate(job[1]):
    first = said["warnings"][0]
    assert f"{lost[str(rank)]} events of this rank were overwritten" in first
    assert "pass a larger `events`" in first
  # Rank 0, which merges, names the others, too.
  assert any("rank 3 has lost" in text for text in job[1][0]["warnings"])
  for event in short["traceEvents"]:
    check_format(event)
  # Whole operations, none with the identity of another.
  for rank in RANKS:
    sequences = [e["args"]["sequence"] for e in operations(short, rank)]
    assert sequences == sorted(set(sequences))
