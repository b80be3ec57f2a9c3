"""Averages of one array against raw NCCL, device copies and XLA's collectives.

Stage 4 runs it on two ranks, which share a GPU where there is one only: all peers
in turns in one job, then XLA's in a job of its own (`--xla`). Times are of one
step, medians over the rounds of the slowest rank.
"""

import argparse
import os
import sys
import time

import ranks

LARGE = 256 * 2**20
SIZES = (LARGE, 8, 64 * 2**10, 2**20, 16 * 2**20)  # bytes, in order of worth
REHEARSED = (2**20, 8, 64 * 2**10)
GRAPHS = ("ring", "one-peer exponential")
CHECKED = 64 * 2**10
TARGET = 0.15  # seconds of one timing
ROUNDS = 5
MOST = 16  # steps of one jitted scan


def steps_of(size):
  """The steps of one jitted scan: fewer for larger arrays."""
  return max(2, min(MOST, 2**26 // size))


def on_jfog():
  """jfog, raw NCCL and a copy on the device, alternating."""
  world = ranks.World()
  import _gpu_peers
  import _measure
  import _peers
  import jax.numpy as jnp
  import numpy as np

  from jfog import runtime

  if ranks.REHEARSAL:
    nccl = cuda = ranks.EMULATION
  else:
    nccl, cuda = runtime.nccl_library()[1], "libcuda.so.1"
  (device,) = jnp.zeros(()).devices()
  gpu = _gpu_peers.Gpu(world, device.local_hardware_id or 0, nccl, cuda)
  cuda_version, nccl_version = gpu.versions()
  variables = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
  world.record(
    "versions",
    outcome="measured",
    device=device.device_kind,
    cuda=cuda_version,
    nccl=nccl_version,
    variables=variables,
  )

  def peers_of(graph, size, steps):
    x = _peers.start(world.rank, size // 4)
    return {
      "jfog": _peers.Jfog(graph, steps, x, world),
      "raw NCCL": _gpu_peers.RawNccl(graph, steps, x, gpu),
      "device copy": _gpu_peers.DeviceCopy(steps, x, gpu),
    }

  def check(name):
    graph = _peers.GRAPHS[name](world.size)
    peers = peers_of(graph, CHECKED, 2)
    for peer in peers.values():
      peer.seconds(1)
    truth = _peers.expected(graph, CHECKED // 4, 2)[world.rank]
    np.testing.assert_allclose(peers["jfog"].value(), truth, 1e-5)

  def measure(name, size):
    graph = _peers.GRAPHS[name](world.size)
    steps = steps_of(size)
    peers = peers_of(graph, size, steps)
    for peer in peers.values():
      peer.seconds(1)  # compiles, and connects
    pilots = {k: world.slowest(p.seconds(1)) for k, p in peers.items()}
    calls = {k: _measure.calls_for(t, TARGET) for k, t in pilots.items()}

    def seconds(k):
      return world.slowest(peers[k].seconds(calls[k])) / (calls[k] * steps)

    times = _measure.alternate({k: k for k in peers}, ROUNDS, seconds)
    ratios = _measure.ratios(times["raw NCCL"], times["jfog"])
    median = {k: float(np.median(t)) for k, t in times.items()}
    return {
      **{f"{k} us": 1e6 * t for k, t in median.items()},
      "GB/s": size / median["jfog"] / 1e9,
      "of raw NCCL": float(np.median(ratios)),
      "quartiles": [float(q) for q in np.percentile(ratios, [25, 75])],
    }

  sizes = REHEARSED if ranks.REHEARSAL else SIZES
  cases = {f"values, {name}": (lambda n=name: check(n)) for name in GRAPHS}
  for size in sizes:
    # With two ranks both graphs have one neighbor; the second has a step.
    for name in GRAPHS if size in (sizes[0], 8) else GRAPHS[:1]:
      case = lambda n=name, s=size: measure(n, s)  # noqa: E731
      cases[f"{_measure.size_name(size)}, {name}"] = case
  failures = world.run(cases)
  gpu.close()
  return failures


def on_xla(ranks_of_job, process, coordinator):
  """XLA's `ppermute` and `psum`, if it runs two processes on one GPU."""
  if "libnccl" in os.environ.get("LD_PRELOAD", ""):  # 2.30 or later
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
  else:
    os.environ.setdefault("NCCL_HOSTID", f"xla-{process}")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.35")
  import _gpu_peers
  import _measure
  import _peers
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  devices = [0] if not ranks.REHEARSAL else None
  jax.distributed.initialize(
    coordinator, ranks_of_job, process, local_device_ids=devices
  )
  assert jax.device_count() == ranks_of_job, jax.devices()

  def barrier():
    multihost_utils.sync_global_devices("start")

  def slowest(seconds):
    return float(multihost_utils.process_allgather(np.float32(seconds)).max())

  for size in REHEARSED if ranks.REHEARSAL else SIZES:
    graph = _peers.GRAPHS["ring"](ranks_of_job)
    x, steps = _peers.starts(ranks_of_job, size // 4), steps_of(size)
    facts = {}
    for name, peer in {
      "ppermute": _peers.Xla(graph, steps, x, barrier),
      "psum": _gpu_peers.XlaMean(ranks_of_job, steps, x, barrier),
    }.items():
      peer.seconds(1)
      calls = _measure.calls_for(slowest(peer.seconds(1)), TARGET)
      times = [
        slowest(peer.seconds(calls)) / (calls * steps) for _ in range(ROUNDS)
      ]
      facts[f"{name} us"] = 1e6 * float(np.median(times))
    if process == 0:
      case = f"{_measure.size_name(size)}, XLA"
      ranks.record(case, outcome="measured", **facts)
  return 0


def start_xla(ranks_of_job):
  """Starts XLA's processes and waits for them."""
  import subprocess

  import _measure

  coordinator = f"localhost:{_measure._free_port()}"
  command = [sys.executable, __file__, "--ranks", str(ranks_of_job), "--xla"]
  started = [
    subprocess.Popen([*command, str(i), "--coordinator", coordinator])
    for i in range(ranks_of_job)
  ]
  while all(process.poll() is None for process in started):
    time.sleep(0.1)
  codes = [process.poll() for process in started]
  if any(codes):  # the other one would wait for its end
    for process in started:
      process.kill()
  return max(abs(process.wait()) for process in started)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ranks", type=int, default=2)
  parser.add_argument("--xla", help="a process's number, or `start`")
  parser.add_argument("--coordinator")
  options = parser.parse_args()
  if options.xla == "start":
    sys.exit(start_xla(options.ranks))
  if options.xla:
    sys.exit(on_xla(options.ranks, int(options.xla), options.coordinator))
  sys.exit(1 if on_jfog() else 0)
