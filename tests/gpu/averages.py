"""Averages of one array against raw NCCL, device copies and XLA's collectives.

Stage 4 runs it on two ranks, which share a GPU where there is one only: first all
peers in turns in one job, then XLA's in a job of its own (`--xla`). The peers and
how they are timed are those of `benchmarks/gpu.py`.
"""

import functools
import os
import pathlib
import sys
from typing import Any

import ranks

import _measure  # isort: skip
import gpu  # isort: skip

LARGE = 256 * 2**20
# Bytes and graphs, in the order of their worth. Two ranks have one neighbor on
# both graphs; the second has a step.
RING, ONE_PEER = gpu.GRAPHS
CASES = (
  *((RING, LARGE), (ONE_PEER, LARGE), (RING, 8), (ONE_PEER, 8)),
  *((RING, 64 * 2**10), (RING, 2**20), (RING, 16 * 2**20)),
)
REHEARSED = ((RING, 2**20), (RING, 8), (ONE_PEER, 8))
JOB = {
  "cases": REHEARSED if ranks.REHEARSAL else CASES,
  "rounds": 3 if ranks.REHEARSAL else 5,
  "target": 0.05 if ranks.REHEARSAL else 0.15,  # seconds of one timing
}


def on_jfog():
  """jfog, raw NCCL and a copy on the device, alternating; returns failures."""
  world = ranks.World()
  import _gpu_peers
  import jax.numpy as jnp
  import numpy as np

  from jfog import runtime

  if ranks.REHEARSAL:
    nccl = cuda = ranks.EMULATION
  else:
    nccl, cuda = runtime.nccl_library()[1], "libcuda.so.1"
  (device,) = jnp.zeros(()).devices()
  peer = _gpu_peers.Gpu(world, device.local_hardware_id or 0, nccl, cuda)
  versions = dict(zip(("cuda", "nccl"), peer.versions(), strict=True))
  variables = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
  kind = device.device_kind
  facts = {"device": kind, **versions, "variables": variables}
  world.record("versions", outcome="measured", **facts)

  def measure(case):
    times = gpu.times_of_average(JOB, case, peer, world.slowest)
    ratios = _measure.ratios(times["raw NCCL"], times["jfog"])
    median = {name: float(np.median(each)) for name, each in times.items()}
    return {
      **{f"{name} us": 1e6 * seconds for name, seconds in median.items()},
      "GB/s": case[1] / median["jfog"] / 1e9,
      "of raw NCCL": float(np.median(ratios)),
      "quartiles": [float(q) for q in np.percentile(ratios, [25, 75])],
    }

  cases: dict[str, Any] = {"values": lambda: gpu.check_averages(JOB, peer)}
  for graph, size in JOB["cases"]:
    name = f"{_measure.size_name(size)}, {graph}"
    cases[name] = functools.partial(measure, (graph, size))
  failures = world.run(cases)
  peer.close()
  return failures


def on_xla(processes):
  """XLA's `ppermute` and `psum`, on one GPU if there is one only."""
  import numpy as np

  from jfog.runtime import _gpu_placement

  count = max(1, _gpu_placement.gpu_count())
  job = {**JOB, "place": "xla", "ranks": processes}
  job["devices"] = [process % count for process in range(processes)]
  environment = {"JAX_PLATFORMS": os.environ["JAX_PLATFORMS"]}
  script = pathlib.Path(gpu.__file__).resolve()
  found = _measure.xla_job(script, processes, job, processes, environment)
  for case, times in found["average"].items():
    facts = {
      f"{peer} us": 1e6 * float(np.median(each)) for peer, each in times.items()
    }
    ranks.record(case, outcome="measured", **facts)
  return 0


if __name__ == "__main__":
  xla = "--xla" in sys.argv[1:]
  sys.exit(1 if (on_xla(2) if xla else on_jfog()) else 0)
