"""The cost of one slow rank for synchronous and asynchronous push-sum.

`jfog run -np 4 python examples/async_push_sum.py` simulates computation by a
pause in each step, and one rank several times slower than the others. It
averages vectors and trains on handwritten digits, with and without the slow
rank, by neighbor averaging, where a rank waits for its neighbors, and by
push-sum over windows, which does not wait. Both get the same time.

`python examples/async_push_sum.py` does the same on virtual ranks. Those run in
lockstep, so time is not measured; messages from and to the slow rank arrive
some steps late instead.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from digits import accuracy, batches, init_params, load, loss
from tabulate import tabulate

import jfog
from jfog import topology
from jfog.diagnostics import consensus_distance
from jfog.optimizers import adapt_then_combine, window_push_sum

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIMENSION = 64  # length of the vectors
POINTS = 60  # points per curve
FLOOR = 1e-16  # lower bound in the plot, for errors of zero


class Method(NamedTuple):
  """The functions of one rank's program."""

  init: Callable  # initial value of the rank -> state; collective
  step: Callable  # (state, data of the rank, step) -> state
  estimate: Callable  # state -> the rank's estimate of the solution
  collect: Callable  # state -> state, after all ranks have stopped


class Problem(NamedTuple):
  """A problem for synchronous and asynchronous methods."""

  name: str
  start: Any  # stacked over ranks
  own: Any  # data of the ranks, stacked over ranks
  synchronous: Callable  # graph -> Method
  asynchronous: Callable  # (graph, delay) -> Method
  score: Callable  # estimate -> a scalar, equal on all ranks
  results: Callable  # estimate -> a dict of such scalars, for the table
  x64: bool


# The average of vectors.


class Sums(NamedTuple):
  """Biased value and weight of a rank."""

  values: jax.Array
  weight: jax.Array


class Windowed(NamedTuple):
  """Biased value of a rank; its weight is in the window."""

  values: jax.Array
  window: jfog.Window


def push_sum(graph):
  """Synchronous push-sum: a rank waits for its in-neighbors."""
  return Method(
    init=lambda x: Sums(x, jnp.ones([], x.dtype)),
    step=lambda state, own, k: jfog.neighbor_allreduce(state, graph),
    estimate=lambda state: state.values / state.weight,
    collect=lambda state: state,
  )


def push_sum_over_windows(graph, delay):
  """Asynchronous push-sum: a rank uses the messages that have arrived."""
  part = 1 / (1 + graph.degree)  # the graph is regular

  def init(x):
    window = jfog.win_create(
      x, graph, zero_init=True, associated_p=True, delay=delay
    )
    return Windowed(x, window)

  def step(state, own, k):
    window = jfog.win_accumulate(state.window, state.values, dst_weights=part)
    return Windowed(
      *jfog.win_update(
        window, state.values, self_weight=part, src_weights=1, reset=True
      )
    )

  def collect(state):
    return Windowed(*jfog.win_update_then_collect(state.window, state.values))

  return Method(
    init=init,
    step=step,
    estimate=lambda state: state.values / jfog.win_associated_p(state.window),
    collect=collect,
  )


def vectors(n, arguments):
  """The average of random vectors."""
  x = np.random.RandomState(arguments.seed).randn(n, DIMENSION)
  mean = x.mean(axis=0)

  def error(estimate):
    return jfog.allreduce(jnp.abs(estimate - mean).max(), "max")

  return Problem(
    name="average",
    start=x,
    own=np.zeros((n, 0)),
    synchronous=push_sum,
    asynchronous=push_sum_over_windows,
    score=error,
    results=lambda estimate: {"error": error(estimate)},
    x64=True,
  )


# Training on handwritten digits.


class Training(NamedTuple):
  """A rank's parameters and the state of its optimizer."""

  params: Any
  state: Any


def sgd(arguments):
  """The local optimizer."""
  return optax.sgd(arguments.learning_rate, momentum=0.9)


