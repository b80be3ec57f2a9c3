"""Programs of pages that need several ranks, and names that pages have to list."""

import pathlib
import re

import pytest
from support import jobs

from jfog import runtime

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
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
