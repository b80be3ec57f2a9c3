"""Files of timelines: clocks, parts of ranks that have died, profiles, and refusals."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jfog
from jfog import cli, launch, runtime
from jfog._timeline import _clocks, _merge, _parts

DEADLINE = 240.0  # seconds; the longest takes ten when all is quiet
needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)


# Clocks


def part(rank, clocks, operations):
  """A part of one of three ranks."""
  return _parts.Part(
    *("cafe", rank, 3, "host", 1, clocks, operations, [], {}, 0, True)
  )


# Each rank's clock: ns after rank 0's at its start, and ns that it gains in a second.
CLOCKS = [(0, 0), (5_000_000_000, 20_000), (-7_000_000, -40_000)]
SECONDS = 10


def own_time(rank, time):
  """A true time in ns, as the clock of a rank shows it."""
  ahead, gains = CLOCKS[rank]
  return round(time + ahead + gains * time / 1e9)


def measured(rank, time, error, half=1000):
  """A measurement of 2 us or `2 half` ns, whose middle is off by `error`."""
  offset = time - own_time(rank, time) + error
  return offset - half, offset + half, own_time(rank, time)


def exchange(rank, number, latency):
  """The average of one rank with the two others, who send at once."""
  time = number * 1_000_000
  others = [each for each in range(3) if each != rank]
  return _parts.Operation(
    *("neighbor_allreduce", number, 0, 8, own_time(rank, time)),
    posted=own_time(rank, time + 100),
    end=own_time(rank, time + 100_000),
    has_ended=True,
    sent=[(own_time(rank, time + 50), each, 8) for each in others],
    received=[
      (own_time(rank, time + 50 + latency), each, 8) for each in others
    ],
  )


@pytest.mark.parametrize("latency", [300, 50_000])
def test_clocks_that_drift_are_corrected(latency):
  parts = []
  for rank in range(3):
    error = {0: 0, 1: 900, 2: -900}[rank]  # within the uncertainty
    clocks = [measured(rank, t, error) for t in (0, SECONDS * 1_000_000_000)]
    numbers = range(0, SECONDS * 1000, 50)
    operations = [exchange(rank, number, latency) for number in numbers]
    parts.append(part(rank, clocks if rank else [(0, 0, 0)], operations))
  document, said = _merge.merged(parts)
  assert not said and document["jfog"]["received_too_early_ns"] == 0
  ends = {}
  for event in document["traceEvents"]:
    if event["ph"] in "sf":
      ends.setdefault(event["id"], {})[event["ph"]] = event["ts"]
  assert len(ends) == document["jfog"]["messages"] == 6 * SECONDS * 20
  for times in ends.values():
    assert times["s"] <= times["f"]
    # The truth, within the uncertainty of the two clocks.
    assert times["f"] - times["s"] == pytest.approx(latency / 1000, abs=2.01)
  for event in document["traceEvents"]:
    if event.get("cat") == "operation":
      truth = event["args"]["sequence"] * 1000.0 * 1.0
      assert event["ts"] == pytest.approx(truth, abs=2.01)


def test_a_measurement_that_is_loose_at_one_end():
  parts = []
  for rank in range(3):
    error = {0: 0, 1: 30_000, 2: -25_000}[rank]
    clocks = [measured(rank, 0, 0), measured(rank, 10**10, error, 50_000)]
    operations = [exchange(rank, k, 300) for k in range(0, SECONDS * 1000, 50)]
    parts.append(part(rank, clocks if rank else [(0, 0, 0)], operations))
  about = _merge.merged(parts)[0]["jfog"]
  assert about["received_too_early_ns"] == 0
  # Messages take 0.3 us in truth, so that they show the difference to that.
  for rank in range(3):
    (_, first), *last = about["clocks"][str(rank)]["points"]
    assert first == pytest.approx(-CLOCKS[rank][0], abs=1500)
    for at, offset in last:
      assert offset == pytest.approx(10**10 - own_time(rank, 10**10), abs=1500)
      assert at == own_time(rank, 10**10)


def test_a_clock_that_jumps_is_reported():
  clocks = [(0, 0, 0), (-1000, 1000, 0)]
  late = _parts.Operation(
    *("pair_gossip", 0, 0, 8, 0), posted=10, sent=[(50_000, 1, 8)]
  )
  early = _parts.Operation(
    *("pair_gossip", 0, 0, 8, 0), posted=10, received=[(20_000, 0, 8)]
  )
  parts = [part(0, clocks[:1], [late]), part(1, clocks[1:], [early])]
  about = _merge.merged(parts)[0]["jfog"]
  assert about["received_too_early_ns"] == pytest.approx(29_000, abs=10)
  assert about["missing_ranks"] == [2]


def test_a_wait_counts_from_the_call_of_wait():
  split = _parts.Operation(
    *("allreduce", 0, 0, 8, 0),
    posted=10,
    is_split=True,
    awaited=2000,
    received=[(1500, 1, 8), (5000, 2, 8)],
  )
  clocks = _clocks.clock_of(part(0, [], []))
  assert clocks(17) == 17
  document, _ = _merge.merged([part(0, [(0, 0, 0)], [split])])
  (wait,) = [e for e in document["traceEvents"] if e["name"] == "wait"]
  assert wait["args"]["seconds_for"] == {"2": 3e-6}
  (counter,) = [e for e in document["traceEvents"] if e["ph"] == "C"]
  assert counter["name"] == "waited for rank 2"


# Jobs

PROGRAM = """
import os, sys, time
import jax, jax.numpy as jnp
import jfog

