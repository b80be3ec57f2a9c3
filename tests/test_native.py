"""Unit tests in C++ of the parts of xla_ops that need neither MPI nor ranks."""

import concurrent.futures
import pathlib
import subprocess
import sys

import jax
import pytest
from support import emulated

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Units under test, beside all of xla_ops/common.
UNITS = ("payload", "segments", "buffer_pool", "windows/memory")
HEADER = "doctest/doctest.h"


def mpi_includes():
  """The directories of mpi.h: of the installed wheel, or else the system's."""
  for source in ("wheel", "system"):
    found = subprocess.run(
      [sys.executable, ROOT / "cmake" / "find_mpi.py", source],
      capture_output=True,
      text=True,
    )
    if found.returncode == 0:
      return found.stdout.split(";")[1].split()
  return []


def has(header):
  """Whether the compiler finds a header."""
  found = subprocess.run(
    [*emulated.compiler(), "-E", "-x", "c++", "-"],
    input=f"#include <{header}>\n",
    capture_output=True,
    text=True,
  )
  return found.returncode == 0


def run(command):
  """Runs a command, whose output is shown if it fails."""
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def build(program, sources, includes):
  """Compiles sources, two at a time, and links them."""
  flags = ["-std=c++17", "-O1", "-pthread", "-ffp-contract=off"]
  flags += ["-I", ROOT / "xla_ops", "-isystem", jax.ffi.include_dir()]
  for folder in includes:
    flags += ["-isystem", folder]
  objects = [program.with_name(f"{i}.o") for i in range(len(sources))]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    list(
      pool.map(
        lambda source, made: run(
          [*emulated.compiler(), *flags, "-c", source, "-o", made]
        ),
        sources,
        objects,
      )
    )
  run([*emulated.compiler(), "-pthread", *objects, "-o", program])


@pytest.mark.full
def test_units(tmp_path):
  if not emulated.compiler():
    pytest.skip("there is no C++ compiler")
  if not has(HEADER):
    pytest.skip("doctest is not installed (on Debian the package doctest-dev)")
  includes = mpi_includes()
  if not includes:
    pytest.skip("there is no mpi.h, which headers of xla_ops/mpi include")
  sources = [
    *sorted((ROOT / "tests" / "native").glob("*.cc")),
    *sorted((ROOT / "xla_ops" / "common").glob("*.cc")),
    *(ROOT / "xla_ops" / "mpi" / f"{unit}.cc" for unit in UNITS),
  ]
  program = tmp_path / "units"
  build(program, sources, includes)
  assert "Status: SUCCESS!" in run([program])
