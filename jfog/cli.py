"""The command `jfog`: run, doctor, topology, bench and timeline."""

import argparse
import os
import sys

from jfog import _doctor, launch
from jfog.bench import command, train

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
  topology.add_argument(
    "--bytes",
    metavar="N[k|M|G]",
    help="bytes of the model: also print what a rank sends in each round",
  )
  topology.add_argument("--json", action="store_true", help="print JSON")
  topology.add_argument(
    "--plot",
    metavar="FILE",
    help="draw it to a file (.png, .svg, .pdf), a panel for each round",
  )
  topology.set_defaults(action=_topology)
  bench = commands.add_parser(
    "bench", help="measure the operations, and the limits of this machine"
  )
  command.add_arguments(bench)
  bench.set_defaults(action=command.main)
  training = bench.add_subparsers(metavar="train").add_parser(
    "train", help="measure a training with synthetic data instead"
  )
  train.add_arguments(training)
  training.set_defaults(action=train.main)
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
  """`jfog topology`, of a module that imports NumPy."""
  from jfog import _graph_report

  return _graph_report.report(options)


if __name__ == "__main__":
  sys.exit(main())
