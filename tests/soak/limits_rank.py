"""One rank of a job at a limit: of memory, of numbers, of processes that fork."""

import gc
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

from soak import fault_rank

GROWS_BY = 24.0  # MB that a process may grow by after it has warmed up
NEW_THREADS = 3  # that the pools of XLA may start as late as that
CHILD = """
import sys, jfog
try:
  jfog.init({arguments})
except RuntimeError as error:
  print("REFUSED", error)
  sys.exit(7)
import jax.numpy as jnp
print("SUM", jfog.allreduce(jnp.ones(1), "sum"))
"""


class Rank(fault_rank.Rank):
  """The limits, each of them a method."""

  def __init__(self, timeout: float):
    super().__init__("", -1, timeout)

  def growth(self, seconds: str) -> None:
    """Operations of all kinds for some time; then nothing may have grown."""
    import jfog

    self.start()
    win = jfog.win_create(self.full(1000, 1.0), self.graph)
    x = self.full(20_000, 1.0)

    def work(end):
      count = 0
      while time.monotonic() < end:
        for _ in range(20):
          self.check(1 + count % 3)  # a few shapes, each compiled once
          handle = jfog.allreduce_start(x)
          other = jfog.neighbor_allreduce_start(x, self.graph)
          jfog.wait(other)
          jfog.wait(handle)
          jfog.win_put(win, x[:1000])
          self.block(jfog.allgather(x[:100]))
          count += 6
        # All ranks go on, or none does.
        flag = self.full(1, float(time.monotonic() < end))
        if float(jfog.allreduce(flag, "min")[0]) == 0:
          break
      return count

    start = time.monotonic()
    work(start + float(seconds) / 3)
    before = _usage()
    count = work(start + float(seconds))
    after = _usage()
    fault_rank.say(f"OPERATIONS {count} FROM {before} TO {after}")
    if after[1] > before[1]:
      raise AssertionError(f"{after[1]} descriptors instead of {before[1]}")
    if after[2] > before[2] + NEW_THREADS:
      raise AssertionError(f"{after[2]} threads instead of {before[2]}")
    if after[0] - before[0] > GROWS_BY:
      raise AssertionError(f"{after[0]:.0f} MB instead of {before[0]:.0f} MB")

  def leaves(self, count: str) -> None:
    """One average of many leaves."""
    self.start()
    tree = [self.full(3, float(self.rank + k % 7)) for k in range(int(count))]
    out = self.average(tree)
    truth = self.graph.mixing_matrix[self.rank] @ range(self.size)
    for k, y in enumerate(out):
      if abs(float(y[0]) - truth - k % 7) > 1e-4:
        raise AssertionError(f"{fault_rank.WRONG}: leaf {k} is {y[0]}")

  def handles(self, count: str) -> None:
    """Many operations in flight; ranks wait for them in other orders."""
    import jfog

    self.start()
    n = int(count)
    handles = [
      jfog.allreduce_start(self.full(3, float(self.rank + k % 7)))
      for k in range(n)
    ]
    order = np.random.default_rng(self.rank).permutation(n)
    for k in order:
      y = jfog.wait(handles[k])
      if abs(float(y[0]) - (self.size - 1) / 2 - k % 7) > 1e-4:
        raise AssertionError(f"{fault_rank.WRONG}: operation {k} is {y[0]}")

  def address_space(self, elements: str) -> None:
    """An operation that needs more memory than the last rank may have."""
    import jax

    import jfog

    self.start()
    self.check()
    x = self.block(self.full(int(elements), 1.0))
    # XLA ends a process that has no memory to compile.
    gather = jax.jit(jfog.allgather).lower(x).compile()
    if self.rank == self.size - 1:
      limit = _pages()[0] * os.sysconf("SC_PAGESIZE") + x.nbytes // 2
      resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
      self.block(gather(x))
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
      fault_rank.say(f"REFUSED {error}")
      raise

  def elements(self, count: str) -> None:
    """One leaf of many elements."""
    import jax.numpy as jnp

    import jfog

    self.start()
    x = jnp.full(int(count), 1 + self.rank, jnp.int8)
    y = self.block(jfog.allreduce(x, "sum"))
    truth = sum(range(1, self.size + 1))
    if not bool((y == truth).all()):
      raise AssertionError(f"{fault_rank.WRONG} in {count} elements")

  def fork(self) -> None:
    """A forked child is not the rank: its operations are refused, it ends at once."""
    import warnings

    import jax

    import jfog

    self.start()
    self.check()
    warnings.simplefilter("ignore")  # JAX warns of a fork with threads
    child = os.fork()
    if child == 0:
      try:
        jfog.barrier()
        jax.effects_barrier()
        fault_rank.say("THE CHILD ACTED AS THE RANK")
      except Exception as error:
        fault_rank.say(f"REFUSED {error}")
      sys.exit(0)
    end = time.monotonic() + 10
    while os.waitpid(child, os.WNOHANG)[0] == 0:
      if time.monotonic() > end:
        os.kill(child, 9)
        raise AssertionError("the forked child did not end")
      time.sleep(0.05)
    self.go_on(5)

  def subprocess(self) -> None:
    """A program that the rank starts is not the rank; a world of its own is fine."""
    self.start()
    self.check()
    for arguments, code in (("", 7), ("backend='single'", 0)):
      done = subprocess.run(
        [sys.executable, "-c", CHILD.format(arguments=arguments)],
        capture_output=True,
        text=True,
        timeout=60,
      )
      fault_rank.say(
        f"CHILD {done.returncode} {done.stdout} {done.stderr[-500:]}"
      )
      if done.returncode != code:
        raise AssertionError(f"the child of init({arguments}) ended otherwise")
    self.go_on(5)

  def spawn(self) -> None:
    """Spawned workers, as of a data loader, compute beside the operations."""
    self.start()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
      squares = pool.map_async(_square, range(20))
      self.go_on(5)
      if squares.get(60) != [k * k for k in range(20)]:
        raise AssertionError(fault_rank.WRONG)
    self.go_on(5)

  def loop(self) -> None:
    """Operations until a signal."""
    self.start()
    self.check()
    fault_rank.say("LOOPS")
    while True:
      self.check()
      time.sleep(0.01)


def _square(k: int) -> int:
  return k * k


def _pages() -> list[int]:
  """Pages of the address space, then the resident ones, and others."""
  return [int(n) for n in pathlib.Path("/proc/self/statm").read_text().split()]


def _usage() -> tuple[float, int, int]:
  """Resident memory in MB, open descriptors and threads."""
  gc.collect()
  return (
    round(_pages()[1] * os.sysconf("SC_PAGESIZE") / 1e6, 1),
    len(os.listdir("/proc/self/fd")),
    len(os.listdir("/proc/self/task")),
  )


if __name__ == "__main__":
  name, timeout, *arguments = sys.argv[1:]
  fault_rank.note_process()
  getattr(Rank(float(timeout)), name)(*arguments)
  fault_rank.say("DONE")
