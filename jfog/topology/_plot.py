"""Drawings of graphs: ranks on a circle, edges colored by round."""

import colorsys
import math
from typing import Any

_RADIUS = 100.0
_MOST_EDGES = 4000  # above it an SVG is slow to render and unreadable


def svg(graph: Any) -> str:
  """Returns an SVG drawing of a topology or schedule, made without libraries.

  Example:
    >>> from ._topology import Topology
    >>> svg(Topology([[0.5, 0.5], [0.5, 0.5]])).startswith("<svg")
    True
  """
  # Dots of neighboring ranks on the circle do not touch, and labels fit into them.
  centers = places(graph.size)
  dot = max(1.5, min(9.0, 120.0 / graph.size))
  parts = [
    '<svg xmlns="http://www.w3.org/2000/svg" width="280" height="300" '
    'viewBox="-140 -140 280 300">'
  ]
  if sum(len(edges) for edges in _edges_by_round(graph)) <= _MOST_EDGES:
    for color, edges in zip(
      _colors(graph), _edges_by_round(graph), strict=True
    ):
      parts.extend(_line(centers, edge, dot, color) for edge in edges)
  for rank, (x, y) in enumerate(centers):
    parts.append(
      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{dot:.1f}" fill="#fff" '
      'stroke="#333"/>'
    )
    if dot >= 3:
      parts.append(
        f'<text x="{x:.1f}" y="{y + dot / 3:.1f}" font-size="{dot:.1f}" '
        f'text-anchor="middle" font-family="sans-serif">{rank}</text>'
      )
  parts.append(
    '<text x="0" y="148" font-size="9" text-anchor="middle" '
    f'font-family="sans-serif">{graph!r}</text></svg>'
  )
  return "".join(parts)


def plot(graph: Any, ax: Any = None) -> Any:
  """Draws a topology or schedule on matplotlib axes and returns them.

  Example:
    >>> import matplotlib
    >>> from ._topology import Topology
    >>> matplotlib.use("agg")
    >>> plot(Topology([[0.5, 0.5], [0.5, 0.5]])).get_aspect()
    1.0
  """
  if ax is None:
    ax = pyplot().subplots()[1]
  import networkx as nx

  network = nx.DiGraph()
  network.add_nodes_from(range(graph.size))
  # matplotlib's y points up, SVG's down.
  at = dict(enumerate((x, -y) for x, y in places(graph.size)))
  for color, edges in zip(_colors(graph), _edges_by_round(graph), strict=True):
    # Edges of both directions are one line without a head.
    for arrows in ("-", "-|>"):
      chosen = [
        (src, dst) for src, dst, both in edges if both == (arrows == "-")
      ]
      network.add_edges_from(chosen)
      nx.draw_networkx_edges(
        network,
        at,
        edgelist=chosen,
        edge_color=color,
        arrows=True,
        arrowstyle=arrows,
        ax=ax,
      )
  nx.draw_networkx_nodes(
    network, at, node_color="#fff", edgecolors="#333", ax=ax
  )
  nx.draw_networkx_labels(network, at, font_size=8, ax=ax)
  ax.set_title(repr(graph))
  ax.set_aspect("equal")
  ax.set_axis_off()
  return ax


def pyplot() -> Any:
  """The module `matplotlib.pyplot`."""
  try:
    from matplotlib import pyplot
  except ImportError as error:
    raise ImportError(
      'plot needs matplotlib; install it with pip install "jfog[plot]".'
    ) from error
  return pyplot


def circle(center: tuple[float, float], radius: float) -> Any:
  """The dot of a rank."""
  from matplotlib.patches import Circle

  return Circle(center, radius, facecolor="#fff", edgecolor="#333", zorder=3)


def places(size: int) -> list[tuple[float, float]]:
  """Rank 0 on top, then clockwise, y pointing down as in SVG."""
  if size == 1:
    return [(0.0, 0.0)]
  angles = [2 * math.pi * rank / size for rank in range(size)]
  return [(_RADIUS * math.sin(a), -_RADIUS * math.cos(a)) for a in angles]


def _colors(graph: Any) -> list[str]:
  """One color per round; a single round is dark blue."""
  hues = [0.6 + t / len(graph) for t in range(len(graph))]
  triples = [colorsys.hls_to_rgb(hue % 1.0, 0.4, 0.6) for hue in hues]
  return [
    "#" + "".join(f"{round(255 * part):02x}" for part in triple)
    for triple in triples
  ]


def _edges_by_round(graph: Any) -> list[list[tuple[int, int, bool]]]:
  """Per round `(src, dst, both directions)`, every edge where it is first."""
  drawn: set[tuple[int, int]] = set()
  rounds = []
  for topology in graph.rounds:
    edges = []
    for src in range(graph.size):
      for dst in topology.out_neighbors(src):
        if (src, dst) in drawn:
          continue
        both = src in topology.out_neighbors(dst)
        drawn.update([(src, dst), (dst, src)] if both else [(src, dst)])
        edges.append((src, dst, both))
    rounds.append(edges)
  return rounds


def _line(
  places: list[tuple[float, float]],
  edge: tuple[int, int, bool],
  dot: float,
  color: str,
) -> str:
  """A line between two ranks, with an arrow head if data flows one way."""
  src, dst, both = edge
  (x0, y0), (x1, y1) = places[src], places[dst]
  length = math.hypot(x1 - x0, y1 - y0)
  dx, dy = (x1 - x0) / length, (y1 - y0) / length
  x1, y1 = x1 - dot * dx, y1 - dot * dy  # the head ends at the rim of the dot
  path = f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"
  if not both:
    for side in (-0.4, 0.4):
      x = x1 - 0.7 * dot * (dx + side * dy)
      y = y1 - 0.7 * dot * (dy - side * dx)
      path += f"M{x1:.1f} {y1:.1f}L{x:.1f} {y:.1f}"
  return f'<path d="{path}" stroke="{color}" fill="none"/>'
