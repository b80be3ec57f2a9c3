"""The command `jfog bench`: starts the jobs, prints the table, draws the plot."""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from jfog.bench import machine

_SIZES = (8, 4 * 2**10, 32 * 2**10, 256 * 2**10, 2**20, 4 * 2**20)
_QUICK = (8, 32 * 2**10, 2**20)
_ALL_SIZES = (8, 512, *_SIZES[1:], 40 * 2**20)
_OPERATIONS = (
  "neighbor_allreduce, ring",
  "neighbor_allreduce, one-peer exponential",
  "allreduce",
  "hierarchical_neighbor_allreduce",
  "win_put",
)
_HIERARCHICAL = "hierarchical_neighbor_allreduce"
_DEADLINE = 1200.0  # seconds of one job


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `jfog bench`."""
  parser.add_argument(
    *("-np", "-n"),
    dest="ranks",
    type=int,
    nargs="+",
    default=[2, 4],
    metavar="N",
    help="numbers of ranks, one job for each (default: 2 4)",
  )
  parser.add_argument(
    "--operations",
    nargs="+",
    default=[],
    metavar="NAME",
    help=f"some of the operations: {', '.join(_names())}",
  )
  parser.add_argument(
    "--bytes",
    type=int,
    nargs="+",
    default=[],
    metavar="N",
    help=f"some of the sizes {', '.join(map(str, _ALL_SIZES))}",
  )
  parser.add_argument(
    "--quick", action="store_true", help="fewer sizes and repetitions"
  )
  parser.add_argument(
    "--yield",
    action="store_true",
    dest="yielding",
    help="ranks that wait in MPI give their core away, on a machine with other work",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write all times to a file"
  )
  parser.add_argument(
    "--plot", metavar="FILE", help="draw latency, bandwidth and scaling"
  )


def main(options: argparse.Namespace) -> int:
  """Runs the jobs and reports; 2 for bad options, 1 for a job that fails."""
  try:
    cases = _cases(options)
    if options.plot:
      _require_matplotlib()
  except (ValueError, ImportError) as error:
    print(f"jfog bench: {error}", file=sys.stderr)
    return 2
  results = []
  for ranks in options.ranks:
    for hierarchical in (False, True):
      chosen = [c for c in cases if (c[0] == _HIERARCHICAL) == hierarchical]
      if hierarchical and (ranks < 4 or ranks % 2):
        if options.operations:
          print(
            f"jfog bench: {_HIERARCHICAL} on {ranks} ranks is left out; it "
            f"takes an even number from 4 on",
            file=sys.stderr,
          )
        continue
      if not chosen:
        continue
      local_size = ranks // 2 if hierarchical else None
      try:
        found = _job(ranks, chosen, options, local_size)
      except RuntimeError as error:
        print(f"jfog bench: {error}", file=sys.stderr)
        return 1
      results += [{"ranks": ranks, **each} for each in found]
  print("\n".join(_report(results)))
  if options.json:
    text = json.dumps({**machine.facts(), "results": results}, indent=1)
    pathlib.Path(options.json).write_text(text + "\n")
  if options.plot:
    _draw(results, options.plot)
  return 0


def _names() -> list[str]:
  """The names of the operations, without graphs."""
  return list(dict.fromkeys(name.partition(",")[0] for name in _OPERATIONS))


def _cases(options: argparse.Namespace) -> list[tuple[str, int]]:
  """The operations and sizes that are chosen."""
  for name in options.operations:
    if name not in _names():
      raise ValueError(
        f"--operations {name} is not one of {', '.join(_names())}."
      )
  for size in options.bytes:
    if size not in _ALL_SIZES:
      raise ValueError(
        f"--bytes {size} is not one of {', '.join(map(str, _ALL_SIZES))}."
      )
  for ranks in options.ranks:
    if ranks < 2:
      raise ValueError(
        f"-np {ranks}: there is nothing to send; take at least 2."
      )
  sizes = options.bytes or (_QUICK if options.quick else _SIZES)
  return [
    (operation, size)
    for operation in _OPERATIONS
    if not options.operations
    or operation.partition(",")[0] in options.operations
    for size in sizes
  ]


def _job(
  ranks: int,
  cases: list[tuple[str, int]],
  options: argparse.Namespace,
  local_size: int | None,
) -> list[dict[str, Any]]:
  """Runs one job under the launcher, and returns its times."""
  environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
  environ.pop("JFOG_LOCAL_SIZE", None)
  if options.yielding:
    environ["OMPI_MCA_mpi_yield_when_idle"] = "1"
  if local_size is not None:
    environ["JFOG_LOCAL_SIZE"] = str(local_size)
  job = {
    "cases": cases,
    "rounds": 3 if options.quick else 9,
    "target": 0.01 if options.quick else 0.03,
  }
  return machine.run_job(ranks, job, environ, _DEADLINE)


def _report(results: list[dict[str, Any]]) -> list[str]:
  """The lines of the table."""
  import numpy as np

  from jfog.bench import measure

  rows = []
  for each in results:
    times = each["seconds"]
    median = float(np.median(times["jfog"]))
    rows.append(
      [
        *(each["operation"], each["ranks"], measure.size_name(each["bytes"])),
        measure.duration(median),
        f"{each['bytes'] / median / 1e9:.3g}",
        *(
          measure.spread(measure.ratios(times[peer], times["jfog"]))
          if peer in times
          else "-"
          for peer in ("raw MPI", "copy")
        ),
      ]
    )
  facts = machine.facts()
  columns = ["operation", "ranks", "array", "time", "GB/s"]
  return [
    f"{facts['cores']} cores, jfog {facts['jfog']}, jax {facts['jax']}, "
    f"{facts['mpi']}",
    "time: of one step in a jitted scan, median; GB/s: the array by it;",
    "raw MPI, copy: their time by jfog's, median [quartiles], above 1 jfog is faster",
    "",
    *measure.table([*columns, "raw MPI", "copy"], rows),
  ]


def _require_matplotlib() -> None:
  """Refuses `--plot` before the jobs run."""
  import importlib.util

  if importlib.util.find_spec("matplotlib") is None:
    raise ImportError(
      '--plot needs matplotlib; install it with pip install "jfog[plot]".'
    )


def _draw(results: list[dict[str, Any]], path: str) -> None:
  """Draws time and bandwidth over bytes, and time over ranks."""
  import matplotlib
  import numpy as np

  matplotlib.use("Agg")
  from matplotlib import pyplot

  from jfog.bench import measure

  figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
  largest = max(each["ranks"] for each in results)
  names = list(dict.fromkeys(each["operation"] for each in results))
  handles = {}
  for i, name in enumerate(names):
    here = [e for e in results if e["operation"] == name]
    top = [e for e in here if e["ranks"] == largest]
    for peer, style in (("jfog", "o-"), ("raw MPI", "x--")):
      shown = [e for e in top if peer in e["seconds"]]
      sizes = np.array([e["bytes"] for e in shown])
      times = np.array([np.median(e["seconds"][peer]) for e in shown])
      if len(shown):
        options: Any = {"color": f"C{i}", "ms": 4, "lw": 1.2}
        (line,) = axes[0].loglog(sizes, times * 1e6, style, **options)
        axes[1].loglog(sizes, sizes / times / 1e9, style, **options)
        handles[f"{name}, {peer}"] = line
    for size, style in zip(_ends(here), ("o-", "s:"), strict=False):
      shown = sorted(
        (e["ranks"], float(np.median(e["seconds"]["jfog"])) * 1e6)
        for e in here
        if e["bytes"] == size
      )
      axes[2].semilogy(*zip(*shown, strict=True), style, color=f"C{i}", ms=4)
  copies = [e for e in results if e["ranks"] == largest]
  by_size = {e["bytes"]: float(np.median(e["seconds"]["copy"])) for e in copies}
  sizes = np.array(sorted(by_size))
  times = np.array([by_size[s] for s in sizes.tolist()])
  for ax, values in ((axes[0], times * 1e6), (axes[1], sizes / times / 1e9)):
    (line,) = ax.loglog(sizes, values, color="black", lw=1)
  handles["copy in memory, all ranks at once"] = line
  axes[0].set(
    title=f"time, {largest} ranks", xlabel="bytes", ylabel="us a step"
  )
  axes[1].set(
    title=f"bandwidth, {largest} ranks", xlabel="bytes", ylabel="GB/s"
  )
  small, large = (measure.size_name(size) for size in _ends(results))
  axes[2].set(
    title=f"scaling: {small} (solid), {large} (dotted)",
    xlabel="ranks",
    ylabel="us a step",
    xticks=sorted({each["ranks"] for each in results}),
  )
  for ax in axes:
    ax.grid(alpha=0.3)
  figure.legend(
    handles=list(handles.values()),
    labels=list(handles),
    loc="outside lower center",
    ncols=3,
    fontsize=8,
    frameon=False,
  )
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _ends(results: list[dict[str, Any]]) -> tuple[int, int]:
  """The smallest and the largest number of bytes."""
  sizes = [each["bytes"] for each in results]
  return min(sizes), max(sizes)
