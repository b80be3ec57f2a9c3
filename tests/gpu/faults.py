"""Failures on a GPU: the error's text, the time to it, and whether ranks go on.

Stage 8, the last one: it may leave a GPU stuck. Each scene is a job of its own
and every rank records its own facts.
"""

import os
import signal
import sys
import time

import ranks

LIMIT = 6.0  # seconds that an operation waits
LEAVES = 1000


def error_of(call, jax, jfog, jnp):
  """What goes wrong in a call, or in the next one on the communicator."""
  for each in (call, lambda: jfog.allreduce(jnp.ones(2))):
    try:
      jax.block_until_ready(each())
    except jax.errors.JaxRuntimeError as error:
      return str(error)
  return "nothing"


def play(scene):
  """Plays a scene on this rank; returns the exit code."""
  world = ranks.World(timeout=LIMIT)
  import jax
  import jax.numpy as jnp

  import jfog

  ring, rank = jfog.topology.ring(world.size), world.rank
  x = jnp.ones(LEAVES)
  jax.block_until_ready(jfog.neighbor_allreduce(x, ring))
  world.Barrier()
  begin = time.perf_counter()

  def average(count=LEAVES):
    return jfog.neighbor_allreduce(jnp.ones(count), ring)

  def measure(call):
    text = error_of(call, jax, jfog, jnp)
    seconds = time.perf_counter() - begin
    after = float(jnp.ones(1000).sum())  # the GPU computes again
    ranks.record(
      f"{scene}, rank {rank}",
      outcome="measured",
      error=text[:600],
      after_s=seconds,
      computes=after == 1000.0,
    )
    return text

  if scene == "other operations":
    wanted = "FAILED_PRECONDITION"
    peer = 1 - rank
    call = average if rank == 0 else lambda: jfog.pair_gossip(x, peer)
    text = measure(call)
  elif scene == "other shapes":
    wanted = "FAILED_PRECONDITION"
    text = measure(lambda: average(LEAVES + rank))
  elif scene == "a rank that does not come":
    wanted = "DEADLINE_EXCEEDED"
    text = wanted
    if rank == 0:
      text = measure(average)
    else:
      time.sleep(2 * LIMIT)
  elif scene == "a rank that is killed":
    wanted = "jfog:"
    if rank == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    text = measure(average)
    sys.stdout.flush()
    os._exit(0 if wanted in text else 1)  # MPI has lost a rank
  else:
    raise ValueError(f"no scene {scene!r}")
  # A new world in the same processes.
  world.Barrier()
  world.reopen()
  y = float(jfog.allreduce(jnp.float32(rank + 1), "sum"))
  ranks.record(
    f"{scene}, rank {rank}: a new world",
    outcome="passed" if y == 3.0 else "failed",
    errors={"sum": str(y)},
  )
  return 0 if wanted in text and y == 3.0 else 1


if __name__ == "__main__":
  sys.exit(play(sys.argv[1]))
