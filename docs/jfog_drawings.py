"""Drawings of the documentation: operations with their values, and the choice of an optimizer.

    python docs/jfog_drawings.py   # writes docs/images/operations/*.svg, docs/images/choice.svg

The build of the documentation writes them, too; tests/test_docs.py compares. The values
are those that `jfog.simulate` returns.
"""

import html
import pathlib

import jax.numpy as jnp
import numpy as np

import jfog

FOLDER = pathlib.Path(__file__).parent / "images"
X = (0.0, 3.0, 6.0, 9.0)  # the values of the ranks before the operation
CORNERS = ((70, 50), (200, 50), (200, 130), (70, 130))  # of ranks 0 to 3
ALL = [(i, j) for i in range(4) for j in range(4) if i < j]
RING = jfog.topology.ring(4)
BASE = jfog.topology.one_peer_exponential(4)
_STYLE = 'font-family="sans-serif" text-anchor="middle"'


def operations():
  """For each drawing: lines both ways, arrows, the program of a rank, machines."""
  return {
    "neighbor_allreduce": (
      [(0, 1), (1, 2), (2, 3), (3, 0)],
      [],
      lambda x: jfog.neighbor_allreduce(x, RING),
      1,
    ),
    "neighbor_allreduce_one_peer": (
      [],
      [(0, 1), (1, 2), (2, 3), (3, 0)],
      lambda x: jfog.neighbor_allreduce(x, BASE, 0),
      1,
    ),
    "neighbor_allgather": (
      [(0, 1), (1, 2), (2, 3), (3, 0)],
      [],
      lambda x: jfog.neighbor_allgather(x, RING),
      1,
    ),
    "hierarchical_neighbor_allreduce": (
      [(0, 1), (2, 3), (1, 2), (0, 3)],
      [],
      lambda x: jfog.hierarchical_neighbor_allreduce(
        x, jfog.topology.fully_connected(2)
      ),
      2,
    ),
    "pair_gossip": (
      [(0, 1), (2, 3)],
      [],
      lambda x: jfog.pair_gossip(x, [1, 0, 3, 2]),
      1,
    ),
    "allreduce": (ALL, [], jfog.allreduce, 1),
    "broadcast": ([], [(0, 1), (0, 2), (0, 3)], jfog.broadcast, 1),
    "allgather": (ALL, [], jfog.allgather, 1),
    "finite_time_average": (
      [],
      [(0, 1), (1, 2), (2, 3), (3, 0)],
      lambda x: jfog.neighbor_allreduce(x, BASE, 0),
      1,
    ),
  }


def operation(name):
  """The drawing of one operation: the ranks before and after it."""
  both, single, program, local_size = operations()[name]
  y = jfog.simulate(program, 4, local_size=local_size)(jnp.array(X))
  panels = [_panel(X, both, single, local_size), _panel(y, [], [], local_size)]
  if name == "finite_time_average":  # its second round reaches the mean
    second = jfog.simulate(lambda x: jfog.neighbor_allreduce(x, BASE, 1), 4)
    panels[1] = _panel(y, [(0, 2), (1, 3)], [], 1)
    panels.append(_panel(second(y), [], [], 1))
  shifted = [
    f'<g transform="translate({270 * number} 0)">{panel}</g>'
    for number, panel in enumerate(panels)
  ]
  shifted += [
    _text(270 * number, 96, "⇒", 22, "#567") for number in range(1, len(panels))
  ]
  return _svg(270 * len(panels), 180, shifted)


def _panel(values, both, single, local_size):
  """Four ranks at the corners of a rectangle, machines behind, arrows between."""
  parts = []
  if local_size == 2:
    for top, machine in ((16, 0), (108, 1)):
      parts.append(_box(14, top, 242, 56, "#eef2f7", "#9ab"))
      label = top + (13 if machine == 0 else 49)
      parts.append(_text(135, label, f"machine {machine}", 10, "#567"))
  for src, dst in both:
    parts.append(_arrow(CORNERS[src], CORNERS[dst], True))
  for src, dst in single:
    parts.append(_arrow(CORNERS[src], CORNERS[dst], False))
  for rank, ((x, y), value) in enumerate(zip(CORNERS, values, strict=True)):
    shown = np.ravel(value)
    color = _color(shown[0]) if len(shown) == 1 else "#fff"
    parts.append(_box(x - 38, y - 15, 76, 30, color, "#333"))
    label = " ".join(f"{v:.3g}" for v in shown)
    parts.append(_text(x, y + 5, label, 14))
    below = rank in (2, 3)
    parts.append(
      _text(x, y + 27 if below else y - 19, f"rank {rank}", 9, "#567")
    )
  return "".join(parts)


# Window operations: their titles, who acts, the acting arrow, and the slot at rank 1.
WINDOWS = [
  ("rank 0: win_put(win, 4)", "put", "slot of 0: 1 → 4"),
  ("rank 0: win_accumulate(win, 4)", "put", "slot of 0: 1 → 5"),
  ("rank 1: win_get(win)", "get", "slot of 0: 1 → 4"),
  ("rank 1: win_update(win, 2)", "update", "slot of 0: 4"),
]