world = jfog.init(timeout=60)
ring = jfog.topology.ring(world.size)
average = jax.jit(lambda x: jfog.neighbor_allreduce(x, ring))
with jfog.span("train"):
  x = jax.block_until_ready(average(jnp.ones(8)))
if "PROFILE" in os.environ:
  with jax.profiler.trace(f"{os.environ['PROFILE']}/{world.rank}"):
    for _ in range(4):
      with jfog.span("profiled"):
        x = jax.block_until_ready(average(x))
      time.sleep(0.2)
if "DIES" in os.environ:
  jfog.barrier()
  time.sleep(2)  # longer than between two writes
  if world.rank == 1:
    exec(os.environ["DIES"])
  average(x).block_until_ready()
"""


def run(folder, ranks=2, **environment):
  """Runs the program with a timeline in a folder; returns code and stderr."""
  done = subprocess.run(
    [
      *launch.command_line(["-np", str(ranks), "--timeline", str(folder)]),
      *(sys.executable, "-c", PROGRAM),
    ],
    env={**os.environ, **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  return done.returncode, done.stderr


def named(path, name):
  """The spans of this name in a merged file."""
  events = json.loads(pathlib.Path(path).read_text())["traceEvents"]
  return [e for e in events if e["ph"] == "X" and e["name"].startswith(name)]


@needs_mpi
def test_a_profile_is_joined_on_the_clock_of_the_timeline(tmp_path, capsys):
  folder, profiles = tmp_path / "timeline", tmp_path / "profiles"
  code, err = run(folder, PROFILE=str(profiles))
  assert code == 0, err
  assert os.listdir(folder) == ["timeline.json"]
  path = folder / "timeline.json"
  assert len(named(path, "neighbor_allreduce #")) == 10
  assert len(named(path, "profiled")) == 8
  for _ in range(2):  # again in place of the first
    arguments = ["timeline", "merge", str(folder), "--profile", str(profiles)]
    assert cli.main(arguments) == 0
  assert capsys.readouterr().out.split() == [str(path)] * 2
  spans = named(path, "profiled")
  assert len(spans) == 16
  for rank in range(2):
    own = [s for s in spans if s["pid"] == rank + 1]
    theirs = [s for s in spans if s["pid"] // 1_000_000 == rank + 1]
    for mine, profiled in zip(own, theirs, strict=True):
      # The annotation is inside of the span.
      assert 0 <= profiled["ts"] - mine["ts"] + 1 < 20_000
      assert profiled["dur"] <= mine["dur"] + 1
  operations = named(path, "neighbor_allreduce")
  assert any(event["pid"] > 1_000_000 for event in operations)
  assert cli.main(["timeline", "merge", str(path)]) == 0
  empty = tmp_path / "empty"
  empty.mkdir()
  assert (
    cli.main(["timeline", "merge", str(path), "--profile", str(empty)]) == 2
  )
  assert "no *.trace.json.gz that was recorded" in capsys.readouterr().err


@needs_mpi
@pytest.mark.parametrize(
  "end, expected, text",
  [
    ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
    ("raise KeyError('samples')", 1, "KeyError: 'samples'"),
    # It does not wait for the others before it announces its end.
    ("sys.exit()", 1, "rank 1, which has already ended"),
  ],
)
def test_the_timeline_of_ranks_that_die(tmp_path, end, expected, text):
  (tmp_path / "timeline.json").write_text("that of an earlier job")
  code, err = run(tmp_path, ranks=3, DIES=end)
  assert code == expected and text in err, err
  assert "have not ended the recording" in err
  path = tmp_path / "timeline-2.json"
  # Those of before the death, of all ranks.
  assert {e["pid"] for e in named(path, "neighbor_allreduce #0")} == {1, 2, 3}
  assert {e["pid"] for e in named(path, "train")} == {1, 2, 3}
  about = json.loads(path.read_text())["jfog"]
  assert about["incomplete_ranks"] and not about["missing_ranks"]
  # The parts stay; without one of them the merge names it.
  names = sorted(os.listdir(tmp_path))
  parts = [f"timeline-2.json.rank-{r}" for r in "012"]
  assert names == ["timeline-2.json", *parts, "timeline.json"]
  os.remove(f"{path}.rank-1")
  with open(f"{path}.rank-2", "r+") as file:  # cut off in a line
    file.truncate(os.path.getsize(f"{path}.rank-2") - 5)
  assert any(
    "ranks [1] are missing" in text for text in _merge.merge(str(path))
  )


# In this process


def test_a_world_of_one_has_its_spans(tmp_path):
  path = tmp_path / "folder" / "run.json"
  with jfog.timeline(path, events=10):
    with jfog.span("simulated"):
      average = jfog.simulate(jfog.allreduce, 3)
      average(jnp.arange(3.0)).block_until_ready()
    with pytest.raises(ZeroDivisionError), jfog.span("fails"):
      raise ZeroDivisionError
  assert len(named(path, "simulated")) == len(named(path, "fails")) == 1
  assert os.listdir(path.parent) == ["run.json"]
  with jfog.span("not recorded"):
    pass
  assert not named(path, "not")


def test_a_body_that_raises_leaves_the_part(tmp_path):
  path = tmp_path / "run.json"
  with pytest.raises(KeyError), jfog.timeline(path), jfog.span("last"):
    raise KeyError
  assert os.listdir(tmp_path) == ["run.json.rank-0"]
  assert cli.main(["timeline", "merge", str(path)]) == 0
  assert len(named(path, "last")) == 1


def test_refusals(tmp_path, capsys):
  def enter(path, **options):
    with jfog.timeline(path, **options):
      pass

  with pytest.raises(TypeError, match="path=3 must be a path"):
    enter(3)
  with pytest.raises(ValueError, match="events=0"):
    enter(tmp_path / "run.json", events=0)
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"ranks \[0\] cannot write .*name a file"):
    enter(tmp_path / "file" / "run.json")
  nested = pytest.raises(RuntimeError, match=r"run\.json; end it first")
  with jfog.timeline(tmp_path / "run.json"), nested:
    enter(tmp_path / "other.json")
  unnamed: Any = 3
  with (
    pytest.raises(TypeError, match="name=3 must be a string"),
    jfog.span(unnamed),
  ):
    pass
  nothing = tmp_path / "nothing"
  nothing.mkdir()
  for path, text in (
    (nothing, "holds no timeline"),
    (nothing / "run.json", "there is no part of a timeline"),
  ):
    assert cli.main(["timeline", "merge", str(path)]) == 2
    assert text in capsys.readouterr().err
  (tmp_path / "bad.rank-0").write_text("{}\n")
  assert cli.main(["timeline", "merge", str(tmp_path / "bad")]) == 2
  assert "bad.rank-0 is not the part of a timeline" in capsys.readouterr().err


@pytest.mark.places("simulate-5", "mpi")
@pytest.mark.mpi(2)
def test_operations_have_names_in_profiles(place):
  graph = jfog.topology.ring(place.size)

  def step(x):
    handle = jfog.allreduce_start(jfog.neighbor_allreduce(x, graph))
    return jfog.wait(handle)

  x = jnp.ones(3)
  if place.kind != "mpi":
    step, x = jfog.simulate(step, place.size), jnp.ones((place.size, 3))
  text = jax.jit(step).lower(x).as_text(debug_info=True)
  for name in ("neighbor_allreduce", "allreduce_start"):
    assert re.search(rf"jfog\.{name}[)/]", text)
