"""The command `jfog bench train`: the rate of a training with synthetic data."""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from jfog.bench import machine

WITHOUT = (
  "none"  # steps without communication, which the others are compared with
)

_MODELS = {
  "resnet50": 32,
  "resnet18": 32,
  "transformer": 8,
}  # with samples a rank
_GRAPHS = (
  *("one_peer_exponential", "exponential", "ring", "mesh_grid_2d"),
  "hierarchical",
)
_OPTIMIZERS = (
  *("adapt_then_combine", "adapt_with_combine", "gradient_tracking"),
  *("push_sum", "gradient_allreduce", "local_sgd", "diloco"),
)
_LAUNCHED = (
  "OMPI_COMM_WORLD_SIZE",
  "PMI_SIZE",
)  # variables of an MPI job's ranks
_DEADLINE = 3600.0  # seconds of one job


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `jfog bench train`."""
  parser.add_argument(
    *("-np", "-n"),
    dest="ranks",
    type=int,
    nargs="+",
    metavar="N",
    help="numbers of ranks, one job for each (default: 2); not under `jfog run`",
  )
  parser.add_argument("--model", choices=[*_MODELS], default="resnet50")
  parser.add_argument(
    "--size",
    choices=["full", "tiny"],
    default="full",
    help="tiny: a model that trains in milliseconds, to try the command",
  )
  parser.add_argument(
    "--optimizer",
    nargs="+",
    choices=_OPTIMIZERS,
    default=["adapt_then_combine"],
    help="one or several, which take turns (default: adapt_then_combine)",
  )
  parser.add_argument(
    "--graph",
    choices=_GRAPHS,
    default="one_peer_exponential",
    help="of the optimizers with a graph (default: one_peer_exponential)",
  )
  parser.add_argument(
    "--every",
    type=int,
    default=16,
    metavar="N",
    help="steps from one average to the next, of local_sgd and diloco",
  )
  parser.add_argument(
    "--batch",
    type=int,
    metavar="N",
    help="samples of a rank and step (default: 32 images, 8 sequences)",
  )
  parser.add_argument(
    "--steps", type=int, default=10, metavar="N", help="steps of a timing"
  )
  parser.add_argument(
    "--rounds",
    type=int,
    default=5,
    metavar="N",
    help="timings of each optimizer",
  )
  parser.add_argument(
    "--dtype",
    choices=["float32", "bfloat16"],
    help="of the computation (default: bfloat16 on a GPU, else float32)",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write all times to a file"
  )


def main(options: argparse.Namespace) -> int:
  """Runs the jobs, or the own rank of one; 2 for bad options, 1 for a failure."""
  for name in ("batch", "steps", "rounds", "every"):
    value = getattr(options, name)
    if value is not None and value < 1:
      return _refuse(f"--{name} {value} must be at least 1.")
  if any(ranks < 1 for ranks in options.ranks or []):
    return _refuse(f"-np {min(options.ranks)} must be at least 1.")
  job = {
    **{"model": options.model, "size": options.size, "dtype": options.dtype},
    "batch": options.batch or _MODELS[options.model],
    **{"optimizers": options.optimizer, "graph": options.graph},
    **{"every": options.every, "steps": options.steps},
    "rounds": options.rounds,
  }
  if any(name in os.environ for name in _LAUNCHED):
    if options.ranks:
      return _refuse("-np belongs to `jfog run` here; leave it out.")
    from jfog.bench import train_job

    found = train_job.run(job)
    return _report(job, [found], options.json) if found else 0
  results = []
  for ranks in options.ranks or [2]:
    try:
      results.append(
        machine.run_job(ranks, {"train": job}, os.environ, _DEADLINE)
      )
    except RuntimeError as error:
      print(f"jfog bench train: {error}", file=sys.stderr)
      return 1
  return _report(job, results, options.json)


def _refuse(text: str) -> int:
  print(f"jfog bench train: {text}", file=sys.stderr)
  return 2


def _report(
  job: dict[str, Any], results: list[dict[str, Any]], path: str | None
) -> int:
  """Prints the table, and writes the times."""
  print("\n".join(lines(job, results)))
  if path:
    text = json.dumps({**machine.facts(), "job": job, "results": results})
    pathlib.Path(path).write_text(text + "\n")
  return 0


def lines(job: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
  """The lines of the table."""
  import numpy as np

  from jfog.bench import measure

  rows = []
  for each in results:
    times = each["seconds"]
    for name, seconds in times.items():
      step = float(np.median(seconds))
      rate = each["units"] / step
      rows.append(
        [
          *(each["ranks"], name, measure.duration(step)),
          *(f"{rate:.4g}", f"{each['ranks'] * rate:.4g}"),
          measure.spread(measure.ratios(times[WITHOUT], seconds)),
        ]
      )
  first, facts = results[0], machine.facts()
  unit = first["unit"]
  return [
    f"{facts['cores']} cores, {first['device']}, jfog {facts['jfog']}, jax "
    f"{facts['jax']}, {facts['mpi']}",
    f"{job['model']}{', tiny' if job['size'] == 'tiny' else ''}: "
    f"{first['parameters']:,} parameters, {first['units']} {unit} a rank and step, "
    f"{first['dtype']}; graph {job['graph']}",
    "by none's: the rate by that of steps without communication, median [quartiles]",
    "",
    *measure.table(
      [
        *("ranks", "optimizer", "step", f"{unit}/s a rank", f"{unit}/s"),
        "by none's",
      ],
      rows,
    ),
  ]