def windows():
  """The effect of each window operation on the edge from rank 0 to rank 1."""
  parts = []
  for number, (title, kind, slot) in enumerate(WINDOWS):
    x = 110 + 220 * number
    own = "x: 2 → 3, exposed" if kind == "update" else "x = 2"
    parts += [_text(x, 22, title, 12)]
    parts += [_box(x - 75, 48, 150, 28, "#fff", "#333")]
    parts += [_text(x, 67, "exposed: 4", 13), _text(x, 44, "rank 0", 9, "#567")]
    colors = ["#fff4cc", "#fff"] if kind != "update" else ["#fff", "#fff4cc"]
    parts += [_box(x - 75, 116, 150, 28, colors[0], "#333")]
    parts += [_text(x, 135, slot, 13), _text(x - 52, 111, "rank 1", 9, "#567")]
    parts += [_box(x - 75, 168, 150, 28, colors[1], "#333")]
    parts += [_text(x, 187, own, 13)]
    y0, y1 = (145, 167) if kind == "update" else (77, 115)
    parts += [_line(x, y0, x, y1)]
  return _svg(220 * len(WINDOWS), 210, parts)


# The choice of an optimizer: questions from top to bottom, answers at the right.
CHOICE = [
  ("Is the model new?", "gradient_allreduce", "the baseline, no graph"),
  (
    "Are some ranks slow?",
    "window_push_sum, window_put",
    "no rank waits for another",
  ),
  (
    "Is a step much shorter than a message?",
    "diloco, slow_momentum, every=",
    "communicates in some steps only",
  ),
  (
    "Is the bandwidth limited?",
    "choco, power_gossip",
    "compressed messages",
  ),
  (
    "Are the data shuffled between ranks?",
    "adapt_then_combine",
    "one_peer_exponential(n)",
  ),
  (
    "Is momentum needed?",
    "quasi_global_momentum, decentlam",
    "the bias of no momentum",
  ),
  (
    "Is the graph undirected and static?",
    "exact_diffusion, extra",
    "exact, for the bytes of averaging",
  ),
  (
    "Are its weights doubly stochastic?",
    "gradient_tracking",
    "exact on directed and changing graphs",
  ),
  ("None of these", "push_diging, push_pull", "exact on any directed graph"),
]


def choice():
  """The decision diagram of docs/optimizers.md."""
  parts = []
  for number, (question, answer, note) in enumerate(CHOICE):
    y, is_last = 12 + 58 * number, number == len(CHOICE) - 1
    parts.append(_box(12, y, 300, 38, "#eef2f7", "#9ab"))
    parts.append(_text(162, y + 24, question, 13))
    parts.append(_box(388, y, 300, 38, "#e8f5e9", "#7a9"))
    parts.append(_text(538, y + 17, answer, 13))
    parts.append(_text(538, y + 31, note, 10, "#567"))
    parts.append(_line(312, y + 19, 386, y + 19))
    if not is_last:
      parts.append(_text(347, y + 14, "yes", 10, "#567"))
      parts.append(_line(162, y + 38, 162, y + 56))
      parts.append(_text(178, y + 52, "no", 10, "#567"))
  return _svg(700, 58 * len(CHOICE) + 4, parts)


def drawings():
  """The text of each drawing by its path below docs/images."""
  found = {f"operations/{name}.svg": operation(name) for name in operations()}
  return {**found, "operations/windows.svg": windows(), "choice.svg": choice()}


def write():
  """Writes the drawings that have changed."""
  for name, text in drawings().items():
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
      path.write_text(text)


def _svg(width, height, parts):
  head = '<path d="M0 0L8 4L0 8z" fill="#567"/>'
  marker = (
    '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="8" refY="4" '
    f'markerUnits="userSpaceOnUse" orient="auto-start-reverse">{head}</marker></defs>'
  )
  ground = f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>'
  return "\n".join(
    [
      f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
      f'height="{height}" viewBox="0 0 {width} {height}">',
      *(marker, ground, *parts),
      "</svg>\n",
    ]
  )


def _box(x, y, width, height, fill, stroke):
  return (
    f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
    f'fill="{fill}" stroke="{stroke}"/>'
  )


def _text(x, y, text, size, fill="#111"):
  text = html.escape(text)
  return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {_STYLE}>{text}</text>'


def _line(x0, y0, x1, y1, start=""):
  return (
    f'<path d="M{x0:.0f} {y0:.0f}L{x1:.0f} {y1:.0f}" stroke="#567" '
    f'stroke-width="1.4"{start} marker-end="url(#head)"/>'
  )


def _arrow(source, target, both):
  """A line between the rims of two ranks' boxes, with one head or two."""
  (x0, y0), (x1, y1) = source, target
  dx, dy = x1 - x0, y1 - y0
  # The part of the line inside of a box of 76 x 30, and a gap.
  inside = min(42 / abs(dx) if dx else 1, 19 / abs(dy) if dy else 1)
  start = ' marker-start="url(#head)"' if both else ""
  dx, dy = dx * inside, dy * inside
  return _line(x0 + dx, y0 + dy, x1 - dx, y1 - dy, start)


def _color(value):
  """From light yellow (0) to blue (9), light enough for black text."""
  part = min(max(round(float(value), 3) / 9, 0), 1)
  ends = ((255, 244, 204), (140, 178, 235))
  mixed = [round(a + part * (b - a)) for a, b in zip(*ends, strict=True)]
  return "#" + "".join(f"{channel:02x}" for channel in mixed)


if __name__ == "__main__":
  write()
