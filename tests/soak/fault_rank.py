"""One rank of a job with a fault: which one, at which moment, on which rank."""

import atexit
import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

FELL = "FELL"  # before the time of the fault, in the output
WRONG = "WRONG NUMBER"
LARGE = 3_000_000  # elements
PAUSE_OF_START = 30.0  # seconds; a start waits for 15, and others may come late


def rank_in_job() -> int:
  """The rank, before `jfog.init`."""
  names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
  return int(next(os.environ[name] for name in names if name in os.environ))


def note_process() -> None:
  """Writes the process id for the signals of the soak."""
  folder = pathlib.Path(os.environ["JFOG_SOAK_FOLDER"], "own")
  (folder / f"pid-{rank_in_job()}").write_text(str(os.getpid()))


def say(text: str) -> None:
  """Writes a line at once and in one piece."""
  os.write(1, f"{text}\n".encode())


def fall(fault: str, pause: float) -> None:
  """The fault, in this thread.

  Args:
    fault: its name.
    pause: the seconds of a suspension.
  """
  say(f"{FELL} {time.time()}")
  if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  if fault == "stop":
    # Without the variable that marks the job's processes: it may outlive them.
    command = f"sleep {pause}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", command], env={"PATH": os.environ["PATH"]})
    os.kill(os.getpid(), signal.SIGSTOP)
  if fault == "exception":
    raise RuntimeError("injected by the soak")
  if fault == "os._exit(0)":
    os._exit(0)
  if fault == "os._exit(3)":
    os._exit(3)
  if fault == "sys.exit(0)":
    sys.exit(0)


class Rank:
  """The moments: what each rank does, and when the victim falls."""

  def __init__(self, fault: str, victim: int, timeout: float):
    self.fault, self.timeout, self.pause = fault, timeout, 2.5 * timeout
    self.rank = rank_in_job()
    self.is_victim = self.rank == victim
    self.is_asynchronous = fault in ("exception", "sys.exit(0)")

  def fall(self):
    fall(self.fault, self.pause)

  def fall_after(self, seconds):
    """The victim falls while its main thread is elsewhere."""
    if self.is_victim and not self.is_asynchronous:

      def later():
        time.sleep(seconds)
        self.fall()

      threading.Thread(target=later, daemon=True).start()

  def fall_here(self):
    """The victim falls in its main thread, with an operation dispatched."""
    if self.is_victim and self.is_asynchronous:
      self.fall()

  def start(self):
    """Opens the world; the programs are compiled and checked once."""
    import jax
    import jax.numpy as jnp

    import jfog

    jax.config.update("jax_num_cpu_devices", 1)
    self.world = jfog.init(timeout=self.timeout)
    self.size = self.world.size
    self.graph = jfog.topology.ring(self.size)
    self.average = jax.jit(lambda x: jfog.neighbor_allreduce(x, self.graph))
    self.block, self.full = jax.block_until_ready, jnp.full

  def check(self, count=3):
    """One exchange with a known result."""
    y = self.average(self.full(count, float(self.rank)))
    truth = self.graph.mixing_matrix[self.rank] @ range(self.size)
    if abs(float(y[0]) - truth) > 1e-5 or abs(float(y[-1]) - truth) > 1e-5:
      raise AssertionError(f"{WRONG}: {y[0]} instead of {truth}")

  def go_on(self, count=60):
    """Further operations, in which the others come to need the victim."""
    import jfog

    for _ in range(count):
      self.check()
      jfog.barrier()
      time.sleep(0.01)
    jfog.allreduce(self.full(3, 1.0)).block_until_ready()

  # The moments.

  def before_init(self):
    self.pause = PAUSE_OF_START
    if self.is_victim:
      self.fall()
    self.start()
    self.go_on(3)

  def in_init(self):
    self.pause = PAUSE_OF_START
    if not self.is_victim:
      time.sleep(1.0)
    elif self.is_asynchronous:
      from jfog.runtime import _bootstrap

      def check(*arguments):
        del arguments
        self.fall()

      _bootstrap._check_launched_size = check
    else:
      self.fall_after(0.3)
    self.start()
    self.go_on(3)

  def between(self):
    self.start()
    self.go_on(3)
    if self.is_victim:
      self.fall()
    self.go_on()

  def small_exchange(self):
    self.start()
    self.check()
    if not self.is_victim:
      time.sleep(0.5)  # it waits in the exchange meanwhile
    self.fall_after(0.2)
    y = self.average(self.full(3, 1.0))
    self.fall_here()
    self.block(y)
    self.go_on()

  def large_exchange(self):
    self.start()
    self.check(LARGE)
    self.fall_after(0.1)
    for k in range(100):
      y = self.average(self.full(LARGE, 1.0))
      if k == 3:
        self.fall_here()
      self.block(y)
    self.go_on()

  def collective(self):
    import jfog

    self.start()
    self.check()
    self.fall_after(0.1)
    for k in range(100):
      x = self.full(1 + 1000 * (k % 3), 1.0)
      y = [jfog.allreduce(x), jfog.allgather(x), jfog.broadcast(x, k % 2)]
      jfog.barrier()
      if k == 3:
        self.fall_here()
      self.block(y)
    self.go_on()

  def window(self):
    import jfog

    self.start()
    x = self.full(100_000, 1.0)
    win = jfog.win_create(x, self.graph)
    self.check()
    self.fall_after(0.1)
    for k in range(200):
      win = jfog.win_get(jfog.win_accumulate(win, x, dst_weights=0.25))
      x, win = jfog.win_update(win, x)
      if k == 3:
        self.fall_here()
    self.block(x)
    self.go_on()

  def mutex(self):
    import jfog

    self.start()
    win = jfog.win_create(self.full(3, 1.0), self.graph)
    self.check()
    if not self.is_victim:
      time.sleep(0.3)
    with jfog.win_mutex(win):
      if self.is_victim:
        self.fall()
    self.go_on()

  def handle(self):
    import jfog

    self.start()
    self.check()
    handles = [
      jfog.neighbor_allreduce_start(self.full(n, 1.0), self.graph)
      for n in (3, 1_000_000, 70_000)
    ]
    if self.is_victim:
      self.fall()
    for handle in reversed(handles):
      jfog.wait(handle)
    self.go_on()

  def finalize(self):
    self.start()
    self.go_on(3)

  def before_finalize(self):
    self.start()
    self.go_on(3)
    if self.is_victim:
      # Registered after jfog's own hook, and so called before it.
      atexit.register(self.fall)


def main(moment: str, fault: str, victim: int, timeout: float) -> None:
  """Runs this rank."""
  rank = Rank(fault, victim, timeout)
  note_process()
  if moment == "finalize" and rank.is_victim:
    # Registered before jfog's own hook, and so called behind it.
    atexit.register(functools.partial(rank.fall))
  getattr(rank, moment.replace(" ", "_"))()
  say("DONE")


if __name__ == "__main__":
  moment, fault, victim, timeout = sys.argv[1:]
  main(moment, fault, int(victim), float(timeout))
