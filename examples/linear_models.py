"""Linear and logistic regression with all synchronous optimizers.

`python examples/linear_models.py` fits a ridge regression (scikit-learn's
diabetes) and a logistic regression of three classes (its wines) on 8 virtual
ranks, in 64-bit floats and with constant step sizes. The samples are sorted by
their targets, so the data of the ranks differ; the exact minimizer is known. It
prints the final distance to it and the bytes sent, and plots the distance
against steps and bytes: exact methods converge up to rounding, the others up to
a bias.

`jfog run -np 4 python examples/linear_models.py` does the same on MPI, where
the bytes are counted; on virtual ranks they follow from the formulas below. For
the window optimizers see `async_push_sum.py`.
"""

import argparse
import collections
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import networkx as nx
import numpy as np
import optax
from sklearn.datasets import load_diabetes, load_wine
from tabulate import tabulate
from tqdm import tqdm

import jfog
from jfog import optimizers, topology
from jfog.diagnostics import bytes_per_step, trace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVERY = 5  # steps between global averages
MOMENTUM = 0.8
SLOW = 0.2  # step size times L of methods with a bias, momentum included
RECORDS = 150  # points per curve
FLOOR = 1e-16  # lower bound in the plot

# The models.


class Model(NamedTuple):
  """A regression with samples on `n` ranks, and its constants."""

  x: np.ndarray  # shape=(n, samples, features), the last feature is 1
  y: np.ndarray  # shape=(n, samples, outputs)
  loss: Callable  # (params, x, y) of one rank -> a scalar
  solution: np.ndarray  # shape=(features, outputs), minimizer of the mean loss
  smoothness: float  # largest Lipschitz constant of a rank's gradient
  convexity: float  # smallest curvature of the mean of losses at the solution


def ridge(params, x, y, l2):
  """Half the mean square of the residuals, and of the parameters times `l2`."""
  residual = x @ params - y
  return jnp.mean(residual**2) / 2 + l2 / 2 * jnp.sum(params**2)


def logistic(params, x, y, l2):
  """The mean cross entropy of the softmax, and half the squares times `l2`."""
  entropy = optax.softmax_cross_entropy(x @ params, y).mean()
  return entropy + l2 / 2 * jnp.sum(params**2)


def linear_model(n, split, seed, l2):
  """Ridge regression of the progress of diabetes on ten features."""
  diabetes = load_diabetes()
  target = standardised(diabetes.target)
  x, y = shared_out(diabetes.data, target[:, None], target, n, split, seed)
  rows, columns = x.reshape(-1, x.shape[-1]), y.reshape(-1, 1)
  hessian = rows.T @ rows / len(rows) + l2 * np.eye(x.shape[-1])
  return Model(
    x,
    y,
    functools.partial(ridge, l2=l2),
    np.linalg.solve(hessian, rows.T @ columns / len(rows)),
    largest_curvature(x) + l2,
    np.linalg.eigvalsh(hessian)[0],
  )


def logistic_model(n, split, seed, l2):
  """Logistic regression of three kinds of wine on thirteen features."""
  wine = load_wine()
  x, y = shared_out(
    wine.data, np.eye(3)[wine.target], wine.target, n, split, seed
  )
  solution, hessian = newton(
    x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), l2
  )
  return Model(
    x,
    y,
    functools.partial(logistic, l2=l2),
    solution,
    largest_curvature(x) / 2 + l2,  # the softmax has curvatures up to 1/2
    np.linalg.eigvalsh(hessian)[0],
  )


MODELS = {"linear": linear_model, "logistic": logistic_model}


def standardised(x):
  return (x - x.mean(axis=0)) / x.std(axis=0)


