"""One rank of an injected job: averages, records each step, and dies as planned.

Every rank writes its value before each step into a file of its own, which outlives
its death. `check.py` compares them.
"""

import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfog

LENGTHS = (3, 900, 60_000)  # floats: in a mailbox, in one, through a channel


def graph_of(name, size):
  """The graph of a plan, at this number of ranks."""
  return getattr(jfog.topology, name)(size)


def die(delay):
  """Kills this process, after some seconds in another thread."""
  if delay is None:
    os.kill(os.getpid(), signal.SIGKILL)

  seconds = float(delay)

  def later():
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)

  threading.Thread(target=later, daemon=True).start()


def segments():
  """The files in /dev/shm that this process has mapped."""
  maps = pathlib.Path("/proc/self/maps").read_text()
  return sorted(set(re.findall(r"/dev/shm/\S+", maps)))


def main(folder, plan):
  """Runs the plan of a job on this rank."""
  steps, length = plan["steps"], plan["length"]
  world: Any = jfog.init(on_missing=plan["on_missing"], timeout=100)
  me = world.rank
  kills = {k["step"]: k for k in plan["kills"] if k["rank"] == me}
  path = os.path.join(folder, f"{me}.npy")
  shape = (steps + 1, 2 + length)
  log = np.lib.format.open_memmap(path, "w+", np.float32, shape)
  log[:] = np.nan
  print("STARTED", os.getpid(), *segments(), flush=True)
  graph = graph_of(plan["graph"], world.size)
  x = jnp.asarray(np.random.RandomState(me).randn(length), jnp.float32)

  def make(graph):
    return jax.jit(lambda x, t: jfog.neighbor_allreduce(x, graph, t))

  average, t = make(graph), 0
  average.lower(x, 0).compile()
  jfog.barrier()
  while True:
    try:
      while t < steps:
        if t in kills and kills[t]["when"] != "recovery":
          die(kills.pop(t)["delay"])
        # The mark of a step goes last.
        log[t, 2:], log[t, 1] = np.asarray(x), world.size
        log[t, 0] = t
        x = average(x, t).block_until_ready()
        t += 1
      break
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error):
        raise
      dying = [k for k in kills.values() if k["when"] == "recovery"]
      if dying:
        die(dying[0]["delay"])
      while True:
        world = jfog.recover()
        try:
          t = int(jfog.allreduce(jnp.int32(t), "max"))
          break
        except jax.errors.JaxRuntimeError as again:
          if not jfog.is_rank_failure(again):
            raise
      graph = graph_of(plan["graph"], world.size)
      average = make(graph)
  log[t, 2:], log[t, 1] = np.asarray(x), world.size
  log[t, 0] = t
  counted = jfog.diagnostics.counters()["missing"]
  launched = list(world.launched_ranks or range(world.size))
  if plan["on_missing"] == "error":
    # The new world averages on its own graph.
    row = graph[t].mixing_matrix[world.rank]
    try:
      y = np.asarray(average(jnp.full(length, float(me), jnp.float32), t))
      expected = row @ np.array(launched, float)
      np.testing.assert_allclose(y, expected, rtol=1e-5)
    except jax.errors.JaxRuntimeError as error:  # killed after the last step
      if not jfog.is_rank_failure(error):
        raise
  print("DONE", json.dumps([me, launched, counted]), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
