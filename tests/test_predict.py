"""Predicted steps: against counted messages, event lists and the closed formulas."""

import math
from typing import Any

import numpy as np
import pytest

from jfog import lab, topology

LINK: dict[str, Any] = {"latency": 50e-6, "bandwidth": 25e9 / 8}
MODEL = 102.4e6  # bytes


def communication(graph, **more):
  return lab.predict_step(graph, MODEL, compute=0.0, **LINK, **more)[1]


@pytest.mark.parametrize(
  "graph, seconds",
  [
    ("ring_allreduce", 0.0777),
    ("one_peer_exponential", 0.0328),
    ("exponential", 0.2294),
    ("ring", 0.0656),
    ("tree_allreduce", 2 * MODEL / LINK["bandwidth"] + 14 * LINK["latency"]),
    (
      "halving_doubling_allreduce",
      2 * 127 / 128 * MODEL / LINK["bandwidth"] + 14 * LINK["latency"],
    ),
  ],
)
def test_128_ranks_on_hosts_of_their_own(graph, seconds):
  assert communication(graph, size=128) == pytest.approx(seconds, abs=5e-5)


def test_eight_ranks_of_a_host_share_its_link():
  last = topology.one_peer_exponential(128)[6]  # from 64 ranks behind
  flat = communication(last, ranks_per_host=8)
  assert flat == pytest.approx(0.2622, abs=5e-5)
  inside: dict[str, Any] = {"ranks_per_host": 8, "inner_bandwidth": 1e11}
  assert communication(
    "hierarchical_one_peer_exponential", size=128, **inside
  ) == pytest.approx(
    2 * 7 / 8 * MODEL / 1e11
    + MODEL / LINK["bandwidth"]
    + LINK["latency"]
    + MODEL / 1e11
  )
  # The rounds from 1, 2 and 4 ranks behind cross to another host 1, 2 and 4 times.
  messages = (1 + 2 + 4 + 8 + 8 + 8 + 8) / 7
  expected = messages * MODEL / LINK["bandwidth"] + LINK["latency"]
  found = communication("one_peer_exponential", size=128, ranks_per_host=8)
  assert found == pytest.approx(expected)


NAMED = {
  "one_peer_exponential": topology.one_peer_exponential,
  "exponential": topology.exponential,
  "ring": topology.ring,
  "mesh_grid_2d": topology.mesh_grid_2d,
  "torus_2d": topology.torus_2d,
}


def counted(graph, per_host, link):
  """Seconds of each round and bytes out of the busiest host, edge by edge."""
  seconds, sent = [], []
  for each in graph.rounds:
    out, into, give, take = ({} for _ in range(4))
    for rank in range(graph.size):
      for source in each.in_neighbors(rank):
        hosts = source // per_host, rank // per_host
        if hosts[0] != hosts[1]:
          out[hosts[0]] = out.get(hosts[0], 0) + 1
          into[hosts[1]] = into.get(hosts[1], 0) + 1
        else:
          give[source] = give.get(source, 0) + 1
          take[rank] = take.get(rank, 0) + 1
    most = lambda *counts: max(0, *(n for c in counts for n in c.values()), 0)  # noqa: E731
    latency = 0.0
    if out or give:
      latency = link["latency"] if out else link["inner_latency"]
    seconds.append(
      latency
      + MODEL
      * max(
        most(out, into) / link["bandwidth"],
        most(give, take) / link["inner_bandwidth"],
      )
    )
    sent.append(MODEL * most(out))
  return seconds, sent


@pytest.mark.parametrize("size, per_host", [(1, 1), (2, 1), (6, 3), (12, 4)])
@pytest.mark.parametrize("name", NAMED)
def test_named_graphs_are_those_of_the_topologies(name, size, per_host):
  link: dict[str, Any] = {**LINK, "inner_latency": 3e-6, "inner_bandwidth": 7e9}
  graph = NAMED[name](size)
  seconds, sent = counted(graph, per_host, link)
  given: dict[str, Any] = {
    "ranks_per_host": per_host,
    "compute": 0.1,
    "overlap": 0.02,
    **link,
  }
  for step in (
    lab.predict_step(graph, MODEL, **given),
    lab.predict_step(name, MODEL, size=size, **given),
  ):
    visible = np.mean([max(0, each - 0.02) for each in seconds])
    assert step.seconds == pytest.approx(0.1 + visible)
    assert step.communication == pytest.approx(np.mean(seconds))
    assert step.bytes_out == pytest.approx(np.mean(sent))
    assert step.efficiency == pytest.approx(0.1 / (0.1 + visible))


@pytest.mark.parametrize(
  "name", ["ring", "torus_2d", "exponential", "one_peer_exponential"]
)
def test_equal_ranks_end_when_the_network_of_the_laboratory_says(name):
  steps, size = 12, 9
  link: dict[str, Any] = {"latency": 1e-3, "bandwidth": 1e9}
  times = lab.network_times(
    NAMED[name](size), MODEL, np.full((steps, size), 0.05), **link
  )
  step = lab.predict_step(name, MODEL, size=size, compute=0.05, **link)
  np.testing.assert_allclose(times[-1], steps * step.seconds, rtol=1e-9)


