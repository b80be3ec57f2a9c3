"""Average consensus on every graph of jfog: the error in each round, and a plot.

Every rank averages a random vector with those of its neighbors in each round,
in 64-bit floats. Run it as `python examples/average_consensus.py` on virtual
ranks, or as `jfog run -np 8 python examples/average_consensus.py` on MPI.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tabulate import tabulate

import jfog
from jfog import topology

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STATIC = {
  "ring": topology.ring,
  "directed ring": lambda n: topology.ring(n, "right"),
  "chain": topology.chain,
  "star": topology.star,
  "grid": topology.mesh_grid_2d,
  "torus": topology.torus_2d,
  "exponential": topology.exponential,
  "symmetric exponential": topology.symmetric_exponential,
  "hypercube": topology.hypercube,
  "Erdos-Renyi": lambda n: topology.erdos_renyi(n, 0.4, seed=0),
  "random regular": lambda n: topology.random_regular(n, 4, seed=0),
  "fully connected": topology.fully_connected,
}
PERIOD = 16  # rounds of the random schedules
TIME_VARYING = {
  "one-peer exponential": topology.one_peer_exponential,
  "hierarchical one-peer": lambda n: topology.hierarchical(
    topology.one_peer_exponential(machines(n, 2)), 2
  ),
  "one-peer ring": lambda n: topology.one_peer(topology.ring(n)),
  "one-peer grid": lambda n: topology.one_peer(topology.mesh_grid_2d(n)),
  "inner-outer ring": lambda n: topology.inner_outer_ring(n, 4),
  "inner-outer exponential": lambda n: topology.inner_outer_exponential(n, 4),
  "hyper-hypercube": topology.hyper_hypercube,
  "simple base-2": lambda n: topology.simple_base(n, 1),
  "base-2": lambda n: topology.base_k(n, 1),
  "base-3": lambda n: topology.base_k(n, 2),
  "CECA": topology.ceca,
  "one-peer EquiDyn": lambda n: topology.one_peer_equidyn(n, 0, PERIOD),
  "matchings of the torus": lambda n: topology.matchings(topology.torus_2d(n)),
  "random matchings": lambda n: topology.random_matchings(n, 0, PERIOD),
  "MATCHA of the torus": lambda n: topology.matcha(
    topology.torus_2d(n), 0.5, 0, PERIOD
  ),
}
DIMENSION = 64
FLOOR = 1e-17  # lower bound in the plot, for errors of zero


def machines(n, local_size):
  """The number of machines with `local_size` ranks each."""
  if n % local_size:
    raise ValueError(f"machines of {local_size} ranks do not divide {n}.")
  return n // local_size


def mixed(x, graph, rounds):
  """A rank's value before the first round and after each round."""

  def body(x, step):
    x = jfog.neighbor_allreduce(x, graph, step)
    return x, x

  _, values = jax.lax.scan(body, x, jnp.arange(rounds))
  return jnp.concatenate([x[None], values])


def protocol_run(x, protocol, rounds):
  """The same for CECA, which sends one of two sums in each round."""
  n, hops = protocol.size, protocol.rounds
  if not hops:  # a single rank
    return jnp.broadcast_to(x, (rounds + 1, *x.shape))
  moves = topology.Schedule([np.roll(np.eye(n), hop.shift, 0) for hop in hops])
  inclusive = jnp.array([hop.send_inclusive for hop in hops])

  def body(carry, step):
    own, others = carry  # sums over the ranks behind, with and without this one
    sent = jnp.where(inclusive[step], own, others)
    received = jfog.neighbor_allreduce(sent, moves, step)
    own, others = own + received, others + received
    return (own, others), own

  start = (x, jnp.zeros_like(x))
  _, sums = jax.lax.scan(body, start, jnp.arange(len(hops)))
  sums = jnp.concatenate([x[None], sums])
  # After a hop the sum covers `shift` more ranks.
  counts = np.cumsum([1, *(hop.shift for hop in hops)])
  values = sums / jnp.array(counts, x.dtype)[:, None]
  last = jnp.broadcast_to(values[-1], (max(0, rounds - len(hops)), *x.shape))
  return jnp.concatenate([values, last])[: rounds + 1]


def consensus(x, graph, rounds):
  """One rank's program: the error after each round, equal on all ranks."""
  run = protocol_run if isinstance(graph, topology.ExactAverage) else mixed
  values = run(x, graph, rounds)
  mean = jfog.allreduce(x)
  squares = jnp.sum((values - mean) ** 2, axis=1)
  return jnp.sqrt(jfog.allreduce(squares))


