"""Unit tests in C++ of the parts of xla_ops that need neither MPI nor ranks."""

import concurrent.futures
import pathlib
import subprocess

import jax
import pytest
from support import emulated, mpi_headers

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Units under test, beside all of xla_ops/common.
UNITS = (
  *("payload", "segments", "buffer_pool", "messages", "timeline"),
  *("hang_detector", "windows/memory", "windows/requests"),
)
HEADER = "doctest/doctest.h"


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


def build(program, units, includes, sanitizes):
  """Compiles lists of sources, each as one unit, and links them."""
  options = []
  if sanitizes:
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
  flags = [*options, "-std=c++17", "-O0", "-pthread", "-ffp-contract=off"]
  flags += ["-I", ROOT / "xla_ops", "-isystem", jax.ffi.include_dir()]
  for folder in includes:
    flags += ["-isystem", folder]

  def compiled(numbered):
    number, sources = numbered
    unit = program.with_name(f"{number}.cc")
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    made = unit.with_suffix(".o")
    run([*emulated.compiler(), *flags, "-c", unit, "-o", made])
    return made

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    objects = list(pool.map(compiled, enumerate(units)))
  run([*emulated.compiler(), *options, "-pthread", *objects, "-o", program])


@pytest.fixture
def includes():
  """The directories of mpi.h, where all that the tests need is there."""
  if not emulated.compiler():
    pytest.skip("there is no C++ compiler")
  if not has(HEADER):
    pytest.skip("doctest is not installed (on Debian the package doctest-dev)")
  if not (folders := mpi_headers.folders()):
    pytest.skip("there is no mpi.h, which headers of xla_ops/mpi include")
  return folders


def units(tests):
  """The tests and the units under test; headers of XLA are most of a small file."""
  common = sorted((ROOT / "xla_ops" / "common").glob("*.cc"))
  slow = [source for source in common if source.stem == "weighted_sum"]
  parts = [ROOT / "xla_ops" / "mpi" / f"{unit}.cc" for unit in UNITS]
  half = len(tests) // 2
  return [
    slow,
    [*(source for source in common if source not in slow), *parts],
    [ROOT / "tests" / "native" / "main.cc", *tests[:half]],
    tests[half:],
  ]


@pytest.mark.full
def test_units_and_decoders(tmp_path, includes, soak, monkeypatch):
  """With `--soak` under AddressSanitizer and UBSan, which end it at an error."""
  monkeypatch.setenv("JFOG_FUZZ_RUNS", str(10_000_000 if soak else 20_000))
  tests = sorted((ROOT / "tests" / "native").glob("*_test.cc"))
  program = tmp_path / "units"
  build(program, units(tests), includes, sanitizes=soak)
  assert "Status: SUCCESS!" in run([program])
