"""Average consensus on every graph of jfog: the error in each round, and a plot.

Every rank holds a random vector and mixes it with its neighbors', again and
again. Run it as `python examples/average_consensus.py` on virtual ranks, or as
`jfog run -np 8 python examples/average_consensus.py` on MPI.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jfog
from jfog import topology

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRAPHS = {
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
  "one-peer exponential": topology.one_peer_exponential,
  "one-peer ring": lambda n: topology.one_peer(topology.ring(n)),
  "inner-outer ring": lambda n: topology.inner_outer_ring(n, 4),
  "inner-outer exponential": lambda n: topology.inner_outer_exponential(n, 4),
  "hyper-hypercube": topology.hyper_hypercube,
  "base-2": lambda n: topology.base_k(n, 1),
  "base-3": lambda n: topology.base_k(n, 2),
  "one-peer EquiDyn": lambda n: topology.one_peer_equidyn(n, 0, 50),
  "matchings of the torus": lambda n: topology.matchings(topology.torus_2d(n)),
  "random matchings": lambda n: topology.random_matchings(n, 0, 50),
  "MATCHA of the torus": lambda n: topology.matcha(
    topology.torus_2d(n), 0.5, 0, 50
  ),
}


def consensus(x, graph, rounds):
  """One rank's program: the error after each round, equal on all ranks."""
  mean = jfog.allreduce(x)

  def error(x):
    return jnp.sqrt(jfog.allreduce(jnp.sum((x - mean) ** 2)))

  def body(x, step):
    x = jfog.neighbor_allreduce(x, graph, step)
    return x, error(x)

  start = error(x)
  _, errors = jax.lax.scan(body, x, jnp.arange(rounds))
  return jnp.concatenate([start[None], errors]) / start


def run(graph, n, rounds, seed, world):
  """Runs a graph's rounds where this process runs: on MPI, or simulated."""
  x = np.random.RandomState(seed).randn(n, 64).astype(np.float32)
  program = functools.partial(consensus, graph=graph, rounds=rounds)
  if world.size > 1:
    return np.asarray(jax.jit(program)(x[world.rank]))
  simulated = jfog.simulate(program, n, out_axes=None)
  return np.asarray(jax.jit(simulated)(x))


def report(curves, n, path):
  """Prints the table and draws the plot."""
  print(f"{n} ranks; the error is the distance to the average, 1 at the start")
  head = ("graph", "sends", "gap*", "period", "exact after", "last error")
  line = "{:<24} {:>6} {:>8} {:>7} {:>12} {:>11}".format
  print(line(*head))
  figure, axes = plt.subplots(figsize=(10, 6))
  styles = [
    (color, line) for line in ["-", "--", "-.", ":"] for color in range(6)
  ]
  for (name, (graph, errors)), (color, style) in zip(
    curves.items(), styles, strict=False
  ):
    sends = jfog.diagnostics.bytes_per_step(graph, np.zeros(1, np.int8))
    exact = graph.rounds_to_exact_average()
    print(
      line(
        name,
        f"{sends:.2f}",
        f"{graph.spectral_gap:.3f}",
        len(graph),
        "-" if exact is None else f"{exact} rounds",
        f"{errors[-1]:.1e}",
      )
    )
    label = name if exact is None else f"{name} (exact after {exact})"
    floor = np.maximum(errors, 1e-8)
    axes.semilogy(floor, style, color=f"C{color}", label=label)
    if exact is not None and exact < len(errors):
      axes.plot(exact, floor[exact], "o", color=f"C{color}")
  print("* spectral gap of one period")
  axes.set(
    xlabel="round",
    ylabel="error (floor 1e-8)",
    title=f"Average consensus of {n} ranks",
  )
  axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  print(f"plot: {path}")


def main():
  """Runs all graphs that there are for this number of ranks."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--ranks", type=int, default=16, help="virtual ranks, when not on MPI"
  )
  parser.add_argument("--rounds", type=int, default=40)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("average_consensus.png")
  )
  arguments = parser.parse_args()
  world = jfog.init()
  n = world.size if world.size > 1 else arguments.ranks
  curves = {}
  for name, make in GRAPHS.items():
    try:
      graph = make(n)
    except ValueError as reason:
      if world.rank == 0:
        print(f"left out: {name}: {reason}")
      continue
    rounds = max(arguments.rounds, len(graph))
    errors = run(graph, n, rounds, arguments.seed, world)
    curves[name] = (graph, errors[: arguments.rounds + 1])
  if world.rank == 0:
    report(curves, n, arguments.output)


if __name__ == "__main__":
  main()
