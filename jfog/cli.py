"""The command `jfog`: run, doctor, topology and timeline."""

import argparse
import ast
import json
import os
import sys
from typing import Any

from jfog import _doctor, launch

# Modules that import JAX are imported where they are used, so `jfog --help` is quick.


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line of `jfog` and returns the exit code.

  `run` does not return: its launcher replaces this process by exec, so that
  jax does not stay in memory while the job runs.
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  # Before argparse: everything behind `run` is the launcher's or the program's.
  if arguments[:1] == ["run"]:
    command = launch.command_line(arguments[1:])
    sys.stdout.flush()
    os.execv(command[0], command)
  parser = _parser()
  options = parser.parse_args(arguments)
  if options.action is None:
    parser.print_help()
    return 0
  return options.action(options)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="jfog", description="Decentralized training for JAX."
  )
  parser.set_defaults(action=None)
  parser.add_argument(
    "--version", action="version", version=f"jfog {_doctor.version('jfog')}"
  )
  commands = parser.add_subparsers(metavar="command")
  commands.add_parser("run", help="run a command on N ranks: jfog run --help")
  doctor = commands.add_parser(
    "doctor", help="show what is installed, and test an exchange of two ranks"
  )
  doctor.add_argument("--json", action="store_true", help="print JSON")
  doctor.set_defaults(
    action=lambda options: _doctor.report(as_json=options.json)
  )
  topology = commands.add_parser("topology", help="show properties of a graph")
  topology.add_argument(
    "name", nargs="?", help="a generator of jfog.topology, e.g. ring"
  )
  topology.add_argument("--size", type=int, metavar="N", help="ranks; required")
  topology.add_argument(
    "--list", action="store_true", help="list the generators"
  )
  topology.add_argument(
    "--arg",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="an argument of the generator, as a Python literal: --arg base=3",
  )
  topology.add_argument("--json", action="store_true", help="print JSON")
  topology.add_argument("--plot", metavar="FILE", help="draw it to a file")
  topology.set_defaults(action=_topology)
  timeline = commands.add_parser(
    "timeline", help="merge the parts of a timeline, and profiles into it"
  )
  actions = timeline.add_subparsers(metavar="action", required=True)
  merge = actions.add_parser(
    "merge", help="merge the parts that ranks have written"
  )
  merge.add_argument(
    "path",
    help="the file of jfog.timeline, or the folder of `jfog run --timeline`",
  )
  merge.add_argument(
    "--profile",
    metavar="DIR",
    help="add the profiles of jax.profiler.trace in this folder, of any ranks",
  )
  merge.set_defaults(action=_merge)
  return parser


def _merge(options: argparse.Namespace) -> int:
  """Merges a timeline; 2 if there is none."""
  from jfog import _timeline

  path = options.path
  try:
    if os.path.isdir(path):
      said = _timeline.merge_folder(path)
      found = sorted(
        os.path.join(path, name)
        for name in os.listdir(path)
        if name.startswith("timeline") and name.endswith(".json")
      )
      if not found:
        raise ValueError(f"{path} holds no timeline; name its file.")
    else:
      found = [path]
      parts = _timeline.find_parts(path)
      said = _timeline.merge(path) if parts or not os.path.exists(path) else []
    if options.profile:
      if len(found) > 1:
        raise ValueError(
          f"{path} holds {len(found)} timelines; name the file for --profile."
        )
      said += _timeline.add_profile(found[0], options.profile)
  except (OSError, ValueError) as error:
    print(f"jfog timeline: {error}", file=sys.stderr)
    return 2
  for text in said:
    print(f"jfog timeline: {text}", file=sys.stderr)
  print("\n".join(found))
  return 0


