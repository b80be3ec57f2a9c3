"""Steps and bytes to a given error on many virtual ranks, by graph and algorithm.

Run it as `python benchmarks/convergence.py`. A logistic regression is trained on virtual
ranks by `jfog.lab.sweep`; with `--folder` a run that was interrupted goes on.
"""

import argparse
import itertools
import pathlib
import time

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jfog

SCRIPT = pathlib.Path(__file__).resolve()
DIMENSION = 10
EXAMPLES = 50  # of a rank
BATCH = 4  # examples of a rank and step
REGULARIZATION = 1e-2
LEARNING_RATE = 0.2  # halved five times
RECORD = 10  # steps between records
TARGETS = (1e-2, 1e-3)
AS_GOOD = 2.0  # times allreduce's error
SPREADS = {"equal data": 0.0, "unequal data": 1.0}
ALLREDUCE = "allreduce"
LOCAL = "local SGD, every 8"


def main():
  """Runs the sweeps, and writes the tables and the plots."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--ranks", type=int, nargs="+", default=[64, 100, 256, 1024]
  )
  parser.add_argument("--seeds", type=int, default=10)
  parser.add_argument("--steps", type=int, default=4800)
  parser.add_argument(
    "--algorithms-up-to",
    type=int,
    default=64,
    metavar="RANKS",
    help="the most ranks with other algorithms than plain averages",
  )
  parser.add_argument(
    "--folder", type=pathlib.Path, help="keeps each result, and reads it again"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=_measure.FOLDER / "results"
  )
  options = parser.parse_args()
  if options.steps % (6 * RECORD):
    parser.error(f"--steps must be a multiple of {6 * RECORD}.")
  curves = {}
  for ranks in options.ranks:
    begin = time.perf_counter()
    curves[ranks] = sweep(ranks, options)
    print(f"{ranks} ranks: {time.perf_counter() - begin:.0f} s", flush=True)
  report(curves, options)


def methods(ranks, steps, with_algorithms):
  """The optimizers by name, and the graph from which their bytes follow."""
  rate = optax.exponential_decay(LEARNING_RATE, steps // 6, 0.5, staircase=True)
  sgd, optimizers = optax.sgd(rate), jfog.optimizers
  graphs = _measure.graphs_of(ranks)
  found = {
    name: (optimizers.adapt_then_combine(sgd, graph), graph, 1)
    for name, graph in graphs.items()
  }
  found[ALLREDUCE] = (optimizers.gradient_allreduce(sgd), None, 1)
  if with_algorithms:
    ring, one_peer = graphs["ring"], graphs["one-peer exponential"]
    found |= {
      "ring, exact diffusion": (optimizers.exact_diffusion(sgd, ring), ring, 1),
      "ring, gradient tracking": (
        *(optimizers.gradient_tracking(sgd, ring, form="atc"), ring, 2),
      ),
      "one-peer, gradient tracking": (
        *(optimizers.gradient_tracking(sgd, one_peer, form="atc"), one_peer, 2),
      ),
      "ring, gossip PGA, every 8": (
        *(optimizers.gossip_pga(sgd, ring, every=8), ring, 1),
      ),
      LOCAL: (optimizers.local_sgd(sgd, every=8), None, 1 / 8),
    }
  return found


def models_sent(ranks, graph, factor):
  """Copies of the parameters that a rank sends in a step."""
  if graph is None:  # a ring allreduce
    return factor * 2 * (ranks - 1) / ranks
  x = jax.ShapeDtypeStruct((DIMENSION,), np.float32)
  sent = jfog.diagnostics.bytes_per_step(graph, x)
  return factor * sent / (4 * DIMENSION)


def sweep(ranks, options):
  """Errors by spread and optimizer, means over seeds, one for each record."""
  found = methods(ranks, options.steps, ranks <= options.algorithms_up_to)

  def program(problem, optimizer):
    return {"error": errors(problem[jfog.rank()], optimizer, options.steps)}

  axes = {
    "optimizer": {name: tx for name, (tx, *_) in found.items()},
    "problem": problems(ranks, options.seeds),
  }
  table = jfog.lab.sweep(program, axes, ranks, folder=options.folder)
  values = table["error"].values  # optimizer, problem, record
  by_spread = values.reshape(len(found), len(SPREADS), options.seeds, -1).mean(
    axis=2
  )
  return {
    label: dict(zip(found, by_spread[:, i], strict=True))
    for i, label in enumerate(SPREADS)
  }


def problems(ranks, seeds):
  """The data of all ranks, problem by problem; spreads, then seeds.

  A problem has a row for each example of a rank, features and label, and a last one
  with the minimizer of all losses and the seed.
  """
  made = np.zeros(
    (len(SPREADS) * seeds, ranks, EXAMPLES + 1, DIMENSION + 1), np.float32
  )
  for i, (spread, seed) in enumerate(
    itertools.product(SPREADS.values(), range(seeds))
  ):
    rng = np.random.RandomState(seed)
    common = rng.standard_normal(DIMENSION)
    own = common + spread * rng.standard_normal((ranks, DIMENSION))
    features = rng.standard_normal((ranks, EXAMPLES, DIMENSION))
    likely = 1 / (1 + np.exp(-np.einsum("rmd,rd->rm", features, own)))
    labels = np.where(rng.uniform(size=likely.shape) < likely, 1.0, -1.0)
    made[i, :, :-1, :-1], made[i, :, :-1, -1] = features, labels
    made[i, :, -1, :-1] = minimizer(features, labels)
    made[i, :, -1, -1] = seed
  return made


def minimizer(features, labels):
  """The minimizer of the mean loss of all examples, by Newton's method."""
  rows = (features * labels[..., None]).reshape(-1, DIMENSION)
  x = np.zeros(DIMENSION)
  for _ in range(50):
    wrong = 1 / (1 + np.exp(rows @ x))
    gradient = -(wrong @ rows) / len(rows) + REGULARIZATION * x
    if np.linalg.norm(gradient) < 1e-10:
      return x
    curved = (rows.T * (wrong * (1 - wrong))) @ rows / len(rows)
    x = x - np.linalg.solve(
      curved + REGULARIZATION * np.eye(DIMENSION), gradient
    )
  raise RuntimeError("Newton's method has not converged.")


