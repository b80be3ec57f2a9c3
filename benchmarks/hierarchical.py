"""Averaging by machines against flat averages, over a slow link between them.

Run it as `python benchmarks/hierarchical.py`; it starts the jobs itself.
"""

import importlib.util
import json
import pathlib
import time

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
# Bytes of the array, and the steps of one jitted scan, at least.
CHUNKS = {64 * 2**10: 24, 2**20: 6, 16 * 2**20: 2}
CHECKED = 4 * 1001  # bytes, which no number of ranks divides
PEERS = (
  "flat, same result",
  "flat, exponential",
  "flat, one-peer exponential",
  "allreduce",
  "mpi4jax allreduce",
)
TARGET = 0.5  # seconds of one timing


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[4])
  parser.add_argument(
    "--machines", type=int, default=2, help="pretended machines of each job"
  )
  parser.add_argument(
    "--link",
    type=float,
    nargs="+",
    default=[100, 30],
    help="megabytes that a machine sends and receives in a second",
  )
  parser.add_argument(
    "--bytes", type=int, nargs="+", choices=CHUNKS, help="some of the sizes"
  )
  options = parser.parse_args()
  if options.job:
    return on_mpi(json.loads(options.job))
  if any(ranks % options.machines for ranks in options.ranks):
    parser.error("every number of --ranks must be a multiple of --machines.")
  job = {
    "machines": options.machines,
    "sizes": options.bytes or list(CHUNKS),
    "rounds": 3 if options.quick else 7,
    "target": TARGET / (5 if options.quick else 1),
  }
  measured = {
    (ranks, link): _measure.mpi_job(
      SCRIPT, ranks, job, machines=options.machines, link=link
    )
    for ranks in options.ranks
    for link in options.link
  }
  report(measured, job, options.out)


