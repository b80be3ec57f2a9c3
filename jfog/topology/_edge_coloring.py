"""Edge coloring: edges of a graph as permutations, for collectives of a mesh."""

import functools

import numpy as np

from jfog.topology._topology import Topology


@functools.lru_cache(maxsize=1024)
def permutations(topology: Topology) -> tuple[tuple[tuple[int, int], ...], ...]:
  """The edges `(src, dst)` in groups in which no rank sends or receives twice.

  A circulant graph is split by its shifts. Any other is split into as many
  groups as its largest in- or out-degree, which is the least there can be: by
  König's theorem the edges of a bipartite graph have such a coloring, found
  edge by edge by swapping two colors along an alternating path.
  """
  size = topology.size
  edges = [
    (src, dst) for dst in range(size) for src in topology.in_neighbors(dst)
  ]
  shifts: dict[int, list[tuple[int, int]]] = {}
  for src, dst in edges:
    shifts.setdefault((dst - src) % size, []).append((src, dst))
  if len(shifts) <= _degree(topology):
    return tuple(tuple(shifts[shift]) for shift in sorted(shifts))
  return _color(edges, size, _degree(topology))


def _degree(topology: Topology) -> int:
  """The largest number of messages that one rank sends or receives."""
  edges = topology.mixing_matrix != 0
  np.fill_diagonal(edges, False)
  return int(max(edges.sum(axis=0).max(), edges.sum(axis=1).max()))


def _color(
  edges: list[tuple[int, int]], size: int, colors: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
  """Colors bipartite edges so that the edges at each end differ in color."""
  sends = np.full((size, colors), -1)  # the destination by source and color
  receives = np.full((size, colors), -1)  # the source by destination and color
  for src, dst in edges:
    a = int(np.argmax(sends[src] < 0))  # free at the source
    b = int(np.argmax(receives[dst] < 0))  # free at the destination
    if a != b:
      # From dst follow the path whose edges are colored a, b, a, ... in turn
      # and swap its colors; it cannot reach src, where a is free.
      path = []
      at, color, at_destination = dst, a, True
      while True:
        table = receives if at_destination else sends
        other = int(table[at, color])
        if other < 0:
          break
        path.append(
          (other, at, color) if at_destination else (at, other, color)
        )
        at, at_destination = other, not at_destination
        color = b if color == a else a
      for s, d, color in path:
        sends[s, color] = receives[d, color] = -1
      for s, d, color in path:
        swapped = b if color == a else a
        sends[s, swapped], receives[d, swapped] = d, s
    sends[src, a], receives[dst, a] = dst, src
  return tuple(
    tuple((src, int(d)) for src, d in enumerate(sends[:, c]) if d >= 0)
    for c in range(colors)
  )
