"""How much of an exchange that waits is hidden behind computing.

Rank 1 comes late by a sleep, so that rank 0's exchange waits for a known time,
whatever the wire is. Run it as `python benchmarks/overlap.py`; it starts the
jobs itself.
"""

import functools
import itertools
import json
import pathlib
import time

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
WAITS = (0.03, 0.1, 0.3)  # seconds by which rank 1 is late
COMPUTES = (0.5, 1.0, 2.0)  # computing time by the wait
COUNT = 2**18  # floats that are exchanged beside matrix products
WIDTH = 256  # of those matrices, and of the network's layers
CHAINS = 8  # of products: XLA runs programs of fewer than 8 steps one by one
BATCH = 64
FORMS = {
  "operation": "`neighbor_allreduce` beside chains of matrix products",
  "start and wait": "the same with `neighbor_allreduce_start` and `wait`",
  "optimizer": "a training step of a small network with `adapt_with_combine`",
}


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2])
  parser.add_argument(
    "--threads",
    type=int,
    nargs="+",
    default=[1, 2],
    help="threads of XLA in each rank",
  )
  options = parser.parse_args()
  if options.job:
    return on_mpi(json.loads(options.job))
  if min(options.ranks) < 2:
    parser.error("--ranks: an exchange needs two ranks.")
  job = {
    "waits": WAITS[:2] if options.quick else WAITS,
    "rounds": 3 if options.quick else 5,
  }
  measured = {}
  for n in options.ranks:
    for threads in options.threads:
      environment = {"NPROC": str(threads)}
      found = _measure.mpi_job(SCRIPT, n, job, environment)
      measured[f"{n} ranks, {threads} XLA threads"] = found
  report(measured, options.out)


# The programs: `(state, work) -> state`, one step each, by computing alone,
# exchanging alone, or both. `work` says how much is computed; it is traced, so
# that one program serves all durations.


def operation_programs(graph, rank, start_and_wait=False):
  """The programs of the first two forms, and the state they take."""
  import _peers
  import jax
  import jax.numpy as jnp

  import jfog

  def chain(matrices, work):
    def one(a):
      return jax.lax.fori_loop(0, work, lambda _, a: jnp.tanh(a @ a), a)

    return [one(a) for a in matrices]

  def compute(state, work):
    x, a = state
    return x, chain(a, work)

  def exchange(state, work):
    return both(state, 0 * work)

  def both(state, work):
    x, a = state
    if start_and_wait:
      handle = jfog.neighbor_allreduce_start(x, graph, 0)
      a = chain(a, work)
      return jfog.wait(handle), a
    return jfog.neighbor_allreduce(x, graph, 0), chain(a, work)

  matrices = np.random.RandomState(0).randn(CHAINS, WIDTH, WIDTH)
  matrices = list((matrices / np.sqrt(WIDTH)).astype(np.float32))
  programs = {"compute": compute, "exchange": exchange, "both": both}
  return programs, (_peers.start(rank, COUNT), matrices)


