"""The second process of a test session, on small files of tests of its own."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
DEADLINE = 120  # seconds; it takes a few

CONFTEST = """
import os, tempfile
import pytest
from support import second

def pytest_addoption(parser):
  parser.addoption("--one-process", action="store_true")
  parser.addoption("--full", action="store_true")

def pytest_configure(config):
  if second.FOLDER:
    config.pluginmanager.register(second.Second(config))
  else:
    config.pluginmanager.register(
      second.First(config, tempfile.mkdtemp(dir=os.environ["FOLDER"])), "first"
    )

def pytest_collection_finish(session):
  if not second.FOLDER:
    first = session.config.pluginmanager.get_plugin("first")
    first.share(session.items)
    first.start(["--full"], dict(os.environ))

@pytest.fixture
def note(request):
  def note():
    with open(os.environ["FOLDER"] + "/ran", "a") as file:
      file.write(f"{os.getpid()} {request.node.nodeid}\\n")
  return note
"""

# 150 tests that take 20 ms each, by what some of them do.
FILE = """
import os, time
import pytest
from support import second

@pytest.fixture(scope="module")
def process():
  return os.getpid()

@pytest.mark.parametrize("k", range(150))
def test_each(k, note):
  note()
  time.sleep(0.02)
  {special}

@pytest.mark.parametrize("k", range(5))
def test_of_one_process(k, process, note):
  note()
  assert process == os.getpid()
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
  """Runs a session with a line for `test_each`: its output, and who ran it."""
  monkeypatch.setenv("PYTHONPATH", str(TESTS))
  monkeypatch.setenv("FOLDER", str(tmp_path))
  monkeypatch.delenv("JFOG_TEST_SECOND", raising=False)

  def session(special, *options):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    text = textwrap.dedent(FILE.format(special=special))
    (tmp_path / "test_file.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
      cwd=tmp_path,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=DEADLINE,
    )
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    return done.stdout, ran

  return session


def test_two_processes_run_each_test_once_and_report_it(session):
  special = """
  if k in (0, 149):
    assert k < 0, "of the first and of the second"
  if k in (1, 148):
    pytest.skip("in both")
  """
  output, ran = session(special, "-rs")
  assert re.search(r"2 failed, 151 passed, 2 skipped in", output), output
  assert output.count("AssertionError: of the first and of the second") >= 2
  assert "[2] test_file.py" in output and "in both" in output
  assert len({name for _, name in ran}) == len(ran) == 155
  assert len({process for process, _ in ran}) == 2


@pytest.mark.full
def test_one_process_if_so_wanted(session):
  output, ran = session("pass", "--one-process")
  assert re.search(r"155 passed in", output), output
  assert len({process for process, _ in ran}) == 1


@pytest.mark.full
def test_the_first_runs_what_a_dead_process_leaves(session):
  output, ran = session("if second.FOLDER and k < 149: os._exit(7)")
  assert re.search(r"155 passed in", output), output
  assert "NOTE: the second process ended with 7 and left" in output
  assert len({name for _, name in ran}) == 155


@pytest.mark.full
def test_a_failure_ends_the_session_if_so_wanted(session):
  output, ran = session("assert k != 149", "-x")
  assert re.search(r"1 failed, \d+ passed", output), output
  assert len({name for _, name in ran}) <= 155
