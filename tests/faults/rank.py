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


class Job:
  """The place of this rank: plan, world, phase, step, and faults to come."""

  def __init__(self, folder, plan):
    self.folder, self.plan = folder, plan
    self.world: Any = jfog.init(
      on_missing=plan["on_missing"],
      timeout=plan["timeout"],
      local_size=plan["local_size"],
    )
    self.me = self.world.rank
    self.phase, self.step = 0, 0
    self._faults = [
      (k, fault)
      for k, phase in enumerate(plan["phases"])
      for fault in phase["faults"]
      if fault["rank"] == self.me
    ]
    self.windows = None

  @property
  def current(self):
    """The phase."""
    return self.plan["phases"][self.phase]

  def befall(self):
    """Lets the faults of this step happen."""
    here = (self.phase, self.step)
    for each in list(self._faults):
      k, fault = each
      if (k, fault["step"]) == here and fault["when"] != "recovery":
        self._faults.remove(each)
        befall(fault)

  def recover(self):
    """Makes the world anew, and agrees on the phase and the step."""
    for each in list(self._faults):
      if each[1]["when"] == "recovery" and each[0] <= self.phase:
        self._faults.remove(each)
        befall(each[1])
    steps = self.plan["steps"] + 1
    while True:
      self.world = jfog.recover()
      try:
        place = jnp.int32(self.phase * steps + self.step)
        place = int(jfog.allreduce(place, "max"))
        self.open_windows()
        break
      except jax.errors.JaxRuntimeError as error:
        if not jfog.is_rank_failure(error):
          raise
    self.phase, self.step = divmod(place, steps)

  def open_windows(self):
    """The windows of all phases, since a later one may come without some rank."""
    for phase in self.plan["phases"]:
      if phase["operation"] == "windows":
        self.windows = Windows(self.world, self.me, phase["length"])
        return

  def run(self):
    """Goes through all phases."""
    self.open_windows()
    while True:
      try:
        if self.phase == len(self.plan["phases"]):
          # A failure in what runs behind the last average, as a check of its graph.
          jax.effects_barrier()
          return
        run = windows if self.current["operation"] == "windows" else average
        run(self)
        self.phase, self.step = self.phase + 1, 0
      except jax.errors.JaxRuntimeError as error:
        goes_on = self.plan["on_missing"] == "reweight"
        if goes_on or not jfog.is_rank_failure(error):
          raise
        self.recover()


def operation_of(phase, world, by_peers):
  """The function of a step, `(x, step) -> x`."""
  if by_peers and phase["operation"] == "average":
    return average_of_peers(graph_of(phase["graph"], world.size), world.rank)
  if phase["operation"] == "allreduce":
    return jax.jit(lambda x, t: jfog.allreduce(x + t, "mean"))
  graph = graph_of(phase["graph"], world.size)
  if phase["operation"] == "hierarchical" and jfog.is_homogeneous():
    machines = jfog.topology.fully_connected(jfog.machine_size())
    return jax.jit(
      lambda x, t: jfog.hierarchical_neighbor_allreduce(x + t, machines)
    )
  return jax.jit(lambda x, t: jfog.neighbor_allreduce(x, graph, t))


def average_of_peers(graph, me):
  """A step of a graph whose edges each rank names for itself."""

  def step(x, t):
    at = graph[t]
    row = at.mixing_matrix[me]
    sources = {source: row[source] for source in at.in_neighbors(me)}
    peers = jfog.Peers(row[me], sources, at.out_neighbors(me))
    return jfog.neighbor_allreduce(x, peers)

  return step


