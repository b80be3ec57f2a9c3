"""Averaging and training on GPUs: jfog, raw NCCL, XLA's collectives.

Run it as `python benchmarks/gpu.py` where there is a GPU; it starts the jobs
itself.
"""

import json
import os
import pathlib
import sys

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
# Bytes of the array, and the steps of one jitted scan or one row of launches.
CHUNKS = {
  8: 64,
  4 * 2**10: 64,
  64 * 2**10: 64,
  2**20: 64,
  16 * 2**20: 16,
  64 * 2**20: 8,
  256 * 2**20: 4,
}
QUICK = (4 * 2**10, 2**20, 256 * 2**20)
CHECKED = (4 * 2**10, 2**20)  # bytes
GRAPHS = ("ring", "one-peer exponential")
RAW_PEERS = ("raw NCCL", "device copy")
XLA_PEERS = ("XLA ppermute", "XLA psum")
PEERS = (*RAW_PEERS, *XLA_PEERS)
TARGET = 0.1  # seconds of one timing
WANTED = 0.6  # of raw NCCL's rate, at the case below
WANTED_CASE = (2, 1, "ring", 256 * 2**20)  # ranks, GPUs, graph, bytes
# Models with their arguments, and the samples of a rank in a step.
MODELS = {
  "ResNet-50": ("resnet", {}, 32),
  "transformer": ("transformer", {}, 8),
}


def main():
  """Starts the jobs in turns, or does the work of one process of a job.

  Returns the exit code: 2 where there is no GPU.
  """
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2, 4])
  parser.add_argument(
    "--bytes", type=int, nargs="+", choices=CHUNKS, help="some of the sizes"
  )
  options = parser.parse_args()
  if options.job:
    job = json.loads(options.job)
    on_mpi(job) if job["place"] == "mpi" else on_xla(job)
    return 0
  if min(options.ranks) < 2:
    parser.error("--ranks: an exchange needs two ranks.")
  from jfog.runtime import _gpu_placement

  found = _gpu_placement.gpus()
  if not found.names:
    print(f"benchmarks/gpu.py: no GPU here: {found.reason}", file=sys.stderr)
    return 2
  job = {
    "cases": [
      (graph, size)
      for graph in GRAPHS
      for size in options.bytes or (QUICK if options.quick else CHUNKS)
    ],
    "models": MODELS,
    "rounds": 3 if options.quick else 5,
    "target": TARGET / (3 if options.quick else 1),
  }
  turns = 1 if options.quick else 3
  measured = [
    in_turns(ranks, gpus, job, turns)
    for ranks in options.ranks
    for gpus in sorted({1, min(ranks, len(found.names))})
  ]
  report(measured, job["cases"], found.names, options.out)
  return 0


def in_turns(ranks, gpus, job, turns):
  """Runs the MPI job, and XLA's if each rank has a GPU; returns all times.

  Under `average` and `training` there is a list for each turn, by the case and
  the peer.
  """
  environment = {"JAX_PLATFORMS": "cuda,cpu"}
  if gpus == 1:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
  job = {**job, "ranks": ranks}
  jobs = [
    lambda: _measure.mpi_job(
      SCRIPT,
      ranks,
      {**job, "place": "mpi", "cuda": "libcuda.so.1"},
      environment,
    )
  ]
  if gpus == ranks:  # XLA wants a device of its own for every process
    jobs.append(
      lambda: _measure.xla_job(
        SCRIPT, ranks, {**job, "place": "xla"}, ranks, environment
      )
    )
  found = {"ranks": ranks, "gpus": gpus, "average": {}, "training": {}}
  for turn in range(turns):
    shift = turn % len(jobs)
    for run in jobs[shift:] + jobs[:shift]:
      result = run()
      for part in ("average", "training"):
        for case, times in result.get(part, {}).items():
          for peer, values in times.items():
            turns_of = found[part].setdefault(case, {}).setdefault(peer, [])
            turns_of.append(values)
      found.update(result.get("facts", {}))
  return found


def key(graph, size):
  """The key of a case in JSON."""
  return f"{graph} {size}"


