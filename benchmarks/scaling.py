"""Averages with neighbors against allreduce, over more and more hosts on slow links.

Run it as `python benchmarks/scaling.py`; it starts the jobs itself. Each host is a
network namespace whose link has the rate and the delay of `--link`.
"""

import importlib.util
import json
import os
import pathlib
import time

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
ONE_PEER, STATIC, RING = "one-peer exponential", "exponential", "ring"
HIERARCHICAL = "hierarchical one-peer"
ALLREDUCES = ("jfog.allreduce", "mpi4jax.allreduce", "XLA with gloo")
# Steps of a round of local SGD and DiLoCo, which communicate in its last one.
EVERY = 4
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9
LOCAL_SGD, DILOCO = f"local SGD, every {EVERY}", f"DiLoCo, every {EVERY}"
CHOCO = "choco on the ring, signs"
FORMS = (
  *(ONE_PEER, STATIC, RING, HIERARCHICAL, LOCAL_SGD, DILOCO, CHOCO),
  *ALLREDUCES,
)
GLOO_DEADLINE = 300  # seconds
COORDINATOR = "10.77.0.1:7801"  # on machine0
CHECKED = 1001  # elements, which no number of ranks divides


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2, 4, 8])
  parser.add_argument(
    "--per-host", type=int, default=1, help="ranks on each host"
  )
  parser.add_argument(
    "--link",
    nargs="+",
    default=["125", "125,20"],
    metavar="MEGABYTES[,MILLISECONDS]",
    help="rate of a host's link in each direction, and delay of a message",
  )
  parser.add_argument(
    "--megabytes", type=float, default=25.0, help="of the parameters, in 1e6 B"
  )
  parser.add_argument(
    "--compute",
    type=float,
    default=0.2,
    help="seconds of a step's computation, for the efficiency",
  )
  options = parser.parse_args()
  if options.job:
    job = json.loads(options.job)
    return (on_gloo if job["gloo"] else on_mpi)(job)
  if any(ranks % options.per_host for ranks in options.ranks):
    parser.error("every number of --ranks must be a multiple of --per-host.")
  job = {
    "count": round(options.megabytes * 1e6 / 4),
    "per_host": options.per_host,
    "rounds": 3 if options.quick else 5,
    "steps": 4 if options.quick else 8,
  }
  measured = {}
  for link in options.link:
    for ranks in options.ranks:
      found = run(ranks, link, {**job, "gloo": False})
      found.update(run(ranks, link, {**job, "gloo": True}))
      measured[link, ranks] = found
      seconds = {
        form: round(float(np.median([s for s, _ in times])), 4)
        for form, times in found.items()
      }
      print(f"link {link}, {ranks} ranks: {seconds}", flush=True)
  report(measured, job, options)


def run(ranks, link, job):
  """The measurements of a job: `[seconds, bytes out of a host]` by form."""
  machines = ranks // job["per_host"]
  environment = {"JFOG_SCALING_RANKS": str(ranks)}
  try:
    return _measure.mpi_job(
      SCRIPT, ranks, job, environment, machines=machines, link=link
    )
  except (SystemExit, _measure.JobTimeoutError) as error:
    if not job["gloo"]:
      raise
    print(f"gloo on {ranks} ranks: {error}", flush=True)
    return {}


def sent():
  """The bytes that have left this host, headers and all."""
  lines = pathlib.Path("/proc/net/dev").read_text().splitlines()
  counts = dict(line.split(":") for line in lines if ":" in line)
  return int({k.strip(): of for k, of in counts.items()}["wire"].split()[8])


class Loop:
  """A form: `step(x, state, k)` is jitted, and called step by step."""

  def __init__(self, step, x, state=()):
    import jax

    self._step = jax.jit(step, donate_argnums=(0, 1))
    self._x = x
    self._state = state
    self._k = 0

  @classmethod
  def averaging(cls, average, x):
    """That of an average `(x, k) -> x`."""
    return cls(lambda x, state, k: (average(x, k), state), x)

  @classmethod
  def training(cls, tx, x):
    """That of an optimizer, with gradients of zero: its communication alone."""
    import jax.numpy as jnp

    def step(x, state, k):
      updates, state = tx.update(jnp.zeros_like(x), state, x)
      return x + updates, state

    return cls(step, x, tx.init(x))

  def run(self, steps):
    """Does so many steps, and waits for them."""
    import jax

    for _ in range(steps):
      self._x, self._state = self._step(self._x, self._state, self._k)
      self._k += 1
    jax.block_until_ready(self._x)

  def value(self):
    """The value of this rank."""
    return np.asarray(self._x)