def training(tx, collect):
  """Training with an optimizer."""

  def step(training, own, k):
    data, order = own
    batch = order[k % len(order)]
    grads = jax.grad(loss)(training.params, data.x[batch], data.y[batch])
    updates, state = tx.update(grads, training.state, training.params)
    return Training(optax.apply_updates(training.params, updates), state)

  return Method(
    init=lambda params: Training(params, tx.init(params)),
    step=step,
    estimate=lambda training: training.params,
    collect=collect,
  )


def collect_parameters(training):
  """Adds the values left in the window to the parameters."""
  state = training.state
  biased, window = jfog.win_update_then_collect(state.window, state.biased)
  weight = jfog.win_associated_p(window)
  params = jax.tree.map(lambda x: x / weight, biased)
  return Training(params, state._replace(biased=biased, window=window))


def handwritten(n, arguments):
  """The network and the data of the example `digits.py`."""
  data, test = load(n, "iid", arguments.seed)
  epochs = range(20)
  images = data.y.shape[1]
  order = [batches(n, images, arguments.seed, epoch) for epoch in epochs]
  params = jax.tree.map(
    lambda x: np.broadcast_to(x, (n, *x.shape)), init_params(arguments.seed)
  )

  def score(params):
    return jfog.allreduce(accuracy(params, test))

  def results(params):
    return {
      "accuracy": score(params),
      "accuracy_of_mean": accuracy(jfog.allreduce(params), test),
      "consensus_distance": consensus_distance(params),
    }

  return Problem(
    name="digits",
    start=params,
    own=(data, jnp.asarray(np.concatenate(order, axis=1))),
    synchronous=lambda graph: training(
      # Synchronous push-sum: on a regular graph its weights w stay 1.
      adapt_then_combine(sgd(arguments), graph),
      lambda training: training,
    ),
    asynchronous=lambda graph, delay: training(
      window_push_sum(sgd(arguments), graph, delay=delay), collect_parameters
    ),
    score=score,
    results=results,
    x64=False,
  )


# On MPI: time is measured.


class Pace(NamedTuple):
  """The speed of a rank."""

  pause: float  # seconds per step
  factor: float  # duration of its steps relative to the other ranks


def paced(step, state, own, pace, goes_on):
  """Runs steps at a given pace; returns times and estimates after each."""
  jfog.barrier()
  start = time.perf_counter()
  now, trace = 0.0, []
  while goes_on(len(trace), now):
    began = time.perf_counter()
    time.sleep(pace.pause)
    state, estimate = jax.block_until_ready(step(state, own, len(trace) + 1))
    time.sleep((pace.factor - 1) * (time.perf_counter() - began))
    now = time.perf_counter() - start
    trace.append((now, estimate))
  return state, trace


def make_measure(problem, method, rank):
  """A function that runs a method on this rank, compiled once."""
  start, own = jax.tree.map(
    lambda x: jnp.asarray(x[rank]), (problem.start, problem.own)
  )
  init = jax.jit(method.init)

  @jax.jit
  def step(state, own, k):
    state = method.step(state, own, k)
    return state, method.estimate(state)

  @jax.jit
  def finish(state, estimates):
    state = method.collect(state)
    curve = jax.lax.map(problem.score, estimates)
    return state, problem.results(method.estimate(state)), curve

  def measure(pace, goes_on):
    state, _ = step(init(start), own, 0)  # compiles
    state, trace = paced(step, state, own, pace, goes_on)
    jfog.barrier()  # all messages are sent
    times = np.array([now for now, _ in trace])
    seconds = float(jfog.allreduce(jnp.asarray(times[-1]), "max"))
    rates = jfog.allgather(jnp.asarray([len(times) / times[-1]]))
    # All ranks evaluate their estimates at the same times.
    grid = np.linspace(0, seconds, POINTS + 1)[1:]
    last = np.maximum(np.searchsorted(times, grid, side="right") - 1, 0)
    estimates = [trace[i][1] for i in last]
    state, results, curve = finish(
      state, jax.tree.map(lambda *x: np.stack(x), *estimates)
    )
    window = optax.tree_utils.tree_get(state, "window")
    if window is not None:
      jfog.win_free(window)
    return {
      **{name: float(value) for name, value in results.items()},
      "seconds": seconds,
      "rates": np.asarray(rates).tolist(),  # steps per second of each rank
      "x": grid.tolist(),
      "curve": np.asarray(curve).tolist(),
    }

  return measure


