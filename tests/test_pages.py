"""Programs of pages that need several ranks, and names that pages have to list."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from support import jobs

import jfog
from jfog import launch, runtime

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Variables between jfog's own processes, and of its tests.
INTERNAL = {
  *("JFOG_RUN_DIR", "JFOG_RUN_JOB", "JFOG_RANK_PROCESS"),
  "JFOG_TEST_CHUNK_TAGS",
}
DEADLINE = 120.0  # seconds; each takes about five when all is quiet
needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)


def programs(name):
  """The `py` blocks of a page, which are programs of several ranks."""
  text = (DOCS / name).read_text()
  return re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)


@needs_mpi
def test_two_groups_of_ranks_of_mpi4py():
  (program,) = programs("frameworks.md")
  code, out, err = jobs.run_program(program, 4, deadline=DEADLINE)
  assert code == 0, err
  assert out == "2 of 4 ranks, means [1.0, 2.0, 1.0, 2.0]\n"


def outputs(name):
  """The `text` blocks of a page that are not below a Python block."""
  text = (DOCS / name).read_text()
  return re.findall(r"[^`]\n\n```text\n(.*?)^```", text, re.M | re.S)


def run_file(path, program, tags="--no-tag-output"):
  """Runs a program on two ranks from a file; returns code, stdout and stderr."""
  path.write_text(program)
  done = subprocess.run(
    [*launch.command_line([tags, "-np", "2"]), sys.executable, path.name],
    cwd=path.parent,
    env={**os.environ, "OMP_NUM_THREADS": "4"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  return done.returncode, done.stdout, done.stderr


@needs_mpi
def test_a_job_with_tagged_output(tmp_path):
  hello, _ = programs("running.md")
  tagged, _ = outputs("running.md")
  code, out, err = run_file(tmp_path / "hello.py", hello, tags="--tag-output")
  assert code == 0, err
  assert sorted(out.splitlines()) == sorted(tagged.splitlines())


@needs_mpi
def test_the_traced_program(tmp_path):
  traced, _ = programs("timeline.md")
  (report,) = outputs("timeline.md")
  code, out, err = run_file(tmp_path / "traced.py", traced)
  assert code == 0, err
  assert out == report


@needs_mpi
def test_the_report_of_the_first_failure(tmp_path):
  _, fails = programs("running.md")
  _, report = outputs("running.md")
  code, _, err = run_file(tmp_path / "train.py", fails)
  assert code == 1
  assert err.replace(f"{tmp_path}/", "").endswith(f"\n{report}")


def test_the_page_has_the_options_of_the_launcher():
  done = subprocess.run(
    [*launch.command_line(["--help"])],
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  options = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", done.stdout, re.I))
  text = (DOCS / "running.md").read_text()
  listed, *_ = re.findall(r"^\| option .*?\n\n", text, re.M | re.S)
  assert options == set(re.findall(r"`(--?[\w-]+)", listed))


def variables():
  """The variables JFOG_... that the sources read or set."""
  found = set()
  for path in (ROOT / "jfog").rglob("*.py"):
    found |= set(re.findall(r"""["'](JFOG_[A-Z_]+)["']""", path.read_text()))
  for path in (ROOT / "xla_ops").rglob("*.*"):
    found |= set(re.findall(r'getenv\("(JFOG_\w+)"', path.read_text()))
  cmake = (ROOT / "CMakeLists.txt").read_text()
  return found | set(re.findall(r"ENV\{(JFOG_\w+)\}", cmake))


def test_the_page_has_the_variables_of_the_sources():
  text = (DOCS / "running.md").read_text()
  listed = set(re.findall(r"^\| `(JFOG_\w+)` \|", text, re.M))
  assert variables() >= INTERNAL
  assert listed == variables() - INTERNAL


@needs_mpi
def test_counters_and_the_warning_of_a_wait(tmp_path):
  (program,) = programs("watching.md")
  counted, warning, *_ = outputs("watching.md")
  code, out, err = run_file(tmp_path / "late.py", program)
  assert code == 0, err
  assert out == counted
  waited = re.compile(r"\d\.\d s")
  assert waited.sub("1 s", warning) in waited.sub("1 s", err)


def test_the_page_has_all_diagnostics():
  text = (DOCS / "watching.md").read_text()
  for name in jfog.diagnostics.__all__:
    assert name in text