def optimizer_programs(graph, rank):
  """Those of the third form; `work` is the number of batches of a step."""
  import jax
  import jax.numpy as jnp
  import optax

  import jfog

  random = np.random.RandomState(rank)
  batch = random.randn(BATCH, WIDTH).astype(np.float32)
  widths = (WIDTH, WIDTH, WIDTH, 10)
  params = [
    (random.randn(a, b) / np.sqrt(a)).astype(np.float32)
    for a, b in itertools.pairwise(widths)
  ]
  inner = optax.sgd(1e-6)
  tx = jfog.optimizers.adapt_with_combine(inner, graph)

  def loss(params, batch):
    hidden = batch
    for weights in params[:-1]:
      hidden = jax.nn.relu(hidden @ weights)
    return jnp.mean((hidden @ params[-1] - 1) ** 2)

  def gradient(params, work):
    def add(i, total):
      one = jax.grad(loss)(params, batch * (1 + 0.01 * i))
      return jax.tree.map(jnp.add, total, one)

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, work, add, zeros)

  def compute(state, work):
    params, opt_state = state
    updates, inner_state = inner.update(
      gradient(params, work), opt_state.inner_state, params
    )
    opt_state = opt_state._replace(inner_state=inner_state)
    return optax.apply_updates(params, updates), opt_state

  def exchange(state, work):
    del work
    params, opt_state = state
    return jfog.neighbor_allreduce(params, graph, opt_state.step), opt_state

  def both(state, work):
    params, opt_state = state
    updates, opt_state = tx.update(gradient(params, work), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  programs = {"compute": compute, "exchange": exchange, "both": both}
  return programs, (params, tx.init(params))


def on_mpi(job):
  """One rank of a job: rank 0 computes, rank 1 is late, all exchange."""
  comm, slowest = _measure.start_mpi()
  import jax

  import jfog

  graph = jfog.topology.ring(comm.size)
  forms = {
    "operation": operation_programs,
    "start and wait": functools.partial(
      operation_programs, start_and_wait=True
    ),
    "optimizer": optimizer_programs,
  }
  if not hasattr(jfog, "wait"):
    del forms["start and wait"]

  found = []
  for form, make in forms.items():
    programs, state = make(graph, comm.rank)
    programs = {name: jax.jit(program) for name, program in programs.items()}
    for name in ("exchange", "both"):  # also compiles them
      check(
        comm, graph, programs[name if comm.rank == 0 else "exchange"], state
      )
    alone = seconds_of_one(programs["compute"], state) if comm.rank == 0 else 0
    alone = slowest(alone)
    for late in job["waits"]:
      for factor in COMPUTES:
        work = max(1, round(factor * late / alone))
        step = functools.partial(one_step, comm, programs, state, late, work)
        names = {name: name for name in programs}
        times = _measure.alternate(names, job["rounds"], step)
        found.append({"form": form, "late": late, "factor": factor, **times})
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def one_step(comm, programs, state, late, work, name):
  """This rank's seconds of one step; rank 0 runs the program `name`."""
  import jax

  jax.block_until_ready(state)
  comm.Barrier()
  begin = time.perf_counter()
  if comm.rank == 0:
    jax.block_until_ready(programs[name](state, work))
  elif name != "compute":
    if comm.rank == 1:
      time.sleep(late)
    jax.block_until_ready(programs["exchange"](state, work))
  return time.perf_counter() - begin


def check(comm, graph, program, state):
  """Compares the average of a step that computes nothing with NumPy."""
  import jax

  own = jax.tree.leaves(state[0])
  mixed = jax.tree.leaves(program(state, 0)[0])
  for x, y in zip(own, mixed, strict=True):
    row = graph.mixing_matrix[comm.rank]
    wanted = np.tensordot(row, np.stack(comm.allgather(np.asarray(x))), 1)
    np.testing.assert_allclose(y, wanted, 1e-5, 1e-6)


def seconds_of_one(computing, state):
  """The seconds of one unit of work, alone on the machine."""
  import jax

  jax.block_until_ready(computing(state, 10))
  work, seconds = 10, 0.0
  while seconds < 0.05:
    work *= 2
    begin = time.perf_counter()
    jax.block_until_ready(computing(state, work))
    seconds = time.perf_counter() - begin
  return seconds / work


def report(measured, out):
  """Writes the table and the plot."""
  rows, present = [], []
  for job, found in measured.items():
    for case in found:
      bound = np.maximum(case["compute"], case["exchange"])
      sums = np.add(case["compute"], case["exchange"])
      present.append(case["form"])
      rows.append(
        [
          case["form"],
          job,
          _measure.duration(case["late"]),
          *(
            _measure.duration(np.median(case[name]))
            for name in ("compute", "exchange", "both")
          ),
          _measure.spread(np.divide(case["both"], bound)),
          f"{np.median(sums / bound):.2f}",
        ]
      )
  lines = _measure.header(
    "Overlap",
    "a step that exchanges and computes, against the longer of the two alone; "
    "rank 1 is late, and the times are rank 0's",
    SCRIPT,
    [
      *(f"{form}: {what}" for form, what in FORMS.items() if form in present),
      "both by the longer: median [quartiles]; 1 hides the shorter one wholly, "
      "and the last column is what hides nothing",
    ],
  )
  columns = ["form", "job", "rank 1 late by", "compute", "exchange", "both"]
  columns += ["both by the longer", "without overlap"]
  lines += _measure.table(columns, rows)
  figure, axes = _measure.panels(1, len(measured), sharey=True)
  for panel, (job, found) in zip(axes[0], measured.items(), strict=True):
    for form in dict.fromkeys(case["form"] for case in found):
      for factor, marker in zip(COMPUTES, ("v", "o", "^"), strict=True):
        cases = [
          c for c in found if c["form"] == form and c["factor"] == factor
        ]
        bounds = [np.maximum(c["compute"], c["exchange"]) for c in cases]
        panel.plot(
          [1000 * c["late"] for c in cases],
          [
            np.median(np.divide(c["both"], bound))
            for c, bound in zip(cases, bounds, strict=True)
          ],
          f"{marker}-",
          color=f"C{list(FORMS).index(form)}",
          label=f"{form}, compute = {factor:g} wait",
        )
    panel.axhline(1, color="black", lw=1)
    panel.set(title=job, xlabel="rank 1 late by (ms)", xscale="log")
    panel.grid(alpha=0.3)
  axes[0][0].set_ylabel("both by the longer")
  axes[0][0].legend(fontsize=7)
  figure.tight_layout()
  _measure.write(out, "overlap", lines, figure)


if __name__ == "__main__":
  main()