def run_on_mpi(problem, graph, world, arguments):
  """All runs of a problem, by name."""
  n, runs = world.size, {}
  waiting, free = (
    make_measure(problem, method, world.rank)
    for method in (
      problem.synchronous(graph),
      problem.asynchronous(graph, None),
    )
  )
  for kind in ("even", "slow"):
    slow = kind == "slow" and world.rank == arguments.slow_rank
    factor = arguments.slow_factor
    pace = Pace(arguments.pause / 1000, factor if slow else 1.0)
    steps = round(arguments.steps * (1 if kind == "slow" else factor))
    run = waiting(pace, lambda count, now, steps=steps: count < steps)
    seconds = run["seconds"]
    runs[f"synchronous, {kind}"] = run
    runs[f"asynchronous, {kind}"] = free(
      pace, lambda count, now, seconds=seconds: now < seconds
    )
  fast = [rank for rank in range(n) if rank != arguments.slow_rank]
  for name, run in runs.items():
    run["fast_rate"] = float(np.mean([run["rates"][rank] for rank in fast]))
    run["slow_rate"] = run["rates"][arguments.slow_rank]
    even = runs[name.replace("slow", "even")]
    run["fast_loss"] = 1 - run["fast_rate"] / even["fast_rate"]
  return runs


# On virtual ranks: steps are counted.


def run_virtual(problem, graph, n, arguments):
  """All runs of a problem, by name."""
  late = round(arguments.slow_factor)
  delay = np.zeros((n, n), int)
  delay[arguments.slow_rank] = delay[:, arguments.slow_rank] = late

  def program(method, waits):
    def one_rank(start, own):
      def step(state, k):
        state = method.step(state, own, k)
        return state, problem.score(method.estimate(state))

      state, curve = jax.lax.scan(
        step, method.init(start), jnp.arange(arguments.steps)
      )
      for _ in range(waits + 1):  # until all messages have arrived
        state = method.collect(state)
      return curve, problem.results(method.estimate(state))

    return jax.jit(jfog.simulate(one_rank, n))

  methods = {
    "synchronous, even": (problem.synchronous(graph), 0),
    "asynchronous, even": (problem.asynchronous(graph, None), 0),
    "asynchronous, late": (problem.asynchronous(graph, delay), late),
  }
  runs = {}
  for name, (method, waits) in methods.items():
    curve, results = program(method, waits)(problem.start, problem.own)
    runs[name] = {
      **{key: float(value[0]) for key, value in results.items()},
      "x": list(range(1, arguments.steps + 1)),
      "curve": np.asarray(curve)[0].tolist(),
    }
  return runs


# The report.


def describe(name, arguments):
  """The printed name of a run."""
  rank = arguments.slow_rank
  return name.replace("slow", f"rank {rank} slow").replace(
    "late", f"rank {rank} late"
  )