def shared_out(x, y, order_by, n, split, seed):
  """Standardized features and a constant one, and targets, stacked over ranks."""
  x = np.column_stack([standardised(x), np.ones(len(x))])
  if split == "sorted":
    order = np.argsort(order_by, kind="stable")
  else:
    order = np.random.RandomState(seed).permutation(len(x))
  each = len(x) // n
  if not each:
    raise SystemExit(f"{n} ranks are too many for {len(x)} samples.")
  order = order[: n * each].reshape(n, each)
  return x[order], y[order]


def largest_curvature(x):
  """The largest eigenvalue of any rank's `x^T x / samples`."""
  return max(np.linalg.norm(rows, 2) ** 2 / len(rows) for rows in x)


def newton(x, y, l2):
  """The minimizer of the logistic loss to rounding, and the Hessian there."""
  features, outputs = x.shape[1], y.shape[1]
  w = np.zeros((features, outputs))
  for _ in range(50):
    scores = np.exp(x @ w - (x @ w).max(axis=1, keepdims=True))
    p = scores / scores.sum(axis=1, keepdims=True)
    gradient = x.T @ (p - y) / len(x) + l2 * w
    # d p_a / d score_b = p_a (delta_ab - p_b), for every sample.
    inner = p[:, :, None] * (np.eye(outputs) - p[:, None, :])
    hessian = np.einsum("si,sab,sj->iajb", x, inner, x) / len(x)
    hessian = hessian.reshape(w.size, w.size) + l2 * np.eye(w.size)
    change = np.linalg.solve(hessian, gradient.ravel()).reshape(w.shape)
    w = w - change
    if np.linalg.norm(change) < 1e-15 * np.linalg.norm(w):
      break
  return w, hessian


# The methods.


def ring(n):
  return topology.ring(n)


def lazy_ring(n):
  """The lazy ring, with all eigenvalues above 0; D2 needs them above -1/3."""
  return topology.ring(n).lazy()


def one_peer(n):
  return topology.one_peer_exponential(n)


def all_ranks(n):
  return topology.fully_connected(n)


def binary_tree(n):
  return topology.from_networkx(nx.full_rary_tree(2, n))