def _topology(options: argparse.Namespace) -> int:
  """Prints the properties of a graph; 2 for an unknown name or bad argument."""
  from jfog import topology

  if options.list:
    for name in _generators(topology):
      doc = getattr(topology, name).__doc__ or ""
      print(f"{name:<25}{doc.partition(chr(10))[0]}")
    return 0
  try:
    if options.name is None or options.size is None:
      raise ValueError(
        "pass a graph and --size N, for example `jfog topology ring --size 8`; "
        "--list has the graphs."
      )
    generator = _generator(topology, options.name)
    graph = generator(options.size, **dict(map(_argument, options.arg)))
    properties = _properties(graph)
  except (ValueError, TypeError) as error:
    print(f"jfog topology: {error}", file=sys.stderr)
    return 2
  if options.json:
    print(json.dumps(properties))
  else:
    for name, value in properties.items():
      print(f"{name:<25}{'-' if value is None else value}")
  if options.plot:
    import matplotlib

    matplotlib.use("Agg")
    graph.plot().figure.savefig(options.plot)
  return 0


def _generators(topology: Any) -> list[str]:
  """The names of the functions whose first argument is `size`."""
  return [
    each
    for each, value in vars(topology).items()
    if each[0] != "_"
    and callable(value)
    and not isinstance(value, type)
    and next(iter(value.__annotations__), "") == "size"
  ]


def _generator(topology: Any, name: str) -> Any:
  """Finds a generator by name."""
  names = _generators(topology)
  if name not in names:
    raise ValueError(f"unknown graph {name}; choose one of {', '.join(names)}.")
  return getattr(topology, name)


def _argument(text: str) -> tuple[str, Any]:
  """Parses `NAME=VALUE`; a value that is not a literal stays text."""
  name, equals, literal = text.partition("=")
  if not equals:
    raise ValueError(f"--arg needs NAME=VALUE, got {text}.")
  try:
    return name, ast.literal_eval(literal)
  except (ValueError, SyntaxError):
    return name, literal  # a plain word, as in --arg kind=left


def _properties(graph: Any) -> dict[str, Any]:
  """Returns the rows of the table; None for a property that a graph lacks.

  `rounds_to_exact_average` of a graph that does not change is 1 if one round
  averages exactly.
  """

  def of(name: str, kind: type) -> Any:
    value = getattr(graph, name, None)
    value = value() if callable(value) else value
    return None if value is None else kind(value)

  return {
    "size": graph.size,
    "degree": of("degree", int),
    "spectral_gap": of("spectral_gap", float),
    "symmetric": of("is_symmetric", bool),
    "row_stochastic": of("is_row_stochastic", bool),
    "doubly_stochastic": of("is_doubly_stochastic", bool),
    "diameter": _diameter(graph),
    "period": len(graph),
    "sends_per_round": _sends(graph),
    "rounds_to_exact_average": of("rounds_to_exact_average", int),
  }


def _rounds(graph: Any) -> list[Any]:
  """The edges (source, destination) of each round, without those to itself."""
  import numpy as np

  # The rounds of an exact average are hops and no matrices.
  matrices = [
    np.asarray(each.mixing_matrix)
    for each in graph.rounds
    if hasattr(each, "mixing_matrix")
  ]
  return [
    [(j, i) for i, j in zip(*np.nonzero(matrix), strict=True) if i != j]
    for matrix in matrices
  ]


def _diameter(graph: Any) -> int | None:
  """The longest shortest path in the edges of all rounds; None if some lack one."""
  import networkx as nx

  rounds = _rounds(graph)
  if not rounds:
    return None
  union = nx.DiGraph([edge for edges in rounds for edge in edges])
  union.add_nodes_from(range(graph.size))
  if not nx.is_strongly_connected(union):
    return None
  return nx.diameter(union)


def _sends(graph: Any) -> int | None:
  """The most messages of one rank in a round, each of the bytes of the model."""
  rounds = _rounds(graph)
  if not rounds:
    return None
  return max(
    sum(int(source) == rank for source, _ in edges)
    for edges in rounds
    for rank in range(graph.size)
  )


if __name__ == "__main__":
  sys.exit(main())
