"""Cost of a call that communicates, against the same call without communication.

Run it as `python benchmarks/call.py`; it starts the jobs itself.
"""

import importlib.util
import json
import pathlib
import time

import _measure
import numpy as np

SCRIPT = pathlib.Path(__file__).resolve()
LEAVES = (2, 60, 300)  # arguments, half of them parameters
SHAPE = (32, 32)  # above the size at which XLA:CPU calls a program cheap
CALLS = 20  # in flight at once; XLA:CPU lets 32 be
ORDERS = ("device", "strict")
FORMS = ("jit", "AOT", "mpi4jax, jit")
AHEAD = 10


def main():
  """Starts the jobs, or does the work of one rank of a job."""
  parser = _measure.arguments(__doc__.splitlines()[0], ranks=[2, 4])
  options = parser.parse_args()
  if options.job:
    return on_mpi(json.loads(options.job))
  turns, rounds = (1, 5) if options.quick else (3, 15)
  measured = {n: in_turns(n, turns, rounds) for n in options.ranks}
  report(measured, options.out)


def in_turns(ranks, turns, rounds):
  """Runs a job for each order in turns; returns all their measurements.

  From an order and a case to the lists of each peer, one entry a round.
  """
  found = {}
  for turn in range(turns):
    for order in ORDERS if turn % 2 == 0 else ORDERS[::-1]:
      result = _measure.mpi_job(
        SCRIPT, ranks, {"rounds": rounds}, {"JFOG_ORDER": order}
      )
      for case, peers in result.items():
        for peer, values in peers.items():
          kept = found.setdefault(f"{order} {case}", {}).setdefault(peer, [])
          kept.extend(values)
  return found


def step_of(average):
  """A step of momentum on a tree, with an average of the parameters."""
  import jax

  def step(state):
    params, momenta = state
    momenta = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, momenta, params)
    params = jax.tree.map(lambda p, m: p - 0.01 * m, params, momenta)
    return average(params), momenta

  return step


def averages(graph, comm):
  """The averages by jfog and by mpi4jax."""
  import jax
  import jax.numpy as jnp

  import jfog

  found = {"jfog": lambda params: jfog.neighbor_allreduce(params, graph)}
  if importlib.util.find_spec("mpi4jax"):
    import mpi4jax

    def by_mpi4jax(params):
      leaves, structure = jax.tree.flatten(params)
      flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
      right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
      got = mpi4jax.sendrecv(flat, flat, left, right, comm=comm)
      mixed = jnp.split(0.5 * (flat + got), len(leaves))
      return structure.unflatten(
        [m.reshape(leaf.shape) for m, leaf in zip(mixed, leaves, strict=True)]
      )

    found["mpi4jax"] = by_mpi4jax
  return found


def on_mpi(job):
  """One rank of a job: the forms alternate within each case."""
  comm, _ = _measure.start_mpi()
  import jax
  import jax.numpy as jnp

  import jfog

  graph = jfog.topology.ring(comm.size, "right")
  found = {}
  for leaves in LEAVES:
    params = [jnp.full(SHAPE, float(i)) for i in range(leaves // 2)]
    state = (params, params)
    forms = {}
    alone = jax.jit(step_of(lambda params: params))
    forms["alone, jit"] = alone
    forms["alone, AOT"] = alone.lower(state).compile()
    for name, average in averages(graph, comm).items():
      jitted = jax.jit(step_of(average))
      forms[f"{name}, jit"] = jitted
      if name == "jfog" and job_order() == "device":
        forms[f"{name}, AOT"] = jitted.lower(state).compile()
    for form in forms.values():
      jax.block_until_ready(form(form(state)))

    def measure(form, state=state):
      comm.Barrier()
      wall, start = time.perf_counter(), time.thread_time()
      kept = [state]
      for _ in range(CALLS):
        kept.append(form(kept[-1]))
      cpu = time.thread_time() - start
      jax.block_until_ready(kept[-1])
      return cpu / CALLS, (time.perf_counter() - wall) / CALLS

    times = _measure.alternate(forms, job["rounds"], measure)
    found[f"{leaves} cpu"] = {k: [c for c, _ in v] for k, v in times.items()}
    found[f"{leaves} wall"] = {k: [w for _, w in v] for k, v in times.items()}

  x = jnp.ones(SHAPE)

  def eager(call):
    comm.Barrier()
    start = time.thread_time()
    kept = [call() for _ in range(CALLS)]
    cpu = time.thread_time() - start
    jax.block_until_ready(kept)
    return cpu / CALLS

  forms = {
    "jnp.add": lambda: jnp.add(x, x),
    "neighbor_allreduce": lambda: jfog.neighbor_allreduce(x, graph),
    "allreduce": lambda: jfog.allreduce(x),
  }
  for form in forms.values():
    eager(form)
  found["eager"] = _measure.alternate(forms, job["rounds"], eager)
  found["ahead"] = {"steps": [ahead(comm, graph)]}
  if comm.rank == 0:
    pathlib.Path(job["result"]).write_text(json.dumps(found))


def job_order():
  """The order between programs in this process."""
  from jfog import _compat

  return _compat.order_between_programs()


def ahead(comm, graph):
  """Steps that rank 0 has dispatched before its neighbors start the first."""
  import jax
  import jax.numpy as jnp

  import jfog

  step = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph) + 1)
  x = step(jnp.ones(1000)).block_until_ready()
  comm.Barrier()
  dispatched = 0
  if comm.rank > 0:
    time.sleep(1.0)
  start = time.perf_counter()
  for _ in range(AHEAD):
    x = step(x)
    if time.perf_counter() - start < 0.9:
      dispatched += 1
  x.block_until_ready()
  return dispatched


