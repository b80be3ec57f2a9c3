"""One rank of an injected job: averages or windows, and what befalls it as planned.

A rank that averages writes its value before each step into a file of its own, which
outlives its death. `check.py` compares them.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
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


def die():
  """Kills this process."""
  os.kill(os.getpid(), signal.SIGKILL)


def stop(pause):
  """Suspends this process for some seconds."""
  # Without the job's variables and pipes: it may outlive them.
  subprocess.Popen(
    ["sh", "-c", f"sleep {pause}; kill -CONT {os.getpid()}"],
    env={"PATH": os.environ["PATH"]},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.kill(os.getpid(), signal.SIGSTOP)


def fill():
  """Fills /dev/shm, which is one of this job alone."""
  with open("/dev/shm/full", "wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(1 << 16))
    except OSError:
      pass


def befall(fault):
  """Lets a fault of the plan happen, now or in another thread after some time."""

  def now():
    if fault["what"] == "kill":
      die()
    elif fault["what"] == "stop":
      stop(fault["pause"])
    else:
      fill()

  if fault["delay"] is None:
    return now()
  seconds = float(fault["delay"])

  def later():
    time.sleep(seconds)
    now()

  threading.Thread(target=later, daemon=True).start()


def segments():
  """The files in /dev/shm that this process has mapped."""
  maps = pathlib.Path("/proc/self/maps").read_text()
  return sorted(set(re.findall(r"/dev/shm/\S+", maps)))


class Faults:
  """What is to befall this rank."""

  def __init__(self, plan, rank):
    self._left = [f for f in plan["faults"] if f["rank"] == rank]

  def at(self, step):
    """Those of a step."""
    self._take(lambda fault: fault["step"] == step)

  def in_recovery(self):
    """Those of a recovery."""
    self._take(lambda fault: fault["when"] == "recovery", most=1)

  def _take(self, wanted, most=None):
    for fault in [f for f in self._left if wanted(f)][:most]:
      if fault["when"] == "recovery" and most is None:
        continue
      self._left.remove(fault)
      befall(fault)


def recover(step, faults):
  """Makes the world anew, and agrees on the step."""
  faults.in_recovery()
  while True:
    world = jfog.recover()
    try:
      return world, int(jfog.allreduce(jnp.int32(step), "max"))
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error):
        raise


def operation_of(plan, world):
  """What each rank does in a step: `(x, step) -> x`."""
  if plan["operation"] == "allreduce":
    return jax.jit(lambda x, t: jfog.allreduce(x + t, "mean"))
  graph = graph_of(plan["graph"], world.size)
  if plan["operation"] == "hierarchical" and jfog.is_homogeneous():
    machines = jfog.topology.fully_connected(jfog.machine_size())
    return jax.jit(
      lambda x, t: jfog.hierarchical_neighbor_allreduce(x + t, machines)
    )
  return jax.jit(lambda x, t: jfog.neighbor_allreduce(x, graph, t))


def average(folder, plan, world, faults):
  """Averages step by step, and records each value."""
  steps, length, me = plan["steps"], plan["length"], world.rank
  path = os.path.join(folder, f"{me}.npy")
  shape = (steps + 1, 2 + length)
  log = np.lib.format.open_memmap(path, "w+", np.float32, shape)
  log[:] = np.nan
  x = jnp.asarray(np.random.RandomState(me).randn(length), jnp.float32)
  operation, t = operation_of(plan, world), 0
  operation.lower(x, 0).compile()
  jfog.barrier()
  while True:
    try:
      while t < steps:
        faults.at(t)
        # The mark of a step goes last.
        log[t, 2:], log[t, 1] = np.asarray(x), world.size
        log[t, 0] = t
        x = operation(x, t).block_until_ready()
        t += 1
      break
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error) or plan["on_missing"] == "reweight":
        raise
      world, t = recover(t, faults)
      operation = operation_of(plan, world)
  log[t, 2:], log[t, 1] = np.asarray(x), world.size
  log[t, 0] = t
  if plan["on_missing"] == "error":
    check_new_world(plan, world, me, t)
  return world


def check_new_world(plan, world, me, step):
  """The last world averages on its own graph."""
  graph = graph_of(plan["graph"], world.size)
  row = graph[step].mixing_matrix[world.rank]
  launched = list(world.launched_ranks or range(world.size))
  try:
    y = jfog.neighbor_allreduce(
      jnp.full(plan["length"], float(me), jnp.float32), graph, step
    )
    expected = row @ np.array(launched, float)
    np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5)
  except jax.errors.JaxRuntimeError as error:  # killed after the last step
    if not jfog.is_rank_failure(error):
      raise


def windows(folder, plan, world, faults):
  """Puts, gets, accumulates and updates at its own pace.

  All elements of a value are equal and between the least and the greatest at the
  start: a torn one shows, and so does a weight that is lost or counted twice.
  """
  length, me, size = plan["length"], world.rank, world.size

  def uniform(x, what):
    x = np.asarray(x)
    within = -1e-5 <= x[0] <= size - 1 + 1e-5
    assert np.all(x == x[0]) and within, (what, x[0], x)

  def begin(world):
    graph = jfog.topology.ring(world.size)
    x = jnp.full(length, float(me), jnp.float32)
    win = jfog.win_create(x, graph)
    mass = jfog.win_create(x, graph, zero_init=True, associated_p=True)
    share = 1 / (1 + max(map(len, map(graph.out_neighbors, range(world.size)))))

    def step(win, mass, x, biased):
      win = jfog.win_put(win, x)
      x, win = jfog.win_update(win, x)
      y, win = jfog.win_update(jfog.win_get(win), x, expose=False)
      # A part for each out-neighbor, and the rest, also that of the missing.
      lost = jfog.win_missing(mass)
      out = jnp.zeros(world.size, bool)
      out = out.at[jnp.array(graph.out_neighbors(world.rank), int)].set(True)
      kept = 1 - share * jnp.sum(out & ~lost)
      mass = jfog.win_accumulate(mass, biased, dst_weights=share)
      biased, mass = jfog.win_update(
        mass, biased, self_weight=kept, src_weights=1, reset=True
      )
      return win, mass, x, y, biased, jfog.win_associated_p(mass)

    jfog.barrier()
    return jax.jit(step), win, mass, x, x

  t, held = 0, begin(world)
  while True:
    try:
      step, win, mass, x, biased = held
      while t < plan["steps"]:
        faults.at(t)
        win, mass, x, y, biased, p = step(win, mass, x, biased)
        uniform(x, "update")
        uniform(y, "get")
        uniform(biased / p, "push-sum")
        if t % 5 == me % 5:
          with jfog.win_mutex(win):
            jax.block_until_ready(jfog.win_put(win, x))
        t += 1
      break
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error) or plan["on_missing"] == "reweight":
        raise
      while True:
        world, t = recover(t, faults)
        try:
          held = begin(world)
          break
        except jax.errors.JaxRuntimeError as again:
          if not jfog.is_rank_failure(again):
            raise
  return world


def main(folder, plan):
  """Runs the plan of a job on this rank."""
  world: Any = jfog.init(
    on_missing=plan["on_missing"],
    timeout=plan["timeout"],
    local_size=plan["local_size"],
  )
  me = world.rank
  print("STARTED", os.getpid(), *segments(), flush=True)
  run = windows if plan["operation"] == "windows" else average
  world = run(folder, plan, world, Faults(plan, me))
  counted = jfog.diagnostics.counters()["missing"]
  launched = list(world.launched_ranks or range(world.size))
  print("DONE", json.dumps([me, launched, counted]), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