def measure(loops, job, barrier, most, total):
  """Seconds and bytes of a step by form, the forms in turn in each round."""
  for loop in loops.values():
    loop.run(8)  # compiles, and connects

  def one(loop):
    barrier()
    before, begin = sent(), time.perf_counter()
    loop.run(job["steps"])
    seconds = most(time.perf_counter() - begin)
    # Each rank has read the counter of its host.
    hosts = total(1.0) / job["per_host"]
    bytes_out = total(float(sent() - before)) / job["per_host"] / hosts
    return seconds / job["steps"], bytes_out / job["steps"]

  return _measure.alternate(loops, job["rounds"], one)


def on_mpi(job):
  """One rank of a job of jfog and mpi4jax."""
  comm, most = _measure.start_mpi()
  import jax.numpy as jnp
  import optax

  import jfog

  n, topology = comm.size, jfog.topology
  assert jfog.machine_size() == n // job["per_host"], "MPI does not see hosts"
  graphs = {
    ONE_PEER: topology.one_peer_exponential(n),
    STATIC: topology.exponential(n),
    RING: topology.ring(n),
  }

  def over(graph):
    return lambda x, k: jfog.neighbor_allreduce(x, graph, k)

  steps = {name: over(graph) for name, graph in graphs.items()}
  if job["per_host"] > 1 and jfog.machine_size() > 1:
    machines = topology.one_peer_exponential(jfog.machine_size())
    graphs[HIERARCHICAL] = topology.hierarchical(machines, job["per_host"])
    steps[HIERARCHICAL] = lambda x, k: jfog.hierarchical_neighbor_allreduce(
      x, machines, k
    )
  steps["jfog.allreduce"] = lambda x, k: jfog.allreduce(x)
  if importlib.util.find_spec("mpi4jax"):
    import mpi4jax
    from mpi4py import MPI

    steps["mpi4jax.allreduce"] = lambda x, k: (
      mpi4jax.allreduce(x, MPI.SUM, comm=comm) * np.float32(1 / n)
    )

  rules, inner = jfog.optimizers, optax.identity()
  outer = optax.sgd(OUTER_RATE, momentum=OUTER_MOMENTUM, nesterov=True)
  trainings = {
    LOCAL_SGD: rules.local_sgd(inner, EVERY),
    DILOCO: rules.diloco(inner, outer, EVERY),
    CHOCO: rules.choco(inner, graphs[RING], rules.sign(), gamma=0.3),
  }

  def loops(count):
    x = np.random.RandomState(comm.rank).standard_normal(count)
    x = x.astype(np.float32)
    return {
      **{k: Loop.averaging(f, jnp.array(x)) for k, f in steps.items()},
      **{k: Loop.training(tx, jnp.array(x)) for k, tx in trainings.items()},
    }

  start = np.stack(
    [np.random.RandomState(r).standard_normal(CHECKED) for r in range(n)]
  )
  mean = start.mean(axis=0)
  for name, loop in loops(CHECKED).items():
    if name in trainings:
      loop.run(EVERY)
      got, wanted = loop.value(), mean
      if name == DILOCO:
        rate = OUTER_RATE * (1 + OUTER_MOMENTUM)
        wanted = start[comm.rank] + rate * (mean - start[comm.rank])
      if name == CHOCO:  # which keeps the mean of all ranks
        got = comm.allreduce(got.astype(np.float64)) / n
      np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=name)
      continue
    rounds = graphs.get(name, topology.fully_connected(n)).rounds
    wanted = start
    for k in range(3):
      wanted = rounds[k % len(rounds)].mixing_matrix @ wanted
    loop.run(3)
    np.testing.assert_allclose(
      loop.value(), wanted[comm.rank], atol=1e-5, err_msg=name
    )

  found = measure(
    loops(job["count"]), job, comm.Barrier, most, lambda x: comm.allreduce(x)
  )
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def on_gloo(job):
  """One process of a job of XLA's own allreduce, which does not use MPI."""
  import jax

  n = int(os.environ["JFOG_SCALING_RANKS"])
  rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(COORDINATOR, n, rank)
  from jax.experimental import multihost_utils
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), "ranks")
  split = NamedSharding(mesh, PartitionSpec("ranks"))
  x = jax.make_array_from_process_local_data(
    split, np.ones((1, job["count"]), np.float32)
  )
  step = jax.shard_map(
    lambda x: jax.lax.pmean(x, "ranks"),
    mesh=mesh,
    in_specs=PartitionSpec("ranks"),
    out_specs=PartitionSpec("ranks"),
    check_vma=False,
  )

  def gathered(number):
    return multihost_utils.process_allgather(np.float64(number))

  found = measure(
    {"XLA with gloo": Loop.averaging(lambda x, k: step(x), x)},
    job,
    lambda: multihost_utils.sync_global_devices("start"),
    lambda x: float(gathered(x).max()),
    lambda x: float(gathered(x).sum()),
  )
  if rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


