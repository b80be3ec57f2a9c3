"""Graphs side by side: their edges, spectral gaps, and the error over rounds.

    python examples/graph_gallery.py         # 16 virtual ranks
    jfog run -np 4 python examples/graph_gallery.py

Each rank averages a random vector with its neighbors in every round. The error is
the root mean square distance to the mean of all ranks, 1 at the start. The color of
an edge is the round of its graph in which it is used. `average_consensus.py` has
the table of all graphs.
"""

import argparse

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
  "star": topology.star,
  "torus": topology.torus_2d,
  "static exponential": topology.exponential,
  "one-peer exponential": topology.one_peer_exponential,
  "base-2": lambda n: topology.base_k(n, 1),
  "random matchings": lambda n: topology.random_matchings(n, seed=0, period=16),
  "fully connected": topology.fully_connected,
}

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=16, help="in one process")
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--output", default="graph_gallery.png")
arguments = parser.parse_args()
SIZE = jfog.num_ranks(arguments.ranks)


def errors(graph, x):
  """One rank's program: the error at the start and after each round."""
  mean = jfog.allreduce(x)

  def step(x, t):
    distance = jfog.allreduce(jnp.sum((x - mean) ** 2))
    return jfog.neighbor_allreduce(x, graph, t), jnp.sqrt(distance)

  _, distances = jax.lax.scan(step, x, jnp.arange(arguments.rounds + 1))
  return distances / distances[0]


x = np.random.RandomState(0).randn(SIZE, 64).astype(np.float32)
figure, panels = plt.subplots(
  2, len(GRAPHS), figsize=(3 * len(GRAPHS), 6), sharey="row"
)
for (name, make), (drawing, curve) in zip(
  GRAPHS.items(), panels.T, strict=True
):
  graph = make(SIZE)
  run = jfog.map_ranks(
    lambda x, graph=graph: errors(graph, x), SIZE, out_axes=None
  )
  # Below float32's rounding the ranks agree.
  error = np.maximum(jax.jit(run)(x), 1e-7)
  graph.plot(drawing)
  rounds = f"{len(graph)} rounds" if len(graph) > 1 else "a round"
  gap = f"gap of {rounds}: {graph.spectral_gap:.3f}"
  drawing.set_title(f"{name}\n{gap}")
  curve.semilogy(error)
  curve.set(xlabel="round", ylim=(5e-8, 2))
  curve.grid(alpha=0.3)
  if jfog.rank() == 0:
    print(f"{name:<21} {gap:<24} last error {error[-1]:.1e}")
panels[1, 0].set(ylabel="distance to the mean")
figure.tight_layout()
if jfog.rank() == 0:
  figure.savefig(arguments.output, dpi=100)
  print(f"plot: {arguments.output}")
