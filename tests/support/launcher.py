"""The launcher as a program of its own, for tests of jobs without JAX."""

import pathlib
import shutil
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

from jfog import launch

DEADLINE = 60.0  # seconds; each of these takes one or two when all is quiet
ENDS_WITHIN = 10.0  # the promise about a job in which a rank died

# The part of MPI that a test program needs: `rank`, `size`, `barrier()`, and an uncaught
# exception that does not wait for others in MPI_Finalize.
MPI = """
import os, signal, sys, time
from mpi4py import MPI

def _end(*error):
  sys.__excepthook__(*error)
  sys.stderr.flush()
  os._exit(1)

sys.excepthook = _end
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
barrier = MPI.COMM_WORLD.Barrier
"""
RANK = (
  'rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; say() { printf "%s\\n" "$*"; };'
)


def copy_launcher(package):
  shutil.copytree(pathlib.Path(launch.__file__).parent, package / "launch")


def write_build(package, mpi):
  (package / "_build.py").write_text(
    f"MPI_LAUNCHER = {mpi.launcher!r}\n"
    f"MPI_FAMILY = {mpi.family!r}\n"
    f"MPI_LIBRARY = {mpi.library!r}\n"
  )


def start(program, *words, environ=None):
  if "--tag-output" not in words:
    words = ("--no-tag-output", *words)
  return subprocess.Popen(
    [sys.executable, "-I", "-S", str(program), *map(str, words)],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=environ,
  )


class Result(NamedTuple):
  returncode: int
  out: str
  err: str
  seconds: float


def finish(job):
  began = time.monotonic()
  try:
    out, err = job.communicate(timeout=DEADLINE)
  except subprocess.TimeoutExpired:
    job.kill()
    raise
  return Result(job.returncode, out, err, time.monotonic() - began)


def run(program, *words, environ=None):
  return finish(start(program, *words, environ=environ))


def shell(script):
  return ["bash", "-c", RANK + script]


def python(body):
  return [sys.executable, "-c", MPI + textwrap.dedent(body)]
