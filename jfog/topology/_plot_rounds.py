"""A picture of a graph: a panel for each round, weights on edges, a legend."""

import collections
import math
from typing import Any, NamedTuple

from jfog.topology import _plot
from jfog.topology._exact_average import ExactAverage
from jfog.topology._schedule import Schedule
from jfog.topology._topology import Topology

_MOST_PANELS = 16
_MOST_LABELS = 24  # of a panel; more are unreadable
_MOST_COLORS = 6  # of weights in the legend
_INCHES = 3.4  # of a panel


class _Edge(NamedTuple):
  """An edge of a panel; `both` if the way back has the same weight."""

  src: int
  dst: int
  weight: float
  both: bool


def plot_rounds(
  graph: Topology | Schedule | ExactAverage, *, labels: bool | None = None
) -> Any:
  """Draws every round of a graph in a panel of its own, with weights.

  Ranks stand on a circle, rank 0 on top. An arrow points from the sender to the
  receiver and has the color of the weight `W[dst, src]` with which the receiver
  takes the value; a line without a head stands for both directions with one
  weight. The legend has the weights, and the weight or weights that ranks give
  to themselves. Of a longer schedule the first 16 rounds are drawn.

  Args:
    graph: a `Topology`, with one panel, a `Schedule`, or an `ExactAverage`, whose
      hops have no weights.
    labels: whether edges carry their weights as numbers; by default in panels of
      up to 24 edges.

  Returns:
    The figure of matplotlib.

  Raises:
    TypeError: if `graph` is not a graph.
    ImportError: if matplotlib is missing; `pip install "jfog[plot]"`.

  Example:
    >>> import matplotlib, jfog
    >>> matplotlib.use("agg")
    >>> graph = jfog.topology.one_peer_exponential(8)
    >>> figure = jfog.topology.plot_rounds(graph)
    >>> [ax.get_title() for ax in figure.axes if ax.get_title()]
    ['round 0', 'round 1', 'round 2']
  """
  if not isinstance(graph, (Topology, Schedule, ExactAverage)):
    raise TypeError(
      f"plot_rounds: expects a Topology, Schedule or ExactAverage, got {graph!r}; "
      f"make one by jfog.topology."
    )
  pyplot = _plot.pyplot()
  panels = [_edges(graph, t) for t in range(min(len(graph), _MOST_PANELS))]
  count = max(1, len(panels))
  columns = count if count <= 3 else math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  figure, axes = pyplot.subplots(
    rows,
    columns,
    squeeze=False,
    figsize=(max(columns, 1.6) * _INCHES, rows * _INCHES + 0.9),
    layout="constrained",
  )
  weights = sorted({_rounded(edge.weight) for p in panels for edge in p})
  colors = _colors(weights)
  for ax in axes.flat:
    ax.set_axis_off()
  for t, (ax, edges) in enumerate(zip(axes.flat, panels, strict=False)):
    _panel(ax, graph.size, edges, colors, labels)
    if len(graph) > 1:
      ax.set_title(f"round {t}", fontsize=10)
  more = len(graph) - len(panels)
  title = repr(graph) + (f", {more} more rounds" if more else "")
  figure.suptitle(title, fontsize=10)
  handles = _legend(panels, colors) + _own_weights(graph)
  if handles:
    figure.legend(
      handles=handles,
      loc="outside lower center",
      ncols=min(3, len(handles)),
      fontsize=8,
      frameon=False,
    )
  return figure


def _edges(graph: Any, t: int) -> list[_Edge]:
  """The edges of a round; of two with one weight the first, for both."""
  if isinstance(graph, ExactAverage):
    shift, size = graph.rounds[t].shift, graph.size
    pairs = {(rank, (rank + shift) % size): math.nan for rank in range(size)}
  else:
    topology = graph.rounds[t]
    pairs = {
      (src, dst): weight
      for dst in range(graph.size)
      for src, weight in topology.src_weights(dst).items()
    }
  edges = []
  for (src, dst), weight in pairs.items():
    back = pairs.get((dst, src))
    both = back is not None and _rounded(back) == _rounded(weight)
    if not both or src < dst:
      edges.append(_Edge(src, dst, weight, both))
  return edges


def _rounded(weight: float) -> float:
  """A weight as the picture tells it apart; hops have none, which is 0."""
  return 0.0 if math.isnan(weight) else float(f"{weight:.3g}")


def _colors(weights: list[float]) -> dict[float, Any]:
  """A color for each weight: of a short list, or else of a scale."""
  from matplotlib import colormaps

  if len(weights) <= _MOST_COLORS:
    dark = colormaps["Dark2"].colors  # pyright: ignore[reportAttributeAccessIssue]
    return {weight: dark[i] for i, weight in enumerate(weights)}
  scale = colormaps["viridis_r"]
  low, high = weights[0], weights[-1]
  return {w: scale(0.15 + 0.85 * (w - low) / (high - low)) for w in weights}


