"""Small experiments that only a GPU can answer; each ends in a conclusion.

Stage 7: what the step of a schedule costs, which leaves should be packed, how
often the watchdog should look, and what handles cost.
"""

import resource
import sys
import time

import ranks

world = ranks.World(timeout=60)

import jax  # noqa: E402  (after the rank has its GPU)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jfog  # noqa: E402
from jfog.primitives.nccl import _packing  # noqa: E402

N = world.size
RING = jfog.topology.ring(N)
SMALL = ranks.REHEARSAL
STEPS = 4 if SMALL else 32  # of a scan
ROUNDS = 3 if SMALL else 7
CALLS = 2 if SMALL else 5


def medians(programs):
  """Median microseconds of a step of each scan, all in turns.

  `programs` are jitted functions from a tree to one like it, of STEPS steps.
  """
  held = {}
  for name, (run, x) in programs.items():
    held[name] = jax.block_until_ready(run(x))  # compiles
  times = {name: [] for name in programs}
  for _ in range(ROUNDS):
    for name, (run, _) in programs.items():
      world.Barrier()
      begin = time.perf_counter()
      for _ in range(CALLS):
        held[name] = run(held[name])
      jax.block_until_ready(held[name])
      seconds = world.slowest(time.perf_counter() - begin)
      times[name].append(1e6 * seconds / (CALLS * STEPS))
  return {name: float(np.median(values)) for name, values in times.items()}


def scanned(step):
  """A jitted scan of STEPS steps `(x, index) -> x`."""

  def body(x, i):
    return step(x, i), None

  return jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(STEPS))[0])


def step_of_a_schedule():
  """A table in the call and a synchronization, or a branch for each round."""
  rounds = [RING, RING.lazy(), RING.lazy().lazy(), RING.lazy().lazy().lazy()]
  schedule = jfog.topology.Schedule(rounds)
  branches = [lambda x, g=g: jfog.neighbor_allreduce(x, g) for g in rounds]

  def unrolled(x, i):
    del i
    for branch in branches:
      x = branch(x)
    return x

  found = {}
  for size in (8, 4 * 2**20) if not SMALL else (8, 2**12):
    x = jnp.ones(size // 4)
    times = medians(
      {
        "table": (
          scanned(lambda x, i: jfog.neighbor_allreduce(x, schedule, i)),
          x,
        ),
        "switch": (
          scanned(lambda x, i: jax.lax.switch(i % len(rounds), branches, x)),
          x,
        ),
        "static": (scanned(lambda x, i: jfog.neighbor_allreduce(x, RING)), x),
        "unrolled 4": (scanned(unrolled), x),
      }
    )
    times["unrolled"] = times.pop("unrolled 4") / len(rounds)
    found |= {f"{name} of {size} B, us": t for name, t in times.items()}
    best = min(("table", "switch"), key=times.__getitem__)
    found[f"better at {size} B"] = best
  return found


def packing(bytes_of_a_leaf):
  """60 leaves of one size: as one message, or as one for each leaf."""
  x = [jnp.full(bytes_of_a_leaf // 4, float(i)) for i in range(60)]
  before, times = _packing._PACKED, {}
  try:
    for name, limit in (("packed", 2**62), ("apart", 0)):
      _packing._PACKED = limit
      jax.clear_caches()  # of how operations are lowered
      run = scanned(lambda x, i: jfog.neighbor_allreduce(x, RING))
      times[name] = run, x
      jax.block_until_ready(run(x))  # traced with this limit
  finally:
    _packing._PACKED = before
  times = medians(times)
  return {
    **{f"{name} us": t for name, t in times.items()},
    "better": min(times, key=times.__getitem__),
  }


def watchdog():
  """Its interval: the time of a step, and the processor's time it takes."""
  from jfog import _nccl as native

  average = scanned(lambda x, i: jfog.neighbor_allreduce(x, RING))
  x = jnp.ones(2)
  found = {}
  for milliseconds in (0.2, 2.0, 20.0):
    native.set_interval(milliseconds / 1e3)
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    times = medians({"step": (average, x)})
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found[f"step at {milliseconds} ms, us"] = times["step"]
    found[f"processor at {milliseconds} ms"] = used / wall
  native.set_interval(2e-3)
  return found


def handles(size):
  """The fused form against start and wait, and what a poll takes."""
  x = jnp.ones(size // 4)
  times = medians(
    {
      "fused": (scanned(lambda x, i: jfog.neighbor_allreduce(x, RING)), x),
      "split": (
        scanned(lambda x, i: jfog.wait(jfog.neighbor_allreduce_start(x, RING))),
        x,
      ),
    }
  )
  handle = jax.jit(lambda x: jfog.neighbor_allreduce_start(x, RING))(x)
  while not bool(jfog.poll(handle)):
    pass
  polls = []
  for _ in range(20):
    begin = time.perf_counter()
    bool(jfog.poll(handle))
    polls.append(time.perf_counter() - begin)
  jax.block_until_ready(jfog.wait(handle))
  return {
    **{f"{name} us": t for name, t in times.items()},
    "poll us": 1e6 * float(np.median(polls)),
  }


def dispatch():
  """How long the host takes for a call of a jitted average, and in a scan."""
  x = jnp.ones(2)
  average = jax.jit(lambda x: jfog.neighbor_allreduce(x, RING))
  alone = jax.jit(lambda x: x + 1)
  found = {}
  for name, run in (("average", average), ("addition", alone)):
    y = jax.block_until_ready(run(x))
    calls, ends = [], []
    for _ in range(30):
      world.Barrier()
      begin = time.perf_counter()
      y = run(y)
      calls.append(time.perf_counter() - begin)
      jax.block_until_ready(y)
      ends.append(time.perf_counter() - begin)
    found[f"{name}: call us"] = 1e6 * float(np.median(calls))
    found[f"{name}: end us"] = 1e6 * float(np.median(ends))
  return found


SIZES = (2**12, 2**14) if SMALL else (2**12, 2**16, 2**18, 2**20)
cases = {"the step of a schedule": step_of_a_schedule, "dispatch": dispatch}
for size in SIZES:
  cases[f"60 leaves of {size} B"] = lambda size=size: packing(size)
cases["the watchdog's interval"] = watchdog
for size in (8, 2**14) if SMALL else (8, 16 * 2**20):
  cases[f"handles of {size} B"] = lambda size=size: handles(size)
sys.exit(1 if world.run(cases) else 0)
