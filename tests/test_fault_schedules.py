"""A training whose ranks are killed equals its simulation under the same schedule."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from faults import check, schedule

from jfog import launch, runtime

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)


@needs_mpi
@pytest.mark.parametrize("local_size", ["", "1"])
def test_a_run_equals_its_simulation(local_size, tmp_path):
  """Over shared memory, and over messages between pretended machines."""
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", str(schedule.SIZE)]
  )
  inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [*command, sys.executable, schedule.__file__, str(tmp_path)],
    env={**inherited, "JAX_PLATFORMS": "cpu", "JFOG_LOCAL_SIZE": local_size},
    cwd=pathlib.Path(__file__).parent,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=check.DEADLINE,
  )
  there = schedule.alive()
  left = np.flatnonzero(there[-1, -1])
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.split("DONE ")[1:]) == [f"{r}\n" for r in left]
  for g, truth in enumerate(schedule.simulated()):
    expected = np.concatenate([truth["w"], truth["v"]], axis=-1)
    for rank in range(schedule.SIZE):
      lived = there[g, :, rank]
      if not lived.any():
        continue
      got = schedule.log_of(tmp_path, g, rank)
      assert np.isnan(got[~lived]).all()
      np.testing.assert_allclose(
        got[lived], expected[lived, rank], rtol=2e-5, atol=2e-6
      )