def on_mpi(job):
  """One rank of the MPI job: its peers alternate within each case.

  `cuda` and `nccl` of the job are the libraries that the raw peers call, by
  default the NCCL that jfog calls.
  """
  comm, slowest = _measure.start_mpi()
  import _gpu_peers
  import jax
  import jax.numpy as jnp

  from jfog import runtime

  nccl = job["nccl"] if "nccl" in job else runtime.nccl_library()[1]
  (device,) = jnp.zeros(()).devices()
  gpu = _gpu_peers.Gpu(comm, device.local_hardware_id or 0, nccl, job["cuda"])
  facts = {
    "device": device.device_kind,
    **dict(zip(("cuda", "nccl"), gpu.versions(), strict=True)),
    "variables": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(("NCCL_", "XLA_"))
    },
    "parameters": {},
  }
  check_averages(job, gpu)
  average = {
    key(*case): times_of_average(job, case, gpu, slowest)
    for case in job["cases"]
  }
  training = {}
  for name, (model, arguments, samples) in job["models"].items():
    count, times = times_of_training(
      job, (model, arguments, samples), comm, slowest
    )
    facts["parameters"][name], training[name] = count, times
    jax.clear_caches()
  gpu.close()
  if comm.rank == 0:
    found = {"average": average, "training": training, "facts": facts}
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def averages(graph, chunk, x, gpu):
  """The peers of the MPI job for one case, by name."""
  import _gpu_peers
  import _peers

  return {
    "jfog": _peers.Jfog(graph, chunk, x, gpu.comm),
    "raw NCCL": _gpu_peers.RawNccl(graph, chunk, x, gpu),
    "device copy": _gpu_peers.DeviceCopy(chunk, x, gpu),
  }


