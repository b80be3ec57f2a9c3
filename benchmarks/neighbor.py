"""Neighbor averaging by jfog, raw MPI, mpi4py, mpi4jax and XLA, side by side.

Run it as `python benchmarks/neighbor.py`; it starts the jobs itself.
"""

import importlib.util
import json
import pathlib
import sys

import _measure
import numpy as np

from jfog.bench.peers import CHUNKS

SCRIPT = pathlib.Path(__file__).resolve()
QUICK = (8, 32 * 2**10, 2**20)
CHECKED = (4 * 2**10, 2**20)  # bytes, one sent eagerly and one not
GRAPHS = ("ring", "exponential", "one-peer exponential")
MPI_PEERS = ("raw MPI", "mpi4py", "mpi4jax")
XLA_PEERS = ("XLA, one process", "XLA, gloo")
ABSENT = {"XLA, gloo": "did not end"}
TARGET = 0.03  # seconds of one timing
GLOO_DEADLINE = 300  # seconds of one job; a job at 4 ranks takes half of it


def main():
  """Starts the jobs in turns, or does the work of one process of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2, 4])
  parser.add_argument(
    "--bytes", type=int, nargs="+", choices=CHUNKS, help="some of the sizes"
  )
  options = parser.parse_args()
  if options.job:
    job = json.loads(options.job)
    return on_mpi(job) if job["place"] == "mpi" else on_xla(job)
  cases = [
    (graph, size)
    for graph in GRAPHS
    for size in options.bytes or (QUICK if options.quick else CHUNKS)
  ]
  turns, rounds = (1, 3) if options.quick else (3, 3)
  measured = {
    n: in_turns(n, cases, turns, rounds, TARGET / (3 if options.quick else 1))
    for n in options.ranks
  }
  report(measured, cases, options.out)


def in_turns(ranks, cases, turns, rounds, target):
  """Runs the MPI job and the two of XLA in turns; returns all their times.

  A dict from `graph size` and a peer's name to one list for each turn.
  """
  found = {}
  job = {"cases": cases, "rounds": rounds, "target": target, "ranks": ranks}
  jobs = [
    lambda: _measure.mpi_job(SCRIPT, ranks, {**job, "place": "mpi"}),
    lambda: _measure.xla_job(SCRIPT, ranks, {**job, "place": "mesh"}, 1),
    lambda: gloo_job(ranks, job),
  ]
  for turn in range(turns):
    for run in jobs[turn % 3 :] + jobs[: turn % 3]:
      for case, times in run().items():
        for peer, values in times.items():
          found.setdefault(case, {}).setdefault(peer, []).append(values)
  return found


def gloo_job(ranks, job):
  """The job of XLA's gloo collectives, which have hung: then without times."""
  try:
    return _measure.xla_job(
      SCRIPT, ranks, {**job, "place": "gloo"}, ranks, deadline=GLOO_DEADLINE
    )
  except _measure.JobTimeoutError as error:
    print(f"{error}; this turn goes without it", file=sys.stderr)
    return {}


def key(graph, size):
  """The key of a case in JSON."""
  return f"{graph} {size}"


