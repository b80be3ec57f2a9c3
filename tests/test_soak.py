"""The short form of the soak: random programs, faults, suspensions and limits.

`python tests/soak --minutes 60` is the long form; docs/soak.md describes both.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from soak import faults, limits, plan, report, values

from jfog import runtime

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
SEED = 1
full, soak = pytest.mark.full, pytest.mark.soak

# The quick suite has these, the full one a fault for each moment and a moment for
# each fault, and `--soak` all.
QUICK_CELLS = {("kill", "large exchange"), ("os._exit(3)", "collective")}
_FAULTS, _MOMENTS = len(faults.FAULTS), len(faults.MOMENTS)
FULL_CELLS = {
  (faults.FAULTS[k % _FAULTS], faults.MOMENTS[k % _MOMENTS])
  for k in range(_MOMENTS)
}

# Shown as failures that are expected until jfog is mended; not strict, for the order
# in which that happens is open.
KNOWN = {
  "ports_and_modes": "the launcher listens on all interfaces",
}


def known(*names):
  """The marks of a case that jfog does not pass yet."""
  return [
    pytest.mark.xfail(reason=KNOWN[name], strict=False)
    for name in names
    if name in KNOWN
  ]


def require(lines):
  """Fails with the findings of a job."""
  found = "\n".join(report.describe(line) for line in lines if line["problems"])
  if found:
    pytest.fail(found, pytrace=False)


def cells():
  """The table's cells as parameters."""
  for cell in faults.CELLS:
    marks = (
      [] if cell in QUICK_CELLS else [full if cell in FULL_CELLS else soak]
    )
    yield pytest.param(
      cell, marks=marks + known(*cell), id="-".join(cell).replace(" ", "_")
    )


def test_a_wrong_number_is_found():
  truth = {"a": np.ones((2, 3), np.float32), "b": np.arange(3, dtype=np.int32)}
  same = {"a": jnp.ones((2, 3)) + 1e-7, "b": jnp.arange(3, dtype=np.int32)}
  assert not values.difference(same, truth, 1)
  wrong = {
    "a": jnp.ones((2, 3)).at[1, 2].set(1.001),
    "b": jnp.arange(3, dtype=np.int32),
  }
  assert "at (1, 2)" in values.difference(wrong, truth, 1)
  nan = {
    "a": jnp.ones((2, 3)).at[0, 0].set(jnp.nan),
    "b": jnp.arange(3, dtype=np.int32),
  }
  assert "at (0, 0)" in values.difference(nan, truth, 1)
  other = {"a": jnp.ones((3, 2)), "b": jnp.arange(3, dtype=np.int32)}
  assert "(3, 2)" in values.difference(other, truth, 1)


@pytest.mark.parametrize("number", range(6))
def test_random_programs(number):
  require(plan.run(plan.Job(SEED, number, "programs", 8)))


@pytest.mark.parametrize("number", range(2))
def test_ranks_that_disagree(number):
  require(plan.run(plan.Job(SEED, number, "mismatches", 4)))


@pytest.mark.parametrize("cell", list(cells()))
def test_faults(cell):
  number = faults.CELLS.index(cell)
  line = {"kind": "fault", **faults.run(cell, (SEED, number))}
  require([{**line, "command": "pytest --soak tests/test_soak.py -k faults"}])


@pytest.mark.parametrize("kind", ["late", "suspended"])
def test_late_and_suspended_ranks(kind):
  require(plan.run(plan.Job(SEED, 0, kind, 2)))


@pytest.mark.parametrize(
  "name",
  [
    *(pytest.param(n, marks=[full, *known(n)]) for n in limits.SHORT),
    *(pytest.param(n, marks=[soak, *known(n)]) for n in limits.LONG),
  ],
)
def test_limits(name):
  line = limits.run(name)
  if "left_out" in line:
    pytest.skip(line["left_out"])
  require([{"kind": "limit", "command": "pytest tests/test_soak.py", **line}])


@pytest.mark.soak
def test_many_ranks():
  require(plan.run(plan.Job(SEED, 0, "many ranks", 3, True)))
