"""`jfog topology`: properties of a graph as a table or JSON, and its picture."""

import argparse
import ast
import inspect
import json
import re
import sys
from typing import Any

import networkx as nx

from jfog import topology
from jfog.topology import ExactAverage

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def report(options: argparse.Namespace) -> int:
  """Prints the properties of a graph; 2 for an unknown name or bad argument."""
  if options.list:
    for name in _generators():
      doc = getattr(topology, name).__doc__ or ""
      print(f"{name:<25}{doc.partition(chr(10))[0]}")
    return 0
  try:
    if options.name is None or options.size is None:
      raise ValueError(
        "pass a graph and --size N, for example `jfog topology ring --size 8`; "
        "--list has the graphs."
      )
    generator = _generator(options.name)
    size = None if options.bytes is None else _bytes(options.bytes)
    graph = _made(generator, options.size, dict(map(_argument, options.arg)))
    properties = _properties(graph, size)
    if options.plot:
      _draw(graph, options.plot)
  except (ValueError, TypeError, ImportError, OSError) as error:
    print(f"jfog topology: {error}", file=sys.stderr)
    return 2
  if options.json:
    print(json.dumps(properties))
  else:
    for name, value in properties.items():
      print(f"{name:<25}{_text(name, value)}")
  return 0


def _draw(graph: Any, path: str) -> None:
  """Writes the picture of a graph."""
  try:
    import matplotlib
  except ImportError:
    raise ImportError(
      '--plot needs matplotlib; install it with pip install "jfog[plot]".'
    ) from None
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure = topology.plot_rounds(graph)
  try:
    figure.savefig(path, dpi=150)
  finally:
    pyplot.close(figure)


def _text(name: str, value: Any) -> str:
  """A value of the table: numbers as `repr` of the graph has them."""
  if value is None:
    return "-"
  if isinstance(value, list):
    return ", ".join(_text(name, each) for each in value)
  if name.startswith("bytes"):
    return _with_suffix(value)
  if isinstance(value, float):
    # Without the noise of the last digits; + 0.0 turns -0.0 into 0.0.
    return f"{round(value, 12) + 0.0:.4g}"
  return str(value)


def _with_suffix(count: int) -> str:
  """A number of bytes in the units of `--bytes`.

  Example:
    >>> _with_suffix(1500), _with_suffix(800000000)
    ('1.5 kB', '800 MB')
  """
  for suffix in ("G", "M", "k"):
    if count >= _SUFFIXES[suffix]:
      return f"{count / _SUFFIXES[suffix]:.4g} {suffix}B"
  return f"{count} B"


def _bytes(text: str) -> int:
  """Parses a number of bytes, such as 400M.

  Example:
    >>> _bytes("1.5k")
    1500
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G|)B?", text)
  if found is None:
    raise ValueError(
      f"--bytes {text} is not a number of bytes; write for example 400M, with k, "
      f"M or G for powers of 1000."
    )
  return round(float(found[1]) * _SUFFIXES[found[2]])


def _generators() -> list[str]:
  """The names of the functions whose first argument is `size`."""
  return [
    each
    for each, value in vars(topology).items()
    if each[0] != "_"
    and callable(value)
    and not isinstance(value, type)
    and next(iter(value.__annotations__), "") == "size"
  ]


def _generator(name: str) -> Any:
  """Finds a generator by name."""
  names = _generators()
  if name not in names:
    raise ValueError(f"unknown graph {name}; choose one of {', '.join(names)}.")
  return getattr(topology, name)


def _made(generator: Any, size: int, arguments: dict[str, Any]) -> Any:
  """The graph of a generator; names arguments that are missing or unknown."""
  parameters = inspect.signature(generator).parameters
  missing = [
    name
    for name, parameter in list(parameters.items())[1:]
    if parameter.default is parameter.empty and name not in arguments
  ]
  if missing:
    raise ValueError(
      f"{generator.__name__} needs "
      + " and ".join(f"--arg {name}=VALUE" for name in missing)
      + "."
    )
  if unknown := [name for name in arguments if name not in parameters]:
    raise ValueError(
      f"{generator.__name__} has no argument {unknown[0]}; it has "
      f"{', '.join(list(parameters)[1:]) or 'none'}."
    )
  return generator(size, **arguments)


def _argument(text: str) -> tuple[str, Any]:
  """Parses `NAME=VALUE`; a value that is not a literal stays text."""
  name, equals, literal = text.partition("=")
  if not equals:
    raise ValueError(f"--arg needs NAME=VALUE, got {text}.")
  try:
    return name, ast.literal_eval(literal)
  except (ValueError, SyntaxError):
    return name, literal  # a plain word, as in --arg kind=left


def _properties(graph: Any, size: int | None) -> dict[str, Any]:
  """Returns the rows of the table; None for a property that a graph lacks.

  `bytes_per_round` is the most that a rank sends in each round, of a model of
  `size` bytes; one number if all rounds are equal in that.
  `rounds_to_exact_average` of a graph that does not change is 1 if one round
  averages exactly.
  """

  def of(name: str, kind: type) -> Any:
    value = getattr(graph, name, None)
    value = value() if callable(value) else value
    return None if value is None else kind(value)

  sends = _sends(graph)
  properties = {
    "size": graph.size,
    "degree": of("degree", int),
    "spectral_gap": of("spectral_gap", float),
    "symmetric": of("is_symmetric", bool),
    "row_stochastic": of("is_row_stochastic", bool),
    "doubly_stochastic": of("is_doubly_stochastic", bool),
    "diameter": _diameter(graph),
    "period": len(graph),
    "sends_per_round": max(sends, default=0),
    "rounds_to_exact_average": of("rounds_to_exact_average", int),
  }
  if size is not None:
    sent = [size * count for count in sends]
    same = len(set(sent)) == 1
    properties["bytes_per_round"] = sent[0] if same else sent
    properties["bytes_per_period"] = sum(sent)
  return properties


def _rounds(graph: Any) -> list[list[tuple[int, int]]]:
  """The edges (source, destination) of each round, without those to itself."""
  if isinstance(graph, ExactAverage):  # its rounds are hops and no matrices
    ranks = range(graph.size)
    return [
      [(rank, (rank + hop.shift) % graph.size) for rank in ranks]
      for hop in graph.rounds
    ]
  return [
    [(src, dst) for src in range(graph.size) for dst in each.out_neighbors(src)]
    for each in graph.rounds
  ]


def _diameter(graph: Any) -> int | None:
  """The longest shortest path in the edges of all rounds; None if some lack one."""
  union = nx.DiGraph([edge for edges in _rounds(graph) for edge in edges])
  union.add_nodes_from(range(graph.size))
  if not nx.is_strongly_connected(union):
    return None
  return nx.diameter(union)


def _sends(graph: Any) -> list[int]:
  """For each round the most messages of a rank, each of the bytes of the model."""
  counts = []
  for edges in _rounds(graph):
    sent = [0] * graph.size
    for src, _ in edges:
      sent[src] += 1
    counts.append(max(sent))
  return counts
