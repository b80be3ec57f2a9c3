"""The logger: `JFOG_LOG_LEVEL`, the rank in each record, and the user's handlers."""

import logging
import os
import subprocess
import sys

import pytest

import jfog
from jfog import _log


@pytest.fixture(autouse=True)
def _as_before():
  log = _log.logger.logger
  state = log.level, list(log.handlers), log.propagate
  yield
  level, log.handlers, log.propagate = state
  log.setLevel(level)
  _log.set_rank(None)


def test_a_bad_level_is_named(monkeypatch):
  monkeypatch.setenv("JFOG_LOG_LEVEL", "loud")
  jfog.shutdown()
  with pytest.raises(ValueError, match=r"JFOG_LOG_LEVEL='loud'.*debug, info"):
    jfog.init(backend="single")


def test_records_have_the_rank_and_the_level(capsys):
  _log.configure({"JFOG_LOG_LEVEL": "Info"})
  _log.configure({"JFOG_LOG_LEVEL": "info"})  # one handler
  _log.set_rank(3)
  _log.logger.info("a %s", "text")
  _log.logger.debug("not shown")
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("jfog: ")
  assert lines[0].endswith(" info: rank 3: a text")


def test_without_the_variable_the_program_decides(caplog, capsys):
  _log.configure({})
  _log.logger.info("not recorded")
  with caplog.at_level(logging.INFO, "jfog"):
    _log.set_rank(1)
    _log.logger.info("recorded")
  assert [record.getMessage() for record in caplog.records] == [
    "rank 1: recorded"
  ]
  assert capsys.readouterr().err == ""


def test_a_world_of_one_is_logged(caplog):
  jfog.shutdown()
  with caplog.at_level(logging.INFO, "jfog"):
    jfog.init(backend="single")
    jfog.shutdown()
  texts = [record.getMessage() for record in caplog.records]
  assert texts == ["world of one, without MPI", "shutdown of the world of 1"]


@pytest.mark.full
def test_a_job_logs_its_world_transports_and_windows():
  program = """
import jax.numpy as jnp, jfog
world = jfog.init()
win = jfog.win_create(jnp.ones(10), jfog.topology.ring(2))
jfog.win_free(win)
jfog.shutdown()
"""
  command = [*(sys.executable, "-m", "jfog", "run", "--no-tag-output")]
  command += ["-np", "2", sys.executable, "-c", program]
  job = subprocess.run(
    command,
    env={**os.environ, "JFOG_LOG_LEVEL": "debug", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert job.returncode == 0, job.stderr
  for text in (
    "info: rank 0: world of 2 ranks by mpi, local rank 0 of 2, machine 0 of 1",
    "info: rank 1: transports: shared memory with rank 0",
    "debug: rank 0: MPI: ",
    "weighted sums on CPU: ",
    "info: rank 1: window of 1 leaves, 40 bytes, along Topology(size=2,",
    "info: rank 0: shutdown of the world of 2",
  ):
    assert text in job.stderr
