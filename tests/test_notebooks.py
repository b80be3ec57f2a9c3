"""Notebooks run in a kernel: virtual ranks, and engines of ipyparallel on MPI."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from support import suite

from jfog import runtime

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
DEADLINE = 400.0  # seconds; each takes about forty when all is quiet
needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
# Runs a notebook in a kernel and writes it with its outputs.
EXECUTE = """
import sys
import nbclient, nbformat
source, target, goes_on = sys.argv[1:]
notebook = nbformat.read(source, 4)
client = nbclient.NotebookClient(
  notebook, timeout=300, kernel_name="python3", allow_errors=goes_on == "True"
)
client.execute()
nbformat.write(notebook, target)
"""


def execute(source, folder, *, goes_on=False):
  """The cells of a notebook after a run; with `goes_on` also after errors."""
  target = folder / "executed.ipynb"
  done = subprocess.run(
    [sys.executable, "-c", EXECUTE, str(source), str(target), str(goes_on)],
    cwd=folder,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )
  assert done.returncode == 0, done.stderr
  return cells(target)


def cells(path):
  return json.loads(path.read_text())["cells"]


def sources(path, kind="code"):
  return ["".join(c["source"]) for c in cells(path) if c["cell_type"] == kind]


def printed(cell):
  """The text of a cell's output, with errors but without progress bars."""
  words = []
  for output in cell.get("outputs", ()):
    if output["output_type"] == "error":
      words += output["traceback"]
    if output["output_type"] == "stream" and "\r" not in output["text"][0]:
      words += output["text"]
  return re.sub(r"\x1b\[[\d;]*m", "", "".join(words)).strip()


def pictures(cell):
  return {
    kind
    for output in cell.get("outputs", ())
    for kind in output.get("data", ())
    if kind.startswith("image/")
  }


def check_outputs(got, path):
  """Requires the stored notebook's outputs, with numbers up to rounding."""
  number = r"-?\d+\.\d+"
  stored = cells(path)
  assert len(got) == len(stored)
  for new, old in zip(got, stored, strict=True):
    text, truth = printed(new), printed(old)
    if text.endswith("running: False"):
      text = "running: False"  # below the log of the engines
    assert re.sub(number, "", text) == re.sub(number, "", truth)
    for x, y in zip(
      re.findall(number, text), re.findall(number, truth), strict=True
    ):
      assert float(x) == pytest.approx(float(y), abs=2e-3)
    assert pictures(new) == pictures(old)


def test_hello_world(tmp_path):
  suite.require("nbclient", "ipykernel")
  path = EXAMPLES / "hello_world.ipynb"
  got = execute(path, tmp_path)
  check_outputs(got, path)
  assert [pictures(cell) for cell in got].count({"image/png"}) == 3
  assert [pictures(cell) for cell in got].count({"image/gif"}) == 1
  assert path.stat().st_size < 250_000


@needs_mpi
def test_interactive_mpi(tmp_path):
  suite.require("nbclient", "ipykernel", "ipyparallel")
  path = EXAMPLES / "interactive_mpi.ipynb"
  got = execute(path, tmp_path)
  check_outputs(got, path)
  last = [re.findall(r"\+ (\S+)", printed(cell)) for cell in got]
  averaged, corrected = filter(None, last)
  assert len(set(averaged)) == 4
  assert corrected == ["1.501"] * 4


@needs_mpi
def test_engines_that_wait_or_die_are_errors_and_start_again(tmp_path):
  """The failures that the notebook describes, with engines that it starts."""
  suite.require("nbclient", "ipykernel", "ipyparallel")
  path = EXAMPLES / "interactive_mpi.ipynb"
  start, init, *_, stop = sources(path)
  assert '"--op-timeout", "60"' in start
  names = ("NPROC", "OMPI_MCA_btl", "OMPI_MCA_btl_sm_eager_limit")
  program = [
    start.replace('"60"', '"5"'),
    init,
    f"%%px\nprint(*(name in os.environ for name in {names}))",
    "%%px --targets 0\njfog.allreduce(jnp.ones(3)).block_until_ready()",
    *(stop, start, init),
    "%%px\nif world.rank == 2: os._exit(3)\n"
    "jfog.allreduce(jnp.ones(3)).block_until_ready()",
    stop,
  ]
  notebook = {
    "cells": [
      {
        **{"cell_type": "code", "id": f"cell-{number}", "metadata": {}},
        **{"execution_count": None, "outputs": [], "source": source},
      }
      for number, source in enumerate(program)
    ],
    **{"metadata": {}, "nbformat": 4, "nbformat_minor": 5},
  }
  (tmp_path / "failures.ipynb").write_text(json.dumps(notebook))
  got = execute(tmp_path / "failures.ipynb", tmp_path, goes_on=True)
  texts = [printed(cell) for cell in got]
  prepared, waited, died, stopped = (texts[k] for k in (2, 3, 7, 8))
  assert prepared.count("True True True") == 4
  assert (
    "DEADLINE_EXCEEDED: jfog: allreduce #0 on rank 0 waited 5.0 s" in waited
  )
  assert "for ranks 1, 2, 3" in waited
  assert re.search(r"EngineError: Engine \d died while running task", died)
  assert "jfog run: rank 2 failed first (exit code 3)" in died + stopped
  for text in (texts[1], texts[6]):
    assert len(re.findall(r"rank \d of 4 by mpi", text)) == 4
  assert texts[-1].endswith("running: False")
