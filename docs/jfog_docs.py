"""Sphinx extension of the documentation: docstrings, links, drawings, generated pages."""

import pathlib
import posixpath
import re

import jfog_drawings
import matplotlib

import jfog

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = "https://github.com/jfog/jfog/blob/main"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source):")

# The graphs of the gallery, by the call that makes them.
GRAPHS = {
  "Graphs that stay the same": [
    *("ring(12)", "ring(12, 'right')", "chain(12)", "star(12)"),
    *("mesh_grid_2d(12)", "torus_2d(12)", "hypercube(16)"),
    *("exponential(12)", "symmetric_exponential(12)", "fully_connected(12)"),
    *("random_regular(12, degree=3, seed=0)", "erdos_renyi(12, p=0.3, seed=0)"),
  ],
  "Schedules, one round in each step": [
    *("one_peer_exponential(12)", "one_peer_equidyn(12, seed=0, period=16)"),
    *(
      "random_matchings(12, seed=0, period=16)",
      "matcha(ring(12), 0.5, seed=0, period=16)",
    ),
    "inner_outer_ring(12, local_size=3)",
    "inner_outer_exponential(12, local_size=3)",
  ],
  "Schedules that reach the exact average": [
    *("hyper_hypercube(12)", "simple_base(12, k=1)", "base_k(12, k=1)"),
    "base_k(12, k=2)",
  ],
}


def setup(app):
  """Connects the hooks of Sphinx."""
  app.connect("builder-inited", _write_graphs)
  app.connect("builder-inited", _copy_notebooks)
  app.connect("builder-inited", lambda app: jfog_drawings.write())
  app.connect("autodoc-process-docstring", _make_formulas_literal, priority=1)
  app.connect("source-read", _link_to_sources)
  return {"parallel_read_safe": True}


def _make_formulas_literal(app, what, name, obj, options, lines):
  """Makes the indented formulas before a docstring's sections literal blocks."""
  result, inside = [], False
  for number, line in enumerate(lines):
    if _SECTION.match(line):
      result += lines[number:]
      break
    is_indented = line.startswith("    ")
    if is_indented and not inside and result and not result[-1].strip():
      result += ["::", ""]
    if line.strip():
      inside = is_indented
    result.append(line)
  lines[:] = result


def _link_to_sources(app, docname, content):
  """Turns links to files outside of docs/ into links to the repository.

  Pictures stay: Sphinx copies those of benchmarks/results.
  """
  folder = posixpath.dirname(f"docs/{docname}")

  def link(match):
    text, target = match.groups()
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    if path.startswith("docs/") or not (ROOT / path).exists():
      return match.group(0)
    return f"[{text}]({SOURCES}/{path}{'#' + anchor if anchor else ''})"

  content[0] = re.sub(
    r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", link, content[0]
  )


def _copy_notebooks(app):
  """Copies the notebooks of examples/ into docs/_generated, with their outputs."""
  folder = pathlib.Path(app.srcdir) / "_generated"
  folder.mkdir(exist_ok=True)
  for path in (ROOT / "examples").glob("*.ipynb"):
    text = path.read_text().replace("](../docs/", "](../")
    (folder / path.name).write_text(text)


def _write_graphs(app):
  """Writes the page of graphs and its pictures into docs/_generated."""
  folder = pathlib.Path(app.srcdir) / "_generated"
  folder.mkdir(exist_ok=True)
  page = [
    "# Graphs",
    "",
    "Which rank averages with which, and how fast that spreads. *Gap* is `1 - |λ2|`: the "
    "larger, the fewer steps to agreement; of a schedule over one period. *Messages* are "
    "those that a rank sends in a step, at most; each holds all parameters. *Exact after* "
    "is the number "
    "of steps to the exact mean. Numbers for 12 ranks, made when this page was built.",
    "",
  ]
  for title, calls in GRAPHS.items():
    page += [
      f"## {title}",
      "",
      "| | graph | gap | messages | period | exact after |",
      "|---|---|---|---|---|---|",
    ]
    for call in calls:
      graph = eval(call, dict(vars(jfog.topology)))
      picture = f"graph-{len(page)}.png"
      figure = graph.plot().figure
      figure.axes[0].set_title("")
      figure.set_size_inches(2.6, 2.6)
      figure.savefig(folder / picture, dpi=80, bbox_inches="tight")
      plt.close(figure)
      page.append(f"| ![{call}]({picture}) | `{call}` | {_numbers(graph)} |")
    page.append("")
  page += [
    "`jfog.topology.ceca(size)` reaches the exact mean in `log2(size)` rounds, rounded up, "
    "for any size. Each rank keeps two sums and sends one of them in a round; it is a "
    "protocol for `jfog.finite_time_average` and not a mixing matrix.",
    "",
  ]
  (folder / "graphs.md").write_text("\n".join(page))


def _numbers(graph):
  """The cells of a graph's row."""
  rounds = getattr(graph, "rounds", (graph,))
  messages = max(
    len(topology.out_neighbors(rank))
    for topology in rounds
    for rank in range(graph.size)
  )
  gap = getattr(graph, "spectral_gap", None)
  gap = gap() if callable(gap) else gap
  exact = graph.rounds_to_exact_average()
  cells = [
    "" if gap is None else f"{float(gap):.3f}",
    messages,
    len(graph),
    exact or "",
  ]
  return " | ".join(map(str, cells))