def errors(problem, tx, steps):
  """Squared distances of this rank's parameters to the minimizer of all losses."""
  features, labels = problem[:-1, :-1], problem[:-1, -1]
  best, seed = problem[-1, :-1], problem[-1, -1].astype(jnp.int32)
  key = jax.random.fold_in(jax.random.key(seed), jfog.rank())

  def loss(x, rows, signs):
    margins = jnp.logaddexp(0.0, -signs * (rows @ x)).mean()
    return margins + REGULARIZATION / 2 * jnp.sum(x**2)

  def step(carry, chosen):
    x, state = carry
    gradient = jax.grad(loss)(x, features[chosen], labels[chosen])
    updates, state = tx.update(gradient, state, x)
    return (optax.apply_updates(x, updates), state), None

  def record(carry, k):
    bits = jax.random.bits(
      jax.random.fold_in(key, k), (RECORD, BATCH), "uint32"
    )
    chosen = (bits % EXAMPLES).astype(jnp.int32)
    carry, _ = jax.lax.scan(step, carry, chosen)
    return carry, jnp.sum((carry[0] - best) ** 2)

  x = jnp.zeros(DIMENSION)
  return jax.lax.scan(record, (x, tx.init(x)), jnp.arange(steps // RECORD))[1]


# Results.


def smooth(curve, width=5):
  """Running geometric means over records, the first ones over fewer."""
  logs = np.log(np.maximum(curve, 1e-30))
  sums = np.cumsum(np.concatenate([[0.0], logs]))
  ends = np.arange(1, len(curve) + 1)
  begins = np.maximum(0, ends - width)
  return np.exp((sums[ends] - sums[begins]) / (ends - begins))


def first_below(curve, target):
  """The step from which on the curve is at or below the target; None if never."""
  above = np.nonzero(~(curve <= target))[0]
  begin = above[-1] + 1 if len(above) else 0
  return None if begin == len(curve) else int((begin + 1) * RECORD)


def rows_of(ranks, errors_of, steps):
  """Rows of the table of a number of ranks and a spread, by method."""
  found = methods(ranks, steps, any(LOCAL in n for n in errors_of))
  allreduce = smooth(errors_of[ALLREDUCE])
  rows = []
  for name, curve in errors_of.items():
    curve = smooth(curve)
    sent = models_sent(ranks, *found[name][1:])
    cells = [f"{sent:.3g}"]
    for target in (*TARGETS, AS_GOOD * allreduce[-1]):
      at = first_below(curve, target)
      cells.append("-" if at is None else f"{at:,}, {at * sent:,.0f}")
    transient = first_below(curve / allreduce, AS_GOOD)
    cells.append(f"over {steps:,}" if transient is None else f"{transient:,}")
    cells.append(f"{curve[-1]:.2g}, {curve[-1] / allreduce[-1]:.3g}")
    rows.append([name, *cells])
  return rows


def consensus(ranks, rounds):
  """Distances to the mean in plain averaging of random values, by graph."""
  x = np.random.RandomState(0).standard_normal((ranks, 16))
  mean, found = x.mean(axis=0), {}
  for name, graph in _measure.graphs_of(ranks).items():
    y, distances = x, [1.0]
    for t in range(rounds):
      y = graph.rounds[t % len(graph.rounds)].mixing_matrix @ y
      distances.append(np.linalg.norm(y - mean) / np.linalg.norm(x - mean))
    found[name] = np.maximum(distances, 1e-16)
  return found


def report(curves, options):
  """Writes the tables and the plot."""
  lines = _measure.header(
    "Convergence on many virtual ranks",
    "a logistic regression by SGD on each rank and averages of parameters; all "
    "methods see the same examples in the same order",
    SCRIPT,
    [
      f"problem: {DIMENSION} parameters, {EXAMPLES} examples of each rank, "
      f"{BATCH} of them in a step, {options.steps} steps, learning rate "
      f"{LEARNING_RATE} halved five times; means of {options.seeds} seeds",
      "unequal data: the true parameters of ranks differ by a standard normal",
      "error: mean over ranks of the squared distance to the minimizer; to an "
      "error: steps, and copies of the parameters that a rank sends until then",
      f"as allreduce: from this step on the error is at most {AS_GOOD:g} times that "
      "of allreduce, the transient stage",
      "at the end: the error, and by that of allreduce",
    ],
  )
  for ranks, by_spread in curves.items():
    for label, found in by_spread.items():
      lines += [f"## {ranks} ranks, {label}", ""]
      lines += _measure.table(
        [
          *("method", "sent a step"),
          *(f"to {target:g}" for target in TARGETS),
          f"to {AS_GOOD:g} times allreduce's end",
          *("as allreduce", "at the end"),
        ],
        rows_of(ranks, found, options.steps),
      )
  _measure.write(options.out, "convergence", lines, draw(curves, options))


def draw(curves, options):
  """Errors over steps, and plain averaging over rounds."""
  figure, axes = _measure.panels(len(curves), 3)
  for row, (ranks, by_spread) in zip(axes, curves.items(), strict=True):
    colors = {}
    for panel, (label, found) in zip(row, by_spread.items(), strict=False):
      for i, name in enumerate([*_measure.graphs_of(ranks), ALLREDUCE]):
        colors[name] = "black" if name == ALLREDUCE else f"C{i}"
        curve = found[name]
        at = RECORD * np.arange(1, len(curve) + 1)
        style = {"lw": 1.1, "color": colors[name], "label": name}
        panel.semilogy(at, smooth(curve), **style)
      panel.set(
        title=f"{ranks} ranks, {label}",
        xlabel="steps",
        ylabel="squared error",
      )
    period = (ranks - 1).bit_length()
    for name, distances in consensus(ranks, 4 * period).items():
      row[2].semilogy(
        distances, "o-", ms=2, lw=1, color=colors[name], label=name
      )
    row[2].set(
      title=f"{ranks} ranks, averaging alone",
      xlabel="rounds",
      ylabel="distance to the mean",
      ylim=(1e-9, 2),
    )
    for panel in row:
      panel.grid(alpha=0.3)
  axes[0][0].legend(fontsize=7)
  figure.tight_layout()
  return figure


if __name__ == "__main__":
  main()