def table(problem, runs, arguments):
  """Prints a line for each run."""
  titles = {
    "average": "average of vectors",
    "digits": "training on digits",
  }
  on_mpi = "seconds" in next(iter(runs.values()))
  rows = []
  for name, run in runs.items():
    row = {titles[problem.name]: describe(name, arguments)}
    if on_mpi:
      row["wall\ntime"] = f"{run['seconds']:.2f} s"
      row["fast ranks,\nsteps/s"] = f"{run['fast_rate']:.1f}"
      row["slow rank,\nsteps/s"] = f"{run['slow_rate']:.1f}"
      lost = f"{100 * run['fast_loss']:.0f} %" if "slow" in name else ""
      row["fast ranks\nlose"] = lost
    if problem.name == "average":
      row["error"] = f"{run['error']:.1e}"
      if not on_mpi:
        reached = np.flatnonzero(np.array(run["curve"]) < 1e-6)
        steps = run["x"][reached[0]] if len(reached) else "-"
        row["steps to\n1e-6"] = steps
    else:
      row["accuracy\n(mean)"] = f"{100 * run['accuracy']:.2f} %"
      mean = f"{100 * run['accuracy_of_mean']:.2f} %"
      row["accuracy of\nmean model"] = mean
      row["consensus\ndistance"] = f"{run['consensus_distance']:.1e}"
    rows.append(row)
  align = ("left", *(len(rows[0]) - 1) * ["right"])
  print()
  print(tabulate(rows, "keys", colalign=align, disable_numparse=True))
  if on_mpi and problem.name == "digits":
    print(
      "(loss of the fast ranks: relative to their steps/s without a slow rank)"
    )


def plot(results, arguments):
  """Draws the curves: the average on the left, training on the right."""
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
  for axes, (problem, runs) in zip(panels, results.items(), strict=True):
    for name, run in runs.items():
      style = "-" if name.startswith("asynchronous") else "--"
      color = "C0" if name.endswith("even") else "C3"
      curve = np.array(run["curve"])
      curve = np.maximum(curve, FLOOR) if problem == "average" else 100 * curve
      axes.plot(
        run["x"],
        curve,
        style,
        color=color,
        label=describe(name, arguments),
      )
    on_mpi = "seconds" in next(iter(runs.values()))
    axes.set(xlabel="seconds" if on_mpi else "steps of each rank")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  panels[0].set(yscale="log", ylabel="largest error of the average")
  panels[1].set(ylabel="test accuracy of the ranks' models in %")
  figure.tight_layout()
  figure.savefig(arguments.output, dpi=120)
  print(f"\nplot: {arguments.output}")


def parse():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--ranks", type=int, default=8, help="virtual ranks, when not on MPI"
  )
  parser.add_argument("--slow-rank", type=int, default=0)
  parser.add_argument(
    "--slow-factor",
    type=float,
    default=4.0,
    help="duration of its steps relative to the others; on virtual ranks, the "
    "delay of its messages in steps",
  )
  parser.add_argument(
    "--steps",
    type=int,
    help="steps of the slow rank, or of each virtual rank (default: 100)",
  )
  parser.add_argument(
    "--pause",
    type=float,
    default=10.0,
    help="milliseconds per step of the other ranks, on MPI",
  )
  parser.add_argument(
    "--quick", action="store_true", help="25 steps, unless --steps is given"
  )
  parser.add_argument("--learning-rate", type=float, default=0.02)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("async_push_sum.png")
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="write all results here"
  )
  arguments = parser.parse_args()
  if arguments.steps is None:
    arguments.steps = 25 if arguments.quick else 100
  if arguments.slow_factor < 1:
    parser.error("--slow-factor is at least 1.")
  return arguments


def main():
  """Solves both problems by all methods."""
  arguments = parse()
  world = jfog.init()
  on_mpi = world.backend == "mpi"
  n = world.size if on_mpi else arguments.ranks
  if not 0 <= arguments.slow_rank < n:
    raise SystemExit(
      f"--slow-rank {arguments.slow_rank} is out of range for {n} ranks."
    )
  graph = topology.exponential(n)
  if world.rank == 0:
    print(
      f"{n} ranks (MPI), a pause of {arguments.pause:g} ms per step"
      if on_mpi
      else f"{n} ranks (virtual)"
    )
  results = {}
  for make in (vectors, handwritten):
    problem = make(n, arguments)
    with jax.enable_x64(problem.x64):
      run = functools.partial(run_on_mpi, world=world)
      if not on_mpi:
        run = functools.partial(run_virtual, n=n)
      results[problem.name] = run(problem, graph, arguments=arguments)
    if world.rank == 0:
      table(problem, results[problem.name], arguments)
  if world.rank == 0:
    plot(results, arguments)
    if arguments.json:
      arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
  main()
