"""The command `jfog`: run, doctor and topology."""

import argparse
import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from jfog import launch

# Modules that import JAX are imported where they are used, so `jfog --help` is quick.

_EXCHANGE = """
import jax.numpy as jnp, jfog
jfog.init(timeout=30.0)
total = float(jfog.allreduce(jnp.float32(jfog.rank() + 1), op="sum"))
assert jfog.size() == 2, f"launched as 2 ranks, a world of {jfog.size()}"
assert total == 3.0, f"the sum of 1 and 2 came out as {total}"
"""


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
    "--version", action="version", version=f"jfog {_version('jfog')}"
  )
  commands = parser.add_subparsers(metavar="command")
  commands.add_parser("run", help="run a command on N ranks: jfog run --help")
  doctor = commands.add_parser(
    "doctor", help="show what is installed, and test an exchange of two ranks"
  )
  doctor.set_defaults(action=_doctor)
  topology = commands.add_parser("topology", help="show properties of a graph")
  topology.add_argument("name", help="a generator of jfog.topology, e.g. ring")
  topology.add_argument("--size", type=int, required=True, metavar="N")
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
  return parser


def _doctor(options: argparse.Namespace) -> int:
  """Prints versions, devices and MPI; 1 if an exchange over MPI fails."""
  del options
  # JAX would reserve most of a GPU's memory, which the two ranks below need.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  _row("python", sys.version.split()[0])
  for name in ("jfog", "jax", "jaxlib", "numpy", "optax"):
    _row(name, _version(name))
  _row("devices", _jax_devices())
  _row("GPUs", _gpus())
  _row("NCCL", _nccl())
  # Without MPI there is nothing to launch, and simulation and meshes work.
  try:
    mpi = launch.installed_mpi()
  except RuntimeError as error:
    _row("MPI", f"none: {error}")
    return 0
  _row("MPI", f"{mpi.library} ({mpi.family})")
  _row("launcher", mpi.launcher)
  problem = _exchange_problem()
  _row("two ranks", problem or "an exchange works")
  return 1 if problem else 0


def _row(label: str, text: str) -> None:
  print(f"{label:<10}{text}", flush=True)


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _jax_devices() -> str:
  import jax

  try:
    return ", ".join(str(device) for device in jax.devices())
  except RuntimeError as error:
    return f"none: {error}"


def _gpus() -> str:
  from jfog.runtime import _gpu_placement

  found = _gpu_placement.gpus()
  if not found.names:
    return f"none: {found.reason}"
  return f"{len(found.names)}: {', '.join(found.names)}"


def _nccl() -> str:
  from jfog import runtime

  try:
    version, path = runtime.nccl_library()
  except RuntimeError as error:
    return f"none: {error}"
  return f"{version} ({path})"


def _exchange_problem() -> str:
  """Returns the failure of an allreduce by two ranks; "" if it works."""
  # A job of its own: this process must not start MPI, as it may go on without.
  program = [sys.executable, "-c", _EXCHANGE]
  arguments = ["-np", "2", "--timeout", "120", *program]
  done = subprocess.run(
    launch.command_line(arguments),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
  )
  if done.returncode == 0:
    return ""
  # The launcher's own report comes last.
  report = done.stderr[done.stderr.rfind("jfog run: ") :].strip()
  return f"an exchange fails with exit code {done.returncode}:\n{report}"


def _topology(options: argparse.Namespace) -> int:
  """Prints the properties of a graph; 2 for an unknown name or bad argument."""
  from jfog import topology

  try:
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


def _generator(topology: Any, name: str) -> Any:
  """Finds a generator by name: the functions whose first argument is `size`."""
  names = [
    each
    for each, value in vars(topology).items()
    if each[0] != "_"
    and callable(value)
    and not isinstance(value, type)
    and next(iter(value.__annotations__), "") == "size"
  ]
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
    "period": len(graph),
    "rounds_to_exact_average": of("rounds_to_exact_average", int),
  }


if __name__ == "__main__":
  sys.exit(main())