def check_averages(job, gpu):
  """Compares what every peer comes to with NumPy, before any timing."""
  import _peers

  rank, n = gpu.comm.rank, gpu.comm.size
  for name in sorted({graph for graph, _ in job["cases"]}):
    graph = _peers.GRAPHS[name](n)
    for size in CHECKED:
      x = _peers.start(rank, size // 4)
      peers = averages(graph, 2, x, gpu)
      for peer in peers.values():
        peer.seconds(1)
      wanted = _peers.expected(graph, size // 4, 2)[rank]
      np.testing.assert_allclose(peers["jfog"].value(), wanted, 1e-5)
      np.testing.assert_array_equal(peers["device copy"].value(), x)
      plan = _peers.rounds(graph)
      last = plan[1 % len(plan)]  # the second step's neighbors
      received = peers["raw NCCL"].value()[: len(last)]
      for (offset, _), value in zip(last, received, strict=True):
        sent = _peers.start((rank - offset) % n, size // 4)
        np.testing.assert_array_equal(value, sent)


def times_of_average(job, case, gpu, slowest):
  """The seconds of one step by all peers of the MPI job, round by round."""
  import _peers

  name, size = case
  graph = _peers.GRAPHS[name](gpu.comm.size)
  x = _peers.start(gpu.comm.rank, size // 4)
  peers = averages(graph, CHUNKS[size], x, gpu)
  for peer in peers.values():
    peer.seconds(1)  # compiles, and connects
  calls = {
    name: _measure.calls_for(slowest(peer.seconds(1)), job["target"])
    for name, peer in peers.items()
  }

  def step(name):
    peer, many = peers[name], calls[name]
    return slowest(peer.seconds(many)) / (many * peer.chunk)

  return _measure.alternate({name: name for name in peers}, job["rounds"], step)


def times_of_training(job, case, comm, slowest):
  """A model's size, and the seconds of its steps with and without averaging."""
  import _gpu_peers
  import _models
  import jax
  import optax

  import jfog

  name, arguments, samples = case
  model = getattr(_models, name)(**arguments)
  inner = optax.sgd(1e-3, momentum=0.9)
  graph = jfog.topology.one_peer_exponential(comm.size)
  forms = {
    "without": inner,
    "adapt_then_combine": jfog.optimizers.adapt_then_combine(inner, graph),
  }
  batch = jax.jit(model.batch, static_argnums=1)(
    jax.random.key(comm.rank), samples
  )
  init = jax.jit(model.init)
  peers, count = {}, 0
  for form, tx in forms.items():
    params = init(jax.random.key(0))
    count = _models.count(params)
    step = _models.train_step(model.loss, tx)
    peers[form] = _gpu_peers.Training(
      step, params, tx.init(params), batch, comm.Barrier
    )
  for peer in peers.values():
    peer.seconds(1)  # compiles
  pilot = slowest(max(peer.seconds(2) / 2 for peer in peers.values()))
  calls = _measure.calls_for(pilot, 5 * job["target"])

  def seconds(peer):
    return slowest(peer.seconds(calls)) / calls

  times = _measure.alternate(peers, job["rounds"], seconds)
  for form, peer in peers.items():
    assert np.isfinite(float(peer.loss)), f"{name}, {form}: {peer.loss}"
  return count, times


def share_gpu(process, ranks):
  """Lets XLA's NCCL and memory pool share a GPU with other processes.

  As `jfog.init` does for its own; before JAX starts.
  """
  from jfog import runtime

  version = runtime.nccl_library()[0]
  if tuple(map(int, version.split(".")[:2])) >= (2, 30):
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
  else:
    os.environ.setdefault("NCCL_HOSTID", f"xla-{process}")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.7 / ranks:.2f}")


def on_xla(job):
  """One process of the job of XLA's own collectives.

  It has the GPU of its number, or the one that `devices` of the job names.
  """
  import jax

  ranks, process = job["ranks"], job["process"]
  devices = job.get("devices", range(ranks))  # of the processes
  if len(set(devices)) < ranks:
    share_gpu(process, ranks)
  jax.distributed.initialize(
    job["coordinator"], ranks, process, local_device_ids=[devices[process]]
  )
  import _gpu_peers
  import _peers
  from jax.experimental import multihost_utils

  assert jax.device_count() == ranks

  def barrier():
    multihost_utils.sync_global_devices("start")

  def slowest(seconds):
    return float(multihost_utils.process_allgather(np.float32(seconds)).max())

  def peers_of(name, size, chunk):
    graph, x = _peers.GRAPHS[name](ranks), _peers.starts(ranks, size // 4)
    period = len(graph.rounds)
    whole = -(-chunk // period) * period
    return {
      "XLA ppermute": _peers.Xla(graph, whole, x, barrier),
      "XLA psum": _gpu_peers.XlaMean(ranks, chunk, x, barrier),
    }

  for name in sorted({graph for graph, _ in job["cases"]}):
    graph = _peers.GRAPHS[name](ranks)
    for size in CHECKED:
      peers = peers_of(name, size, 2)
      steps = peers["XLA ppermute"].chunk
      starts = _peers.starts(ranks, size // 4)
      mean = np.broadcast_to(starts.mean(0), starts.shape)
      wanted = _peers.expected(graph, size // 4, steps)
      for peer, truth in zip(peers.values(), (wanted, mean), strict=True):
        peer.seconds(1)
        for rank, value in peer.value():
          np.testing.assert_allclose(value, truth[rank], 1e-5)

  average = {}
  for name, size in job["cases"]:
    peers = peers_of(name, size, CHUNKS[size])
    for peer in peers.values():
      peer.seconds(1)  # compiles
    calls = {
      name: _measure.calls_for(slowest(peer.seconds(1)), job["target"])
      for name, peer in peers.items()
    }

    def step(name, peers=peers, calls=calls):
      peer, many = peers[name], calls[name]
      return slowest(peer.seconds(many)) / (many * peer.chunk)

    average[key(name, size)] = _measure.alternate(
      {name: name for name in peers}, job["rounds"], step
    )
  if process == 0:
    pathlib.Path(job["result"]).write_text(json.dumps({"average": average}))


# Output files.


def ratios(times, peer):
  """The times of a peer by jfog's: of one round, or of one turn for XLA."""
  if peer in XLA_PEERS:  # another job: only its median belongs to a turn
    medians = [[np.median(turn) for turn in times[p]] for p in (peer, "jfog")]
    return _measure.ratios(*medians)
  return _measure.ratios(*(np.concatenate(times[p]) for p in (peer, "jfog")))


def neighbors(ranks, graph):
  """How many arrays a rank receives in a step."""
  if graph == "ring":
    return min(2, ranks - 1)
  return 1


def average_rows(measured, cases):
  """The rows of the table of averages."""
  rows = []
  for found in measured:
    for graph, size in cases:
      times = found["average"][key(graph, size)]
      median = float(np.median(np.concatenate(times["jfog"])))
      rate = neighbors(found["ranks"], graph) * size / median / 1e9
      cells = [
        _measure.spread(ratios(times, peer))
        if peer in times
        else "no device of its own for each rank"
        for peer in PEERS
      ]
      rows.append(
        [
          *(found["ranks"], found["gpus"], graph, _measure.size_name(size)),
          *(_measure.duration(median), f"{rate:.3g} GB/s", *cells),
        ]
      )
  return rows


def wanted_row(measured):
  """Whether a large average comes near enough to NCCL's own exchange."""
  ranks, gpus, graph, size = WANTED_CASE
  case = (
    f"in-place average of {_measure.size_name(size)}, {ranks} ranks, "
    f"{gpus} GPU, {graph}"
  )
  for found in measured:
    times = found["average"].get(key(graph, size))
    if (found["ranks"], found["gpus"]) == (ranks, gpus) and times:
      values = ratios(times, "raw NCCL")
      verdict = "reached" if np.median(values) >= WANTED else "missed"
      return [case, _measure.spread(values), f"{WANTED:g}", verdict]
  return [case, "not measured", f"{WANTED:g}", "-"]


def training_rows(measured, models):
  """The rows of the table of trainings: rates of one rank."""
  import _models

  rows = []
  for found in measured:
    for name, (model, arguments, samples) in models.items():
      times = found["training"][name]
      made = getattr(_models, model)(**arguments)
      seconds = {form: np.concatenate(turns) for form, turns in times.items()}
      rates = [
        f"{samples * made.units / np.median(seconds[form]):.0f}"
        for form in ("without", "adapt_then_combine")
      ]
      ratio = _measure.ratios(seconds["without"], seconds["adapt_then_combine"])
      rows.append(
        [
          *(name, f"{found['parameters'][name]:,}", found["ranks"]),
          *(found["gpus"], f"{samples * made.units} {made.unit}"),
          *(*rates, _measure.spread(ratio)),
        ]
      )
  return rows


def text_of(measured, cases, names, models=MODELS):
  """The lines of the result."""
  facts = measured[0]
  variables = {
    f"{found['ranks']} ranks on {found['gpus']} GPU": found["variables"]
    for found in measured
  }
  lines = _measure.header(
    "GPUs",
    "one step of `jfog.neighbor_allreduce` in a jitted scan, in place, against "
    "NCCL's sends and receives alone, a copy on the device, and XLA's "
    "collectives; then training steps",
    SCRIPT,
    [
      f"GPUs: {len(names)}, {', '.join(sorted(set(names)))}; driver for CUDA "
      f"{facts['cuda']}; NCCL {facts['nccl']}",
      *(f"variables, {job}: {found}" for job, found in variables.items()),
    ],
  )
  lines += ["## Averages", ""]
  lines += [
    "Cells: the peer's time by jfog's, median [quartiles]; above 1 jfog is "
    "faster. Raw NCCL does not average, and the copy does not leave the "
    "device: they are limits. GB/s are what a rank receives.",
    "",
  ]
  columns = ["ranks", "GPUs", "graph", "array", "jfog", "rate", *PEERS]
  lines += _measure.table(columns, average_rows(measured, cases))
  lines += _measure.table(
    ["what", "rate by raw NCCL's", "wanted", ""], [wanted_row(measured)]
  )
  lines += ["## Training steps", ""]
  lines += [
    "One call of a jitted step, parameters float32, computing bfloat16; rates "
    "are of one rank, a second. The ratio is with averaging by without: 1 is "
    "no loss.",
    "",
  ]
  columns = ["model", "parameters", "ranks", "GPUs", "batch of a rank"]
  columns += ["without", "`adapt_then_combine`", "ratio"]
  return lines + _measure.table(columns, training_rows(measured, models))


def report(measured, cases, names, out):
  """Writes the tables, the plot, and all times as JSON."""
  figure, axes = _measure.panels(len(measured), len(GRAPHS), sharey=True)
  sizes = sorted({size for _, size in cases})
  for row, found in zip(axes, measured, strict=True):
    for panel, graph in zip(row, GRAPHS, strict=True):
      for peer in PEERS:
        times = [found["average"][key(graph, size)] for size in sizes]
        if all(peer in t for t in times):
          shown = [np.median(ratios(t, peer)) for t in times]
          panel.loglog(sizes, shown, "o-", ms=3, label=peer)
      panel.axhline(1, color="black", lw=1)
      title = f"{graph}, {found['ranks']} ranks on {found['gpus']} GPU"
      panel.set(title=title, xlabel="bytes")
      panel.grid(alpha=0.3)
    row[0].set_ylabel("time by jfog's")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  _measure.write(out, "gpu", text_of(measured, cases, names), figure)
  (out / "gpu.json").write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
  sys.exit(main())
