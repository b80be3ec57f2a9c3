"""A sweep of 1000 ranks, 10 seeds and 5 graphs, and `simulate` against a Python loop.

Run it as `python benchmarks/laboratory.py`. With `--folder` the sweep keeps each
result, and a second run only reads them.
"""

import argparse
import pathlib
import time

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jfog

SCRIPT = pathlib.Path(__file__).resolve()
EXAMPLES = 16  # of a rank
BATCH = 2  # examples of a rank and step
RECORDS = 20  # losses that are kept
LOOP_PARAMETERS = (16, 1024, 10_000)


def main():
  """Runs the sweep and the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ranks", type=int, default=1000)
  parser.add_argument("--seeds", type=int, default=10)
  parser.add_argument(
    "--parameters", type=int, default=10_000, help="a square number"
  )
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument(
    "--graphs",
    nargs="+",
    choices=list(_measure.graphs_of(4)),
    default=list(_measure.graphs_of(4)),
  )
  parser.add_argument(
    "--memory", type=int, default=2**26, help="bytes of a block of points"
  )
  parser.add_argument(
    "--folder", type=pathlib.Path, help="keeps each result, and reads it again"
  )
  parser.add_argument(
    "--loop-ranks",
    type=int,
    nargs="*",
    default=[64, 1000],
    help="numbers of ranks of the comparison with a Python loop",
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=_measure.FOLDER / "results"
  )
  options = parser.parse_args()
  if round(options.parameters**0.5) ** 2 != options.parameters:
    parser.error("--parameters must be a square number.")
  if options.steps % RECORDS:
    parser.error(f"--steps must be a multiple of {RECORDS}.")

  graphs = {
    name: graph
    for name, graph in _measure.graphs_of(options.ranks).items()
    if name in options.graphs
  }
  seconds, tables = {}, {}
  for name, graph in graphs.items():
    begin = time.perf_counter()
    tables[name] = jfog.lab.sweep(
      training(round(options.parameters**0.5), options.steps),
      {"graph": {name: graph}, "seed": options.seeds},
      options.ranks,
      memory=options.memory,
      folder=options.folder,
    )
    seconds[name] = time.perf_counter() - begin
    print(f"{name}: {seconds[name]:.1f} s", flush=True)
  loops = {
    (trains, ranks, parameters): against_loop(ranks, parameters, trains)
    for trains in (False, True)
    for ranks in options.loop_ranks
    for parameters in LOOP_PARAMETERS
  }
  report(seconds, tables, loops, options)


def loss(weights, rows, classes):
  """Cross entropy of a linear softmax classifier."""
  return optax.softmax_cross_entropy_with_integer_labels(
    rows @ weights, classes
  ).mean()


def examples(key, side):
  """The examples of a rank: features and classes by a common teacher."""
  teacher = jax.random.normal(jax.random.key(0), (side, side))
  rows = jax.random.normal(key, (EXAMPLES, side)) / side**0.5
  return rows, jnp.argmax(rows @ teacher, axis=1)


def training(side, steps):
  """The program of a rank: SGD on `side**2` parameters and averages."""

  def program(seed, graph):
    key = jax.random.fold_in(jax.random.key(seed), jfog.rank())
    rows, classes = examples(key, side)
    tx = jfog.optimizers.adapt_then_combine(optax.sgd(0.5), graph)

    def step(carry, k):
      weights, state = carry
      chosen = (k * BATCH + jnp.arange(BATCH)) % EXAMPLES
      gradient = jax.grad(loss)(weights, rows[chosen], classes[chosen])
      updates, state = tx.update(gradient, state, weights)
      return (optax.apply_updates(weights, updates), state), None

    def record(carry, k):
      each = steps // RECORDS
      carry, _ = jax.lax.scan(step, carry, k * each + jnp.arange(each))
      return carry, loss(carry[0], rows, classes)

    weights = jnp.zeros((side, side))
    return {
      "loss": jax.lax.scan(
        record, (weights, tx.init(weights)), jnp.arange(RECORDS)
      )[1]
    }

  return program


def against_loop(ranks, parameters, trains, rounds=5):
  """Seconds of a step: in `simulate`, and in a loop over ranks.

  A step is an average; one that `trains` is a step of SGD before it, too.
  """
  side = round(parameters**0.5)
  graph = jfog.topology.one_peer_exponential(ranks)
  rows, classes = jax.vmap(lambda key: examples(key, side))(
    jax.random.split(jax.random.key(1), ranks)
  )
  start = jax.random.normal(jax.random.key(2), (ranks, side, side))
  steps = 10

  def adapt(weights, rows, classes):
    if not trains:
      return weights
    gradient = jax.grad(loss)(weights, rows[:BATCH], classes[:BATCH])
    return weights - 0.5 * gradient

  def on_rank(weights, rows, classes):
    def step(weights, k):
      adapted = adapt(weights, rows, classes)
      return jfog.neighbor_allreduce(adapted, graph, k), None

    return jax.lax.scan(step, weights, jnp.arange(steps))[0]

  simulated = jax.jit(jfog.simulate(on_rank, ranks))
  local = jax.jit(adapt)
  mix = jax.jit(lambda own, other, weight: own + weight * (other - own))
  own_rows, own_classes, own_start = list(rows), list(classes), list(start)
  sources = [
    [(r, *each.in_neighbors(r)) for r in range(ranks)] for each in graph.rounds
  ]

  def loop(count):
    weights = own_start
    for k in range(count):
      if trains:
        weights = [
          local(*each)
          for each in zip(weights, own_rows, own_classes, strict=True)
        ]
      weights = [
        mix(weights[r], weights[source], 0.5)
        for r, source in sources[k % len(sources)]
      ]
    return weights

  def dense(weights, count):
    for k in range(count):
      weights = jax.vmap(adapt)(weights, rows, classes)
      matrix = graph.rounds[k % len(graph.rounds)].mixing_matrix
      weights = jnp.einsum("ij,jab->iab", jnp.asarray(matrix), weights)
    return weights

  np.testing.assert_allclose(np.stack(loop(3)), dense(start, 3), atol=1e-4)
  np.testing.assert_allclose(
    simulated(start, rows, classes), dense(start, steps), atol=1e-4
  )

  def timed(form):
    begin = time.perf_counter()
    if form == "simulate":
      jax.block_until_ready(simulated(start, rows, classes))
    else:
      jax.block_until_ready(loop(steps))
    return (time.perf_counter() - begin) / steps

  return _measure.alternate(
    {form: form for form in ("simulate", "loop")}, rounds, timed
  )


def report(seconds, tables, loops, options):
  """Writes the tables and the plot."""
  lines = _measure.header(
    "The laboratory",
    f"a sweep of {options.ranks} virtual ranks, {options.seeds} seeds, "
    f"{options.parameters:,} parameters, {options.steps} steps and "
    f"{len(seconds)} graphs, by jfog.lab.sweep; and simulate against a loop over "
    "ranks",
    SCRIPT,
    [
      f"model: a linear softmax classifier, {BATCH} examples of a rank and step",
      "seconds include compilation; of all but the first they are few",
    ],
  )
  lines += ["## The sweep", ""]
  rows = [
    [
      *(name, f"{of:.0f} s"),
      f"{1000 * of / options.steps / options.seeds:.3g} ms",
      f"{float(tables[name]['loss'].isel(step=-1).mean()):.4f}",
    ]
    for name, of in seconds.items()
  ]
  total = sum(seconds.values())
  rows.append(["all", f"{total:.0f} s ({total / 60:.1f} min)", "", ""])
  lines += _measure.table(
    ["graph", "time", "step of all ranks", "loss at the end"], rows
  )
  if loops:
    lines += [
      "## Against a Python loop over ranks",
      "",
      "A one-peer average of all ranks, by itself and after a step of SGD: jitted "
      "`simulate` in a scan; and a loop that calls a jitted gradient and a jitted "
      "average for each rank. Both are compared with products of the mixing matrix "
      "first.",
      "",
    ]
    rows = [
      [
        "SGD and average" if trains else "average",
        *(ranks, f"{parameters:,}"),
        _measure.duration(np.median(times["simulate"])),
        _measure.duration(np.median(times["loop"])),
        _measure.spread(_measure.ratios(times["loop"], times["simulate"]), 1),
      ]
      for (trains, ranks, parameters), times in loops.items()
    ]
    lines += _measure.table(
      ["step", "ranks", "parameters", "simulate", "loop", "loop by simulate"],
      rows,
    )
  figure, axes = _measure.panels(1, 1)
  for name, table in tables.items():
    curve = table["loss"].mean("seed").values.ravel()
    at = options.steps // RECORDS * np.arange(1, len(curve) + 1)
    axes[0][0].plot(at, curve, label=name, lw=1.2)
  axes[0][0].set(
    title=f"{options.ranks} ranks, {options.parameters:,} parameters",
    xlabel="steps",
    ylabel="loss of a rank's own examples",
  )
  axes[0][0].grid(alpha=0.3)
  axes[0][0].legend(fontsize=8)
  figure.tight_layout()
  _measure.write(options.out, "laboratory", lines, figure)


if __name__ == "__main__":
  main()