def on_mpi(job):
  """One rank of a job: all forms of averaging alternate within each case."""
  comm, slowest = _measure.start_mpi()
  import _peers

  import jfog

  machines, ranks = job["machines"], comm.size
  assert jfog.machine_size() == machines, "MPI does not see the machines"
  period = len(jfog.topology.one_peer_exponential(ranks))
  forms = forms_of(comm, machines)

  def peers_of(size, chunk):
    x = _peers.start(comm.rank, size // 4)
    chunk += -chunk % period
    return {
      name: _peers.Scanned(step, chunk, 1, x, comm.Barrier)
      for name, (step, _) in forms.items()
    }

  for name, peer in peers_of(CHECKED, period).items():
    _, graph = forms[name]
    peer.seconds(1)
    wanted = _peers.expected(graph, CHECKED // 4, period)[comm.rank]
    np.testing.assert_allclose(peer.value(), wanted, 1e-5, err_msg=name)

  found = {"link": speeds(comm, ranks // machines), "cases": {}}
  for size in job["sizes"]:
    peers = peers_of(size, CHUNKS[size])
    for peer in peers.values():
      peer.seconds(1)  # compiles, and connects
    pilot = slowest(peers["hierarchical"].seconds(1))
    calls = _measure.calls_for(pilot, job["target"])

    def step(peer, calls=calls, size=size):
      before, steps = sent(), calls * peer.chunk
      seconds = slowest(peer.seconds(calls)) / steps
      # Each rank has read the counter of its machine.
      total = comm.allreduce(sent() - before) / (ranks // machines)
      return seconds, total / (ranks * steps * size)

    found["cases"][size] = _measure.alternate(peers, job["rounds"], step)
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def forms_of(comm, machines):
  """For each form of averaging, `(x, index) -> x` and what graph it is."""
  import jfog

  n, topology = comm.size, jfog.topology
  by_machines = topology.one_peer_exponential(machines)
  flat = topology.hierarchical(by_machines, n // machines)
  forms = {
    "hierarchical": (
      lambda x, i: jfog.hierarchical_neighbor_allreduce(x, by_machines, i),
      flat,
    )
  }
  graphs = (flat, topology.exponential(n), topology.one_peer_exponential(n))
  for name, graph in zip(PEERS, graphs, strict=False):
    forms[name] = (
      lambda x, i, graph=graph: jfog.neighbor_allreduce(x, graph, i),
      graph,
    )
  mean = topology.fully_connected(n)
  forms["allreduce"] = lambda x, i: jfog.allreduce(x), mean
  if importlib.util.find_spec("mpi4jax"):
    import mpi4jax
    from mpi4py import MPI

    forms["mpi4jax allreduce"] = (
      lambda x, i: mpi4jax.allreduce(x, MPI.SUM, comm=comm) * np.float32(1 / n),
      mean,
    )
  return forms


def sent():
  """The bytes that have left this machine, headers and all."""
  lines = pathlib.Path("/proc/net/dev").read_text().splitlines()
  counts = dict(line.split(":") for line in lines if ":" in line)
  return int(
    {name.strip(): of for name, of in counts.items()}["wire"].split()[8]
  )


def speeds(comm, local_size):
  """Bytes a second from rank 0, and seconds of a message, by where they go."""
  places = {"between": local_size}
  if local_size > 1:
    places["inside"] = 1
  return {
    place: [
      2**23 / exchange(comm, peer, 2**23, 1, 2),
      exchange(comm, peer, 8, 8, 100) / 2,
    ]
    for place, peer in places.items()
  }


def exchange(comm, peer, there, back, times):
  """The seconds in which bytes come from rank 0 to `peer` and others back."""
  x, y = np.zeros(there, np.uint8), np.zeros(back, np.uint8)
  for repetitions in (1, times):  # the first connects
    comm.Barrier()
    start = time.perf_counter()
    for _ in range(repetitions if comm.rank in (0, peer) else 0):
      if comm.rank == 0:
        comm.Send(x, peer)
        comm.Recv(y, peer)
      else:
        comm.Recv(x, 0)
        comm.Send(y, 0)
    seconds = (time.perf_counter() - start) / repetitions
  return comm.bcast(seconds)


def ratios(times, peer):
  """The seconds of a peer by those of the hierarchical form, by round."""
  return _measure.ratios(
    *([seconds for seconds, _ in times[p]] for p in (peer, "hierarchical"))
  )


def carried(times, peer):
  """The arrays that a rank sends to other machines in a step."""
  return float(np.median([arrays for _, arrays in times[peer]]))


def note(link, speeds):
  """The measured rate of a link with a nominal rate in MB/s."""
  places = [
    f"{rate / 1e6:.3g} MB/s and {_measure.duration(latency)} for a message of "
    f"8 B {place} machines"
    for place, (rate, latency) in speeds.items()
  ]
  return f"link of {link:g} MB/s: one stream has {', '.join(places)}"


def report(measured, job, out):
  """Writes the tables and the plot."""
  cases = [
    (ranks, link, size, found["cases"][str(size)])
    for (ranks, link), found in measured.items()
    for size in job["sizes"]
  ]

  def rows(first, cell):
    return [
      [
        f"{job['machines']} x {ranks // job['machines']}",
        f"{link:g} MB/s",
        _measure.size_name(size),
        first(times),
        *(
          cell(times, peer) if peer in times else "not installed"
          for peer in PEERS
        ),
      ]
      for ranks, link, size, times in cases
    ]

  columns = ["machines x ranks", "link", "array", "hierarchical", *PEERS]
  lines = _measure.header(
    "Averaging by machines over a slow link",
    "one step of `jfog.hierarchical_neighbor_allreduce` in a jitted scan, "
    "against averages by others",
    SCRIPT,
    [
      *(note(link, found["link"]) for (_, link), found in measured.items()),
      "cells: the time by that of hierarchical, median [quartiles]; above 1 "
      "hierarchical is faster",
    ],
  )
  lines += _measure.table(
    columns,
    rows(
      lambda times: _measure.duration(
        np.median([seconds for seconds, _ in times["hierarchical"]])
      ),
      lambda times, peer: _measure.spread(ratios(times, peer)),
    ),
  )
  lines += ["What the wires carry away from a machine in a step, in arrays for"]
  lines += ["each of its ranks, with all headers:", ""]
  lines += _measure.table(
    columns,
    rows(
      lambda times: f"{carried(times, 'hierarchical'):.2f}",
      lambda times, peer: f"{carried(times, peer):.2f}",
    ),
  )
  figure, axes = _measure.panels(1, len(measured), sharey=True)
  for panel, (ranks, link) in zip(axes[0], measured, strict=True):
    here = [times for *of, _, times in cases if of == [ranks, link]]
    for peer in PEERS:
      if all(peer in times for times in here):
        shown = [np.median(ratios(times, peer)) for times in here]
        panel.semilogx(job["sizes"], shown, "o-", ms=3, label=peer)
    panel.axhline(1, color="black", lw=1)
    panel.set(title=f"{ranks} ranks, {link:g} MB/s", xlabel="bytes")
    panel.grid(alpha=0.3)
  axes[0][0].set(ylabel="time by that of hierarchical", ylim=(0, None))
  axes[0][0].legend(fontsize=7)
  figure.tight_layout()
  _measure.write(out, "hierarchical", lines, figure)


if __name__ == "__main__":
  main()