def report(measured, out):
  """Writes the table and the plot."""
  lines = _measure.header(
    "Calls",
    "the main thread's CPU time and the wall time of a call that "
    "communicates, by those of the same call without communication",
    SCRIPT,
    [
      f"a step of momentum on arrays of {SHAPE[0]} x {SHAPE[1]} float32, half of "
      f"them parameters; each call takes the results of the one before; "
      f"{CALLS} calls, then a wait",
      "order: device, programs are dispatched ahead; strict, JAX's own order",
      "cells: median [quartiles] of the ratios of the same round",
    ],
  )
  rows, heights = [], {}
  for n, found in measured.items():
    for leaves in LEAVES:
      for order in ORDERS:
        cpu = found[f"{order} {leaves} cpu"]
        wall = found[f"{order} {leaves} wall"]
        for form in FORMS:
          name = form if form.startswith("mpi4jax") else f"jfog, {form}"
          base = "alone, AOT" if form == "AOT" else "alone, jit"
          if name not in cpu:
            continue
          ratio = _measure.ratios(cpu[name], cpu[base])
          heights[n, leaves, order, name] = np.median(ratio)
          rows.append(
            [
              *(n, leaves, order, name),
              _measure.duration(np.median(cpu[base])),
              _measure.spread(ratio),
              _measure.spread(_measure.ratios(wall[name], wall[base])),
            ]
          )
  columns = ["ranks", "arrays", "order", "form", "alone, CPU"]
  lines += _measure.table([*columns, "CPU, ratio", "wall, ratio"], rows)
  rows = []
  for n, found in measured.items():
    for order in ORDERS:
      eager = found[f"{order} eager"]
      rows.append(
        [
          *(n, order, _measure.duration(np.median(eager["jnp.add"]))),
          *(
            _measure.spread(_measure.ratios(eager[name], eager["jnp.add"]))
            for name in ("neighbor_allreduce", "allreduce")
          ),
          f"{min(found[f'{order} ahead']['steps'])} of {AHEAD}",
        ]
      )
  lines += [
    "Eager calls, CPU time by that of `jnp.add`; and how many steps rank 0 has",
    "dispatched before its neighbors start the first:",
    "",
  ]
  columns = ["ranks", "order", "jnp.add", "neighbor_allreduce", "allreduce"]
  lines += _measure.table([*columns, "dispatched"], rows)
  figure, axes = _measure.panels(1, len(measured), sharey=True)
  for panel, n in zip(axes[0], measured, strict=True):
    names = sorted({key[2:] for key in heights})
    for i, name in enumerate(names):
      values = [heights.get((n, leaves, *name), np.nan) for leaves in LEAVES]
      panel.bar(
        np.arange(len(LEAVES)) + 0.2 * i, values, 0.2, label=", ".join(name)
      )
    panel.axhline(1, color="black", lw=1)
    panel.set_yscale("log")
    panel.set_xticks(np.arange(len(LEAVES)) + 0.2, [str(k) for k in LEAVES])
    panel.set_xlabel("arrays")
    panel.set_title(f"{n} ranks")
  axes[0][0].set_ylabel("CPU time by that without communication")
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  _measure.write(out, "call", lines, figure)


if __name__ == "__main__":
  main()