def shortcuts(n, weights):
  """A directed ring on which even ranks also send to the opposite rank."""
  graph = nx.DiGraph()
  graph.add_nodes_from(range(n))
  for rank in range(n):
    hops = (1,) if rank % 2 else (1, max(2, n // 2))
    graph.add_edges_from((rank, (rank + h) % n) for h in hops if h % n)
  return topology.from_networkx(graph, weights=weights)


def directed(n):
  """Column-stochastic, not row-stochastic: for push-sum methods."""
  return shortcuts(n, "uniform_out")


class Method(NamedTuple):
  """An optimizer on a graph, with the step size `factor` / smoothness."""

  is_exact: bool
  factor: float
  graph: Callable  # number of ranks -> graph
  make: Callable  # (step size, graph, seed) -> optimizer
  # (graph, params) -> mean bytes that a rank sends per step.
  sent: Callable[[Any, Any], float] = bytes_per_step


def sgd(method, *arguments, **options):
  """A maker of a method that wraps gradient descent."""
  return lambda a, graph, seed: method(
    optax.sgd(a), graph, *arguments, **options
  )


def rate(method, *arguments):
  """A maker of a method that takes a step size."""
  return lambda a, graph, seed: method(a, *arguments, graph)


def compressed(method, compressor, part):
  """A maker of a method that sends compressed messages."""
  return lambda a, graph, seed: method(
    optax.sgd(a), graph, compressor, part, seed=seed
  )


def twice(graph, x):
  return bytes_per_step(graph, (x, x))


def with_weight(*copies):
  """Bytes of push-sum, which sends a scalar with the parameters."""
  return lambda graph, x: bytes_per_step(graph, ([x] * len(copies), 1.0))


def an_allreduce(graph, x):
  """The contribution of a rank; the algorithm is chosen by the MPI library."""
  return float(x.nbytes)


def of(compressor):
  return functools.partial(bytes_per_step, compressor=compressor)


def of_factors(rank):
  """Bytes of PowerGossip: one factor in even steps, the other in odd ones."""

  def sent(graph, x):
    columns = min(rank, *x.shape)
    return bytes_per_step(graph, x) * columns * sum(x.shape) / (2 * x.size)

  return sent


def now_and_then(graph, x):
  """Bytes to neighbors, and of the rounds of CECA in every `EVERY`-th step."""
  exact = topology.ceca(graph.size)
  mean = len(exact) * bytes_per_step(exact, x)
  return ((EVERY - 1) * bytes_per_step(graph, x) + mean) / EVERY


TOP, SIGN = optimizers.top_k(fraction=0.25), optimizers.sign()
LOW, CODES = optimizers.low_rank(1), optimizers.quantize(8)
METHODS = {
  "gradient_allreduce": Method(
    True,
    1.0,
    all_ranks,
    lambda a, graph, seed: optimizers.gradient_allreduce(optax.sgd(a)),
    an_allreduce,
  ),
  "adapt_then_combine": Method(
    False, SLOW, ring, sgd(optimizers.adapt_then_combine)
  ),
  "adapt_then_combine:one-peer": Method(
    False, SLOW, one_peer, sgd(optimizers.adapt_then_combine)
  ),
  "adapt_with_combine": Method(
    False, SLOW, ring, sgd(optimizers.adapt_with_combine)
  ),
  "local_sgd": Method(
    False,
    SLOW,
    all_ranks,
    lambda a, graph, seed: optimizers.local_sgd(optax.sgd(a), EVERY),
    lambda graph, x: an_allreduce(graph, x) / EVERY,
  ),
  "gossip_pga": Method(
    False,
    SLOW,
    ring,
    lambda a, graph, seed: optimizers.gossip_pga(
      optax.sgd(a), graph, EVERY, mean=topology.ceca(graph.size)
    ),
    now_and_then,
  ),
  "slow_momentum": Method(
    False,
    SLOW / 2,
    ring,
    lambda a, graph, seed: optimizers.slow_momentum(
      optax.sgd(a), graph, EVERY, 1.0, 0.5, mean=topology.ceca(graph.size)
    ),
    now_and_then,
  ),
  "diloco": Method(
    False,
    SLOW / 1.4,
    all_ranks,
    lambda a, graph, seed: optimizers.diloco(
      optax.sgd(a), optax.sgd(0.7, momentum=0.5, nesterov=True), EVERY
    ),
    lambda graph, x: an_allreduce(graph, x) / EVERY,
  ),
  "decentlam": Method(
    False, (1 - MOMENTUM) * SLOW, ring, rate(optimizers.decentlam, MOMENTUM)
  ),
  "quasi_global_momentum": Method(
    False,
    (1 - MOMENTUM) * SLOW,
    ring,
    rate(optimizers.quasi_global_momentum, MOMENTUM),
  ),
  "dmsgd_sync": Method(
    False,
    (1 - MOMENTUM) * SLOW,
    ring,
    rate(optimizers.dmsgd_sync, MOMENTUM),
    twice,
  ),
  "exact_diffusion": Method(True, 1.0, ring, sgd(optimizers.exact_diffusion)),
  "d2": Method(True, 1.0, lazy_ring, sgd(optimizers.d2)),
  "nids": Method(True, 1.0, ring, rate(optimizers.nids)),
  "extra": Method(True, 0.6, ring, rate(optimizers.extra)),
  "gradient_tracking": Method(
    True, 0.3, ring, sgd(optimizers.gradient_tracking), twice
  ),
  "gradient_tracking:atc": Method(
    True, 0.5, ring, sgd(optimizers.gradient_tracking, "atc"), twice
  ),
  "gradient_tracking:one-peer": Method(
    True, 0.5, one_peer, sgd(optimizers.gradient_tracking, "atc"), twice
  ),
  "push_sum": Method(
    False, SLOW, directed, sgd(optimizers.push_sum), with_weight("xs")
  ),
  "push_diging": Method(
    True, 0.3, directed, rate(optimizers.push_diging), with_weight("u", "y")
  ),
  "push_pull": Method(
    True,
    0.25,
    directed,
    lambda a, graph, seed: optimizers.push_pull(
      a, shortcuts(graph.size, "uniform_in"), graph
    ),
    twice,
  ),
  "relay_sum": Method(True, 0.6, binary_tree, sgd(optimizers.relay_sum)),
  "choco:top_k": Method(
    False, SLOW, ring, compressed(optimizers.choco, TOP, 0.3), of(TOP)
  ),
  "choco:sign": Method(
    False, SLOW, ring, compressed(optimizers.choco, SIGN, 0.3), of(SIGN)
  ),
  "choco:low_rank": Method(
    False, SLOW, ring, compressed(optimizers.choco, LOW, 0.3), of(LOW)
  ),
  "deep_squeeze:quantize": Method(
    False,
    SLOW,
    ring,
    compressed(optimizers.deep_squeeze, CODES, 0.5),
    of(CODES),
  ),
  "power_gossip": Method(
    False,
    SLOW,
    ring,
    lambda a, graph, seed: optimizers.power_gossip(
      optax.sgd(a), graph, 1, seed=seed
    ),
    of_factors(1),
  ),
}


def fit(name, model, arguments):
  """Fits a model with one method; returns its curves."""
  method = METHODS[name]
  n = len(model.x)
  graph = method.graph(n)
  step_size = arguments.step_scale * method.factor / model.smoothness
  tx = method.make(step_size, graph, arguments.seed)
  start = jnp.zeros(model.solution.shape)
  every = max(1, arguments.steps // RECORDS)

  def program(x, y):
    return trace(
      tx,
      lambda params: model.loss(params, x, y),
      start,
      arguments.steps,
      every=every,
      distance_to=model.solution,
      bytes_per_step=method.sent(graph, start),
    )[2]

  seen = jax.jit(jfog.map_ranks(program, n, out_axes=None))(model.x, model.y)

  def relative(distance):
    return (np.asarray(distance) / np.linalg.norm(model.solution)).tolist()

  sent = np.asarray(seen.bytes_per_step) * every
  return {
    "exact": method.is_exact,
    "step_size": step_size,
    "step": np.asarray(seen.step).tolist(),
    "loss": np.asarray(seen.loss).tolist(),
    "consensus_distance": relative(seen.consensus_distance),
    "distance": relative(seen.distance),
    "bytes": (np.cumsum(sent) - sent).tolist(),  # before the recorded step
    "bytes_per_step": float(sent.mean() / every),
  }


# The report.


def table(name, model, curves):
  """Prints a line for each method."""
  n, samples, features = model.x.shape
  print(
    f"\n{name} regression: {n} ranks with {samples} samples each, "
    f"{features} x {model.y.shape[-1]} parameters"
  )
  print(
    f"largest curvature of a rank L = {model.smoothness:.3g}, smallest "
    f"curvature of the mean loss mu = {model.convexity:.3g}"
  )
  rows = []
  for method, curve in curves.items():
    near = np.flatnonzero(np.array(curve["distance"]) < 1e-6)
    rows.append(
      (
        method,
        "yes" if curve["exact"] else "no",
        f"{curve['step_size'] * model.smoothness:.2g}",
        curve["bytes_per_step"],
        curve["distance"][-1],
        curve["bytes"][near[0]] if len(near) else None,
        curve["consensus_distance"][-1],
      )
    )
  heads = ("method", "exact", "step\ntimes L", "bytes per\nstep")
  print(
    tabulate(
      rows,
      headers=(
        *heads,
        "final\ndistance",
        "bytes until\n1e-6",
        "ranks\napart",
      ),
      floatfmt=("", "", "", ",.0f", ".1e", ",.0f", ".1e"),
      colalign=("left", *6 * ["right"]),
      missingval="-",
    )
  )


def plot(results, arguments, place):
  """Draws the distances: against steps on the left, against bytes on the right."""
  figure, rows = plt.subplots(
    len(results),
    2,
    figsize=(14, 1 + 4.6 * len(results)),
    sharey=True,
    squeeze=False,
  )
  for axes, (model, curves) in zip(rows, results.items(), strict=True):
    drawn = collections.Counter()
    for method, curve in curves.items():
      number = drawn[curve["exact"]]
      drawn[curve["exact"]] += 1
      style = dict(  # the ten strong colors first
        color=plt.get_cmap("tab20")((2 * number + number // 10) % 20),
        linestyle="-" if curve["exact"] else "--",
        linewidth=1.3,
        label=method,
      )
      distance = np.maximum(curve["distance"], FLOOR)
      axes[0].semilogy(curve["step"], distance, **style)
      axes[1].loglog(np.array(curve["bytes"][1:]), distance[1:], **style)
    axes[0].set(ylabel="distance to the minimizer", title=f"{model} regression")
    axes[0].set(xlabel="step", ylim=(FLOOR, 10))
    axes[1].set(xlabel="bytes that a rank has sent")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for panel in axes:
      panel.grid(alpha=0.3)
  figure.suptitle(
    f"{arguments.split} split, {place}; dashed: methods with a bias"
  )
  figure.tight_layout()
  figure.savefig(arguments.output, dpi=110)
  print(f"plot: {arguments.output}")


def parse():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "--ranks", type=int, default=8, help="virtual ranks, when not on MPI"
  )
  parser.add_argument("--model", choices=(*MODELS, "both"), default="both")
  parser.add_argument(
    "--split",
    choices=("sorted", "even"),
    default="sorted",
    help="sorted by target, or shuffled",
  )
  parser.add_argument("--steps", type=int, default=6000)
  parser.add_argument(
    "--step-scale",
    type=float,
    default=1.0,
    help="factor of all step sizes, which were chosen for 3 to 8 ranks; larger "
    "graphs need smaller ones for gradient tracking",
  )
  parser.add_argument(
    "--l2", type=float, default=0.1, help="weight of the squared parameters"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--quick", action="store_true", help="the linear model, 1500 steps"
  )
  parser.add_argument(
    "--methods",
    nargs="+",
    choices=METHODS,
    default=tuple(METHODS),
    metavar="METHOD",
    help="some of: " + ", ".join(METHODS),
  )
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("linear_models.png")
  )
  parser.add_argument("--json", type=pathlib.Path, help="write the curves here")
  arguments = parser.parse_args()
  if arguments.quick:
    arguments.model, arguments.steps = "linear", 1500
  if arguments.steps < 1 or not math.isfinite(arguments.l2):
    parser.error("--steps must be at least 1, and --l2 a number")
  return arguments


def main():
  """Fits the models with every method and reports."""
  arguments = parse()
  jax.config.update("jax_enable_x64", True)
  n = jfog.num_ranks(arguments.ranks)
  names = MODELS if arguments.model == "both" else [arguments.model]
  models = {
    name: MODELS[name](n, arguments.split, arguments.seed, arguments.l2)
    for name in names
  }
  results = {name: {} for name in names}
  with tqdm(
    total=len(names) * len(arguments.methods),
    disable=jfog.rank() != 0,
    unit="fit",
  ) as progress:
    for name in names:
      for method in arguments.methods:
        progress.set_description(f"{name}, {method}")
        results[name][method] = fit(method, models[name], arguments)
        progress.update()
  if jfog.rank() == 0:
    for name in names:
      table(name, models[name], results[name])
    backend = jfog.init().backend
    place = "virtual" if backend == "single" else backend.upper()
    plot(results, arguments, f"{n} {place} ranks")
    if arguments.json:
      arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
  main()
