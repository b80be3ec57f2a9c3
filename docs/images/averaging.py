"""Draws docs/images/averaging.png: eight ranks that average on two graphs.

python docs/images/averaging.py
"""

import pathlib

import jax.numpy as jnp
import matplotlib
import networkx
import numpy as np

import jfog

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, STEPS = 8, 3
GRAPHS = {
  "one neighbor\nin each step": jfog.topology.one_peer_exponential(SIZE),
  "ring": jfog.topology.ring(SIZE),
}


def edges(graph, step):
  """The edges of a step, from source to destination."""
  rounds = graph.rounds
  matrix = rounds[step % len(rounds)].mixing_matrix
  return [(j, i) for i, j in np.argwhere(matrix) if i != j]


def draw(axes, x, arrows):
  """The ranks on a circle, colored by their values, with a step's edges."""
  angles = np.pi / 2 - 2 * np.pi * np.arange(SIZE) / SIZE
  places = {
    rank: (np.cos(angle), np.sin(angle)) for rank, angle in enumerate(angles)
  }
  drawn = networkx.DiGraph()
  drawn.add_nodes_from(range(SIZE))
  drawn.add_edges_from(arrows)
  networkx.draw_networkx(
    drawn,
    places,
    ax=axes,
    node_color=np.asarray(x),
    cmap="viridis",
    vmin=0,
    vmax=SIZE - 1,
    node_size=520,
    edge_color="0.6",
    edgecolors="0.2",
    connectionstyle="arc3,rad=0.12",
    labels={rank: f"{x[rank]:.2g}" for rank in range(SIZE)},
    font_size=9,
    font_color="white",
  )
  axes.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
  axes.axis("off")


def main():
  """Draws both graphs, one below the other."""
  figure, rows = plt.subplots(len(GRAPHS), STEPS + 1, figsize=(10, 5.2))
  for name, row in zip(GRAPHS, rows, strict=True):
    graph, is_first = GRAPHS[name], name == next(iter(GRAPHS))
    average = jfog.simulate(
      lambda x, step, graph=graph: jfog.neighbor_allreduce(x, graph, step),
      SIZE,
      in_axes=(0, None),
    )
    x = jnp.arange(float(SIZE))
    for step, axes in enumerate(row):
      draw(axes, x, edges(graph, step) if step < STEPS else [])
      if is_first:
        axes.set_title(f"after step {step}" if step else "values of the ranks")
      if step == 0:
        axes.text(-1.9, 0, name, ha="center", va="center", rotation=90)
      x = average(x, step)
  figure.tight_layout()
  path = pathlib.Path(__file__).with_suffix(".png")
  figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
  main()