def ring_of_events(size, per_host, chunk, latency, inner_latency):
  """When the last chunk of a ring allreduce arrives; links inside take no time."""
  ready, free = [0.0] * size, [0.0] * size
  for _ in range(2 * (size - 1)):
    arrived = [0.0] * size
    for rank in range(size):
      to = (rank + 1) % size
      crosses = rank // per_host != to // per_host
      start = max(ready[rank], free[rank])
      free[rank] = start + (chunk if crosses else 0.0)
      arrived[to] = free[rank] + (latency if crosses else inner_latency)
    ready = arrived
  return max(ready)


@pytest.mark.parametrize("size, per_host", [(8, 1), (5, 1), (8, 4), (12, 3)])
def test_a_ring_allreduce_is_a_chain_of_chunks(size, per_host):
  chunk = MODEL / size / LINK["bandwidth"]
  events = ring_of_events(size, per_host, chunk, LINK["latency"], 5e-6)
  found = communication(
    "ring_allreduce",
    size=size,
    ranks_per_host=per_host,
    inner_latency=5e-6,
  )
  if per_host == 1:
    assert found == pytest.approx(events)
  else:  # chunks on the link hide the latencies of others
    assert events <= found <= 1.2 * events


@pytest.mark.parametrize(
  "name",
  [
    *("hierarchical_one_peer_exponential", "ring_allreduce"),
    *("tree_allreduce", "halving_doubling_allreduce"),
  ],
)
def test_on_one_host_the_network_is_not_used(name):
  inside: dict[str, Any] = {"inner_latency": 2e-6, "inner_bandwidth": 1e10}
  step = lab.predict_step(
    name, MODEL, size=8, ranks_per_host=8, compute=1.0, **LINK, **inside
  )
  assert step.bytes_out == 0
  volume = 2 if name == "tree_allreduce" else 2 * 7 / 8
  assert step.communication == pytest.approx(volume * MODEL / 1e10, rel=2e-3)
  alone = lab.predict_step(name, MODEL, size=1, compute=1.0, **LINK)
  assert alone == (1.0, 0.0, 0.0, 1.0)


def test_rounds_apart_and_hidden_behind_computation():
  given: dict[str, Any] = {"size": 16, "compute": 0.1, **LINK}
  each = lab.predict_step("ring_allreduce", MODEL, **given)
  tenth = lab.predict_step("ring_allreduce", MODEL, every=10, **given)
  assert tenth.communication == pytest.approx(each.communication / 10)
  assert tenth.bytes_out == pytest.approx(each.bytes_out / 10)
  hidden = lab.predict_step("ring_allreduce", MODEL, overlap=0.1, **given)
  assert hidden.seconds == 0.1 and hidden.efficiency == 1
  partly = lab.predict_step(
    "ring_allreduce", MODEL, overlap=0.04, every=10, **given
  )
  visible = (each.communication - 0.04) / 10
  assert partly.seconds == pytest.approx(0.1 + visible)


def test_ten_thousand_ranks_take_names():
  step = lab.predict_step(
    "exponential", MODEL, size=10_000, ranks_per_host=8, compute=0.1, **LINK
  )
  # Offsets 1 to 8192; those of 1, 2 and 4 leave a host that often.
  assert step.bytes_out == (1 + 2 + 4 + 11 * 8) * MODEL
  assert communication("mesh_grid_2d", size=10_000) == pytest.approx(
    4 * MODEL / LINK["bandwidth"] + LINK["latency"]
  )


@pytest.mark.parametrize(
  "change, error, text",
  [
    ({"graph": "star"}, ValueError, "'star' is not one of one_peer_exp"),
    (
      {"graph": 3},
      TypeError,
      "expects a Topology, a Schedule or a name, got 3",
    ),
    ({"size": None}, ValueError, "'ring' has no size; pass size="),
    ({"size": 0}, ValueError, "size=0"),
    (
      {"graph": topology.ring(4)},
      ValueError,
      "size=8 and the graph has 4 ranks",
    ),
    ({"ranks_per_host": 3}, ValueError, "ranks_per_host=3 does not divide 8"),
    ({"message_bytes": -1}, ValueError, "message_bytes=-1 must be a finite"),
    ({"compute": math.nan}, ValueError, "compute=nan must be a finite"),
    ({"latency": -1e-3}, ValueError, "latency=-0.001 must be a finite"),
    ({"inner_latency": math.inf}, ValueError, "inner_latency=inf must be"),
    ({"bandwidth": 0}, ValueError, "bandwidth=0 must be above 0"),
    ({"inner_bandwidth": math.nan}, ValueError, "inner_bandwidth=nan must be"),
    ({"every": 0}, ValueError, "every=0"),
  ],
)
def test_bad_predictions(change, error, text):
  given: dict[str, Any] = {
    **{"graph": "ring", "message_bytes": 8.0, "size": 8, "compute": 0.1},
    **LINK,
    **change,
  }
  with pytest.raises(error, match=text):
    lab.predict_step(given.pop("graph"), given.pop("message_bytes"), **given)