# The model: seconds = messages L + arrays M / B, with L and B fitted for each link.


def features(form, ranks, per_host):
  """Latencies and arrays through a host's link, of the formulas of one step."""
  hosts = ranks // per_host
  if form in ALLREDUCES:  # a ring
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks
  if form == HIERARCHICAL:
    return 1, 1
  degree = {ONE_PEER: 1, STATIC: int(np.ceil(np.log2(ranks))), RING: 2}[form]
  if ranks == 2:
    degree = 1
  return 1, degree * (per_host if hosts > 1 else 0)


def fit(measured, link, per_host, of_ranks):
  """L and B of jfog's neighbor averages on a link, from some numbers of ranks."""
  rows, seconds = [], []
  for ranks in of_ranks:
    for form in (ONE_PEER, STATIC, RING):
      rows.append(features(form, ranks, per_host))
      seconds.append(np.median([s for s, _ in measured[link, ranks][form]]))
  scale = 1 / np.array(seconds)  # the relative error counts
  found, *_ = np.linalg.lstsq(
    np.array(rows) * scale[:, None], np.ones(len(rows)), rcond=None
  )
  return np.maximum(found, 0)


def report(measured, job, options):
  """Writes the tables and the plot."""
  megabytes = 4 * job["count"] / 1e6
  lines = _measure.header(
    "Averages over more and more hosts",
    f"one step of averages of {megabytes:g} MB (1e6 B) of float32, called step by "
    "step, with neighbors and as allreduce",
    SCRIPT,
    [
      "hosts: network namespaces on this machine, one link each, all ranks on "
      "its cores; links are slow enough to be what is measured",
      "out of a host: bytes on its link in a step by those of the array, all "
      "headers in",
      f"local SGD and DiLoCo take the mean of all ranks by jfog.allreduce in each "
      f"{EVERY}th step, and their time and bytes are those of a step on average; "
      "choco sends a bit for each value to both neighbors",
      f"efficiency: of a step of {options.compute:g} s of computation, which does "
      "not overlap with the exchange: a computed column, for the cores are shared",
    ],
  )
  for link in options.link:
    rate, _, delay = link.partition(",")
    lines += [f"## {rate} MB/s, {delay or 0} ms", ""]
    rows = []
    for ranks in options.ranks:
      found = measured[link, ranks]
      for form in FORMS:
        if form not in found:
          continue
        seconds = [s for s, _ in found[form]]
        out = np.median([b for _, b in found[form]]) / (4 * job["count"])
        ratio = _measure.ratios(seconds, [s for s, _ in found[ONE_PEER]])
        step = np.median(seconds)
        rows.append(
          [
            *(ranks, form, _measure.duration(step), _measure.spread(ratio)),
            *(
              f"{out:.3f}",
              f"{options.compute / (options.compute + step):.0%}",
            ),
          ]
        )
    lines += _measure.table(
      ["ranks", "form", "step", "by one-peer's", "out of a host", "efficiency"],
      rows,
    )
    lines += model_lines(measured, link, options)
  figure, axes = _measure.panels(1, len(options.link), sharey=True)
  for panel, link in zip(axes[0], options.link, strict=True):
    for form in FORMS:
      at = [r for r in options.ranks if form in measured[link, r]]
      shown = [
        options.compute
        / (options.compute + np.median([s for s, _ in measured[link, r][form]]))
        for r in at
      ]
      if at:
        panel.semilogx(at, shown, "o-", ms=3, base=2, label=form)
    panel.set(title=f"link {link}", xlabel="ranks", ylim=(0, 1))
    panel.grid(alpha=0.3)
  axes[0][0].set(ylabel=f"efficiency, {options.compute:g} s of computation")
  axes[0][0].legend(fontsize=7)
  figure.tight_layout()
  _measure.write(options.out, "scaling", lines, figure)


def model_lines(measured, link, options):
  """The fitted model, and its error where it was not fitted."""
  if len(options.ranks) < 2:
    return []
  fitted = options.ranks[:-1]
  per_message, per_array = fit(measured, link, options.per_host, fitted)
  ranks = options.ranks[-1]
  errors = []
  for form in (ONE_PEER, STATIC, RING):
    latencies, arrays = features(form, ranks, options.per_host)
    expected = latencies * per_message + arrays * per_array
    seen = np.median([s for s, _ in measured[link, ranks][form]])
    errors.append(f"{form} {expected / seen - 1:+.0%}")
  rate = options.megabytes / per_array if per_array else np.inf
  return [
    f"Model from {', '.join(map(str, fitted))} ranks: {rate:.4g} MB/s and "
    f"{1000 * per_message:.3g} ms; its error at {ranks} ranks: "
    f"{', '.join(errors)}.",
    "",
  ]


if __name__ == "__main__":
  main()