def run(graph, n, rounds, seed):
  """The errors of a graph, relative to the first one."""
  x = np.random.RandomState(seed).randn(n, DIMENSION)
  program = functools.partial(consensus, graph=graph, rounds=rounds)
  errors = np.asarray(jax.jit(jfog.map_ranks(program, n, out_axes=None))(x))
  return errors / errors[0] if errors[0] > 0 else errors


def graphs_of(n, names, verbose):
  """The named graphs that exist for `n` ranks."""
  graphs = {}
  for name in names:
    try:
      graphs[name] = (STATIC | TIME_VARYING)[name](n)
    except ValueError as reason:
      if verbose:
        print(f"left out: {name}: {reason}")
  return graphs


def table(curves, n):
  """Prints one line for each graph."""
  rounds = len(next(iter(curves.values()))[1]) - 1
  print(
    f"{n} ranks, {rounds} rounds; the error is the root mean square distance"
  )
  print("to the average, 1 at the start")
  rows = []
  for name, (graph, errors) in curves.items():
    protocol = isinstance(graph, topology.ExactAverage)
    exact = graph.rounds_to_exact_average()
    sends = jfog.diagnostics.bytes_per_step(graph, np.zeros(1, np.int8))
    averages = protocol or graph.is_doubly_stochastic
    rows.append(
      (
        name if averages else f"{name} *",
        min(1, n - 1) if protocol else graph.degree,
        sends,
        len(graph),
        None if protocol else graph.spectral_gap,
        None if exact is None else f"{exact} rounds",
        errors[-1],
      )
    )
  heads = ("graph", "degree", "sends/\nround", "period", "gap of a\nperiod")
  print(
    tabulate(
      rows,
      headers=(*heads, "exact\nafter", "last\nerror"),
      floatfmt=("", "", ".2f", "", ".3f", "", ".1e"),
      colalign=("left", *6 * ["right"]),
      missingval="-",
    )
  )
  if not all(
    getattr(g, "is_doubly_stochastic", True) for g, _ in curves.values()
  ):
    print("* not doubly stochastic: the ranks agree on a weighted average")


def plot(curves, n, path):
  """Draws the errors: static graphs on the left, time-varying on the right."""
  figure, panels = plt.subplots(1, 2, figsize=(14, 6.5), sharey=True)
  styles = [(f"C{c}", line) for line in ("-", "--", ":") for c in range(6)]
  for axes, group in zip(panels, (STATIC, TIME_VARYING), strict=True):
    names = [name for name in group if name in curves]
    for name, (color, style) in zip(names, styles, strict=False):
      graph, errors = curves[name]
      exact = graph.rounds_to_exact_average()
      label = name if exact is None else f"{name}, exact after {exact}"
      # After an exact average, the error is rounding only.
      shown = np.maximum(errors, FLOOR)[: None if exact is None else exact + 1]
      axes.semilogy(shown, style, color=color, label=label)
      if exact is not None and exact < len(errors):
        axes.plot(exact, shown[exact], "o", color=color, markersize=7)
    axes.set(xlabel="round")
    axes.grid(alpha=0.3)
    axes.legend(
      fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2
    )
  panels[0].set(ylabel="distance to the average", title="static graphs")
  panels[1].set(title="time-varying graphs")
  figure.suptitle(f"Average consensus of {n} ranks (dots: exact averages)")
  figure.savefig(path, dpi=120, bbox_inches="tight")
  print(f"plot: {path}")


def main():
  """Runs all graphs that exist for this number of ranks."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--ranks", type=int, help="virtual ranks (default: 16)")
  parser.add_argument("--rounds", type=int, default=40)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("average_consensus.png")
  )
  names = tuple(STATIC | TIME_VARYING)
  parser.add_argument(
    "--graphs",
    nargs="+",
    choices=names,
    default=names,
    metavar="GRAPH",
    help="some of: " + ", ".join(names),
  )
  arguments = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  n = jfog.num_ranks(arguments.ranks or 16)
  if arguments.ranks not in (None, n):
    raise SystemExit(
      f"--ranks {arguments.ranks} in a job of {n}; leave it out."
    )
  verbose = jfog.rank() == 0
  curves = {
    name: (graph, run(graph, n, arguments.rounds, arguments.seed))
    for name, graph in graphs_of(n, arguments.graphs, verbose).items()
  }
  if jfog.rank() == 0:
    table(curves, n)
    plot(curves, n, arguments.output)


if __name__ == "__main__":
  main()