def on_mpi(job):
  """One rank of the MPI job: all its peers alternate within each case."""
  comm, slowest = _measure.start_mpi()
  import _peers

  make = {
    "jfog": _peers.Jfog,
    "raw MPI": _peers.Raw,
    "mpi4py": _peers.Mpi4py,
  }
  if importlib.util.find_spec("mpi4jax"):
    make["mpi4jax"] = _peers.Mpi4jax

  def peers_of(graph, chunk, size):
    x = _peers.start(comm.rank, size // 4)
    return {name: peer(graph, chunk, x, comm) for name, peer in make.items()}

  for name in sorted({graph for graph, _ in job["cases"]}):
    graph = _peers.GRAPHS[name](comm.size)
    for size in CHECKED:
      wanted = _peers.expected(graph, size // 4, 2)[comm.rank]
      for peer, of in peers_of(graph, 2, size).items():
        of.seconds(1)
        np.testing.assert_allclose(of.value(), wanted, 1e-5, err_msg=peer)

  found = {}
  for name, size in job["cases"]:
    graph, chunk = _peers.GRAPHS[name](comm.size), CHUNKS[size]
    peers = peers_of(graph, chunk, size)
    for peer in peers.values():
      peer.seconds(1)  # compiles
    pilot = slowest(peers["jfog"].seconds(1))
    calls = _measure.calls_for(pilot, job["target"])

    def step(peer, calls=calls):
      return slowest(peer.seconds(calls)) / (calls * peer.chunk)

    found[key(name, size)] = _measure.alternate(peers, job["rounds"], step)
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def on_xla(job):
  """One process of a job of XLA's own collectives."""
  import jax

  gloo = job["place"] == "gloo"
  if gloo:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(job["coordinator"], job["ranks"], job["process"])
  import _peers
  from jax.experimental import multihost_utils

  def barrier():
    if gloo:
      multihost_utils.sync_global_devices("start")

  def slowest(seconds):
    if not gloo:
      return seconds
    return float(multihost_utils.process_allgather(np.float32(seconds)).max())

  ranks = job["ranks"]
  for name in sorted({graph for graph, _ in job["cases"]}):
    graph = _peers.GRAPHS[name](ranks)
    for size in CHECKED:
      wanted = _peers.expected(graph, size // 4, 2)
      peer = _peers.Xla(graph, 2, _peers.starts(ranks, size // 4), barrier)
      peer.seconds(1)
      for rank, value in peer.value():
        np.testing.assert_allclose(value, wanted[rank], 1e-5)

  found = {}
  for name, size in job["cases"]:
    graph, x = _peers.GRAPHS[name](ranks), _peers.starts(ranks, size // 4)
    # A step through gloo is so slow that a short scan is long enough.
    chunk = max(4, CHUNKS[size] // 64) if gloo else CHUNKS[size]
    peer = _peers.Xla(graph, chunk, x, barrier)
    peer.seconds(1)  # compiles
    calls = _measure.calls_for(slowest(peer.seconds(1)), job["target"])
    steps = calls * peer.chunk
    times = [slowest(peer.seconds(calls)) / steps for _ in range(job["rounds"])]
    found[key(name, size)] = {XLA_PEERS[gloo]: times}
  if job["process"] == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def ratios(times, peer):
  """The times of a peer by jfog's: of one round, or of one turn for XLA."""
  if peer not in times:
    return []
  if peer in XLA_PEERS:  # another job: only its median belongs to a turn
    # Fewer turns where a job of gloo did not end.
    turns = zip(times[peer], times["jfog"], strict=False)
    medians = [[np.median(a), np.median(b)] for a, b in turns]
    return _measure.ratios(*zip(*medians, strict=True))
  return _measure.ratios(*(np.concatenate(times[p]) for p in (peer, "jfog")))


def fastest(times, peer):
  """The fastest time of a peer by jfog's fastest."""
  return np.min(times[peer]) / np.min(times["jfog"])


def rows_of(measured, cases, time, cell):
  """The rows of a table: `time` of jfog's times, `cell` of each peer's."""
  rows = []
  for n, found in measured.items():
    for graph, size in cases:
      times = found[key(graph, size)]
      shown = _measure.duration(float(time(times["jfog"])))
      cells = [
        cell(times, peer)
        if peer in times
        else ABSENT.get(peer, "not installed")
        for peer in (*MPI_PEERS, *XLA_PEERS)
      ]
      rows.append([n, graph, _measure.size_name(size), shown, *cells])
  return rows


def report(measured, cases, out):
  """Writes the tables and the plot."""
  peers = (*MPI_PEERS, *XLA_PEERS)
  columns = ["ranks", "graph", "array", "jfog", *peers]
  lines = _measure.header(
    "Neighbor averaging",
    "one step of `jfog.neighbor_allreduce` in a jitted scan, against the same "
    "step by others",
    SCRIPT,
    [
      "cells: the peer's time by jfog's, median [quartiles]; above 1 jfog is "
      "faster"
    ],
  )
  medians = rows_of(
    measured, cases, np.median, lambda *a: _measure.spread(ratios(*a))
  )
  lines += _measure.table(columns, medians)
  lines += [
    "The fastest of all rounds instead, which other work on the machine"
  ]
  lines += ["disturbs least:", ""]
  best = rows_of(measured, cases, np.min, lambda *a: f"{fastest(*a):.2f}")
  lines += _measure.table(columns, best)
  figure, axes = _measure.panels(len(measured), len(GRAPHS), sharey=True)
  sizes = sorted({size for _, size in cases})
  for row, (n, found) in zip(axes, measured.items(), strict=True):
    for panel, graph in zip(row, GRAPHS, strict=True):
      for peer in peers:
        times = [found[key(graph, size)] for size in sizes]
        if all(peer in t for t in times):
          shown = [np.median(ratios(t, peer)) for t in times]
          panel.loglog(sizes, shown, "o-", ms=3, label=peer)
      panel.axhline(1, color="black", lw=1)
      panel.set(title=f"{graph}, {n} ranks", xlabel="bytes")
      panel.grid(alpha=0.3)
    row[0].set_ylabel("time by jfog's")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  _measure.write(out, "neighbor", lines, figure)


if __name__ == "__main__":
  main()