def _panel(
  ax: Any,
  size: int,
  edges: list[_Edge],
  colors: dict[float, Any],
  labels: bool | None,
) -> None:
  """Draws the ranks and the edges of one round."""
  from matplotlib.patches import FancyArrowPatch

  places = [(x, -y) for x, y in _plot.places(size)]
  radius = max(2.0, min(11.0, 140.0 / size))
  present = collections.Counter((edge.src, edge.dst) for edge in edges)
  for edge in edges:
    color = colors[_rounded(edge.weight)]
    # Two edges between the same ranks with other weights are two arcs.
    curved = (edge.dst, edge.src) in present
    (x0, y0), (x1, y1) = places[edge.src], places[edge.dst]
    length = math.hypot(x1 - x0, y1 - y0)
    dx, dy = (x1 - x0) / length, (y1 - y0) / length
    ax.add_patch(
      FancyArrowPatch(
        (x0 + radius * dx, y0 + radius * dy),
        (x1 - radius * dx, y1 - radius * dy),
        arrowstyle="-" if edge.both else "-|>",
        connectionstyle="arc3,rad=0.15" if curved else "arc3",
        mutation_scale=max(5.0, radius),
        shrinkA=0,
        shrinkB=0,
        color=color,
        linewidth=1.0,
      )
    )
    show = len(edges) <= _MOST_LABELS if labels is None else labels
    if show and not math.isnan(edge.weight):
      # Nearer to the receiver, away from the crossings in the middle. An arc
      # with rad=0.15 bends by 0.15 of its length at its control point.
      at, bend = 0.66, 2 * 0.66 * 0.34 * 0.15 * length * curved
      ax.text(
        x0 + at * (x1 - x0) + bend * dy,
        y0 + at * (y1 - y0) - bend * dx,
        _number(edge.weight),
        color=color,
        fontsize=6.5,
        ha="center",
        va="center",
        bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"},
      )
  for rank, (x, y) in enumerate(places):
    circle = _plot.circle((x, y), radius)
    ax.add_patch(circle)
    if radius > 4:
      text_size = 8 if radius > 6 else 6
      ax.text(x, y, str(rank), fontsize=text_size, ha="center", va="center")
  ax.set_xlim(-120, 120)
  ax.set_ylim(-120, 120)
  ax.set_aspect("equal")


def _number(weight: float) -> str:
  """A weight in a few characters: as a fraction, if it is a simple one."""
  for denominator in range(1, 33):
    numerator = weight * denominator
    if abs(numerator - round(numerator)) < 1e-9:
      if denominator == 1:
        return str(round(numerator))
      return f"{round(numerator)}/{denominator}"
  return f"{weight:.3g}"


def _legend(panels: list[list[_Edge]], colors: dict[float, Any]) -> list[Any]:
  """The entries of the legend for weights and for the two kinds of edges."""
  from matplotlib.lines import Line2D

  exact = {_rounded(e.weight): e.weight for p in panels for e in p}
  listed = list(colors)
  if len(listed) > _MOST_COLORS:  # a scale: its ends and its middle
    listed = [listed[0], listed[len(listed) // 2], listed[-1]]
  handles = [
    Line2D([], [], color=colors[w], label=f"weight {_number(exact[w])}")
    for w in listed
    if not math.isnan(exact[w])
  ]
  kinds = {edge.both for edges in panels for edge in edges}
  if False in kinds:
    handles.append(
      Line2D(
        *([0.0], [0.0]),
        color="#555",
        marker=">",
        label="from sender to receiver",
      )
    )
  if True in kinds:
    handles.append(Line2D([], [], color="#555", label="both directions"))
  return handles


def _own_weights(graph: Any) -> list[Any]:
  """The entry for the weights of ranks to themselves."""
  from matplotlib.lines import Line2D

  if isinstance(graph, ExactAverage):
    return []
  own = sorted(
    _rounded(topology.self_weight(rank))
    for topology in graph.rounds
    for rank in range(graph.size)
  )
  exact = {
    _rounded(w): w
    for topology in graph.rounds
    for w in map(topology.self_weight, range(graph.size))
  }
  text = _number(exact[own[0]])
  if own[-1] != own[0]:
    text += f" to {_number(exact[own[-1]])}"
  marker: Any = {"marker": "o", "markerfacecolor": "white", "linestyle": ""}
  return [Line2D([], [], color="#333", label=f"own weight {text}", **marker)]