def average(job):
  """Averages step by step, and records each value."""
  steps, length = job.plan["steps"], job.current["length"]
  path = os.path.join(job.folder, f"{job.phase}-{job.me}.npy")
  shape = (steps + 1, 2 + length)
  if not os.path.exists(path):
    # Whole or not there: this rank may be killed meanwhile.
    np.save(path + ".part.npy", np.full(shape, np.nan, np.float32))
    os.replace(path + ".part.npy", path)
  log = np.lib.format.open_memmap(path, "r+")
  x = jnp.asarray(np.random.RandomState(job.me).randn(length), jnp.float32)
  if job.step and log[job.step - 1, 0] == job.step - 1:
    x = jnp.asarray(log[job.step - 1, 2:])  # goes on from its own value
  operation = operation_of(job.current, job.world, job.plan["by_peers"])
  if isinstance(operation, jax.stages.Wrapped):
    operation.lower(x, 0).compile()

  def record():
    # The mark of a step goes last.
    log[job.step, 2:], log[job.step, 1] = np.asarray(x), job.world.size
    log[job.step, 0] = job.step

  while job.step < steps:
    job.befall()
    record()
    x = operation(x, job.step).block_until_ready()
    job.step += 1
  record()
  if job.plan["on_missing"] == "error":
    check_new_world(job)


def check_new_world(job):
  """The world of now averages on its own graph."""
  world = job.world
  graph = graph_of(job.current["graph"], world.size)
  row = graph[job.step].mixing_matrix[world.rank]
  launched = list(world.launched_ranks or range(world.size))
  y = jfog.neighbor_allreduce(
    jnp.full(job.current["length"], float(job.me)), graph, job.step
  )
  expected = row @ np.array(launched, float)
  np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5)


class Windows:
  """A step on windows, and their values."""

  def __init__(self, world, me, length):
    graph = jfog.topology.ring(world.size)
    self.x = self.biased = jnp.full(length, float(me), jnp.float32)
    self.win = jfog.win_create(self.x, graph)
    self.mass = jfog.win_create(
      self.x, graph, zero_init=True, associated_p=True
    )
    ends = graph.out_neighbors(world.rank)
    # A quarter for all of them: a rank may make all of its 120 steps before the
    # others go on, in which its weight does not sink to zero in float32.
    share = 0.25 / max(
      1, *(len(graph.out_neighbors(r)) for r in range(world.size))
    )

    def step(win, mass, x, biased):
      win = jfog.win_put(win, x)
      x, win = jfog.win_update(win, x)
      y, win = jfog.win_update(jfog.win_get(win), x, expose=False)
      # A part for each out-neighbor; the rest stays, and that of the missing.
      lost = jfog.win_missing(mass)
      kept = 1 - share * sum(jnp.where(lost[r], 0, 1) for r in ends)
      mass = jfog.win_accumulate(mass, biased, dst_weights=share)
      biased, mass = jfog.win_update(
        mass, biased, self_weight=kept, src_weights=1, reset=True
      )
      return win, mass, x, y, biased, jfog.win_associated_p(mass)

    self._step = jax.jit(step)
    self._most = max(world.launched_ranks or range(world.size))

  def step(self, locks):
    """Puts, gets, accumulates and updates at its own pace.

    All elements of a value are equal and between the least and the greatest at the
    start: a torn one shows, and so does a weight that is lost or counted twice.
    """
    self.win, self.mass, self.x, y, self.biased, p = self._step(
      self.win, self.mass, self.x, self.biased
    )
    for what, x in (("put", self.x), ("get", y), ("sum", self.biased / p)):
      x = np.asarray(x)
      within = -1e-4 <= x[0] <= self._most + 1e-4
      assert np.all(x == x[0]) and within, (what, np.unique(x)[:5], p)
    if locks:
      with jfog.win_mutex(self.win):
        self.win = jax.block_until_ready(jfog.win_put(self.win, self.x))


def windows(job):
  """Steps on windows."""
  while job.step < job.plan["steps"]:
    job.befall()
    job.windows.step(locks=job.step % 5 == job.me % 5)
    job.step += 1


def main(folder, plan):
  """Runs the plan of a job on this rank."""
  job = Job(folder, plan)
  print("STARTED", os.getpid(), *segments(), flush=True)
  job.run()
  counted = jfog.diagnostics.counters()["missing"]
  launched = list(job.world.launched_ranks or range(job.world.size))
  print("DONE", json.dumps([job.me, launched, counted]), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
