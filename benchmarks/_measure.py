"""Shared parts of the benchmarks: jobs, timing, statistics, tables, plots."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time

from jfog.bench.measure import alternate as alternate
from jfog.bench.measure import calls_for as calls_for
from jfog.bench.measure import duration as duration
from jfog.bench.measure import ratios as ratios
from jfog.bench.measure import size_name as size_name
from jfog.bench.measure import spread as spread
from jfog.bench.measure import table as table
from jfog.bench.measure import timed as timed

FOLDER = pathlib.Path(__file__).resolve().parent
DEADLINE = 1200  # seconds of one job


class JobTimeoutError(Exception):
  """A job has not ended within its deadline, and was ended."""


def arguments(description, ranks):
  """The parser of a benchmark: what all of them take."""
  if importlib.util.find_spec("matplotlib") is None:
    raise SystemExit("the benchmarks draw plots: pip install matplotlib")
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument(
    "--quick", action="store_true", help="fewer cases and repetitions"
  )
  parser.add_argument(
    "--ranks", type=int, nargs="+", default=ranks, help="sizes of the jobs"
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    default=FOLDER / "results",
    help="folder of the table and the plot",
  )
  parser.add_argument(
    "--yield",
    action="store_true",
    dest="yielding",
    help="ranks that wait give their core away, on a machine with other work",
  )
  parser.add_argument("--job", help=argparse.SUPPRESS)  # inside of a job
  return parser


# The driver: starts jobs and reads what their rank 0 has measured.


def mpi_job(script, ranks, job, environment=None, machines=1, link=None):
  """Runs `script` on MPI ranks with `--job`; returns rank 0's JSON.

  With `link`, the ranks are on so many pretended machines, each of which sends
  and receives at most `link` megabytes a second; as text with the milliseconds of
  a delay behind a comma. See slow_link.sh.
  """
  from jfog import launch

  hosts = [f"machine{i}:{ranks // machines}" for i in range(machines)]

  def command(arguments):
    words = ["--no-tag-output", "-np", str(ranks)]
    if link is None:
      return [launch.command_line([*words, *arguments])]
    words += ["--host", ",".join(hosts)]
    wrapper = ["sh", str(FOLDER / "slow_link.sh")]
    wrapper.append(link if isinstance(link, str) else f"{link:g}")
    return [[*wrapper, *launch.command_line([*words, *arguments])]]

  environment = {**(environment or {})}
  # Open MPI does it by itself where it knows that there are too few cores.
  if "--yield" in sys.argv or link is not None:
    environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
  return _run(script, job, command, environment)


def xla_job(script, ranks, job, processes, environment=None, deadline=DEADLINE):
  """The same without MPI: `ranks` devices in 1 or `ranks` processes."""
  environment = {**(environment or {})}
  if processes == 1:
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={ranks}"
  else:
    environment["NPROC"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    job = {**job, "coordinator": f"localhost:{_free_port()}"}

  def command(arguments):
    *head, last = arguments
    return [
      [*head, json.dumps({**json.loads(last), "process": i})]
      for i in range(processes)
    ]

  return _run(script, job, command, environment, deadline)


def _run(script, job, command, environment, deadline=DEADLINE):
  with tempfile.TemporaryDirectory() as folder:
    result = pathlib.Path(folder) / "result.json"
    job = json.dumps({**job, "result": str(result)})
    commands = command([sys.executable, str(script), "--job", job])
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      **environment,
    }
    started = [
      subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)
      for words in commands
    ]
    try:
      end = time.monotonic() + deadline
      codes = [p.wait(max(0.0, end - time.monotonic())) for p in started]
    except subprocess.TimeoutExpired as error:
      raise JobTimeoutError(
        f"a job of {script.name} did not end within {deadline} s"
      ) from error
    finally:
      for process in started:
        process.terminate()
    if any(codes) or not result.exists():
      raise SystemExit(f"a job of {script.name} failed: exit codes {codes}")
    return json.loads(result.read_text())


def _free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


# Inside of a job.


def start_mpi():
  """Starts jfog and mpi4py on one MPI.

  Returns a communicator of mpi4py's own, and a function that tells all ranks
  the greatest of their numbers.
  """
  import jfog

  world = jfog.init()
  import mpi4py

  mpi4py.rc.initialize = False  # jfog has
  mpi4py.rc.finalize = False
  from mpi4py import MPI

  comm = MPI.COMM_WORLD.Clone()
  assert comm.size == world.size
  return comm, lambda number: comm.allreduce(number, MPI.MAX)


# Output files.


def graphs_of(ranks):
  """The graphs that studies on virtual ranks compare, by name."""
  from jfog import topology

  return {
    "one-peer exponential": topology.one_peer_exponential(ranks),
    "exponential": topology.exponential(ranks),
    "base-2 graph": topology.base_k(ranks, 1),
    "grid": topology.mesh_grid_2d(ranks),
    "ring": topology.ring(ranks),
  }


def header(title, compared, script, notes=()):
  """The lines over a table: what, against what, with which versions, where."""
  from jfog import launch

  names = ("jfog", "jax", "jaxlib", "numpy", "mpi4py", "mpi4jax")
  versions = ", ".join(f"{name} {_version(name)}" for name in names)
  command = shlex.join(["python", f"benchmarks/{script.name}", *_shown()])
  return [
    f"# {title}",
    "",
    f"- compared: {compared}",
    f"- versions: Python {platform.python_version()}, {versions}, "
    f"{launch.installed_mpi().library}",
    f"- machine: {_processor()}, {len(os.sched_getaffinity(0))} cores",
    f"- command: `{command}`",
    f"- date: {datetime.date.today().isoformat()}",
    *(f"- {note}" for note in notes),
    "",
  ]


def write(out, name, lines, figure):
  """Writes `name`.md and `name`.png, and prints the first."""
  out.mkdir(parents=True, exist_ok=True)
  text = "\n".join(lines)
  (out / f"{name}.md").write_text(text)
  figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight")
  print(text)


def panels(rows, columns, **options):
  """A matplotlib figure and its axes, which needs no display."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  size = (4.5 * columns, 3.6 * rows)
  return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "(not installed)"


def _shown():
  """The arguments of the command, without folders, which results do not depend on."""
  words = sys.argv[1:]
  for name in ("--out", "--folder"):
    words = [w for w in words if not w.startswith(f"{name}=")]
    if name in words:
      at = words.index(name)
      words = words[:at] + words[at + 2 :]
  return words


def _processor():
  """The model of the processor, as the kernel tells it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [
    line.split(":")[1] for line in lines if line.startswith("model name")
  ]
  return names[0].strip() if names else platform.machine()
