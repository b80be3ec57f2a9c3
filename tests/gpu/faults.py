"""Failures on a GPU: the error's text, the time to it, and whether ranks go on.

Stage 8, the last one: it may leave a GPU stuck. Every rank records its own facts.
`faults.py SCENE ...` plays scenes one after the other, each in a new world.
"""

import os
import signal
import sys
import time

import ranks

LIMIT = 4.0  # seconds that an operation waits
LEAVES = 1000
STEPS = 100 if ranks.REHEARSAL else 5000

world = ranks.World(timeout=LIMIT)

import jax  # noqa: E402  (after the rank has its GPU)
import jax.numpy as jnp  # noqa: E402

import jfog  # noqa: E402

RING = jfog.topology.ring(world.size)
RANK = world.rank


def average(count=LEAVES):
  """One exchange."""
  return jfog.neighbor_allreduce(jnp.ones(count), RING)


@jax.jit
def many(x, steps):
  """So many exchanges in one program."""

  def body(_, x):
    return jfog.neighbor_allreduce(jnp.sin(x), RING)

  return jax.lax.fori_loop(0, steps, body, x)


def error_of(call):
  """The error of a call, or of the next one on the communicator."""
  for each in (call, lambda: jfog.allreduce(jnp.ones(2))):
    try:
      jax.block_until_ready(each())
    except jax.errors.JaxRuntimeError as error:
      return str(error)
  return "nothing"


def measure(scene, call, wanted):
  """Records the error of a call; returns whether it is the one wanted."""
  begin = time.perf_counter()
  text = error_of(call)
  seconds = time.perf_counter() - begin
  after = float(jnp.ones(1000).sum())  # the GPU computes again
  case, facts = f"{scene}, rank {RANK}", {"error": text[:600]}
  facts |= {"after_s": seconds, "computes": after == 1000.0}
  if wanted in text and facts["computes"]:
    ranks.record(case, outcome="measured", **facts)
    return True
  ranks.record(case, outcome="failed", errors={f"wanted {wanted}": text[:600]})
  return False


def other_operations(scene):
  """Two exchanges of one size."""
  peer = 1 - RANK
  gossip = lambda: jfog.pair_gossip(jnp.ones(LEAVES), peer)  # noqa: E731
  return measure(scene, gossip if RANK else average, "FAILED_PRECONDITION")


def other_shapes(scene):
  """A message that is longer than the room for it."""
  return measure(scene, lambda: average(LEAVES + RANK), "FAILED_PRECONDITION")


def a_rank_that_does_not_come(scene):
  """Rank 0 waits for rank 1, which sleeps."""
  if RANK == 0:
    return measure(scene, average, "DEADLINE_EXCEEDED")
  time.sleep(2 * LIMIT)
  return True


def a_rank_that_stops_in_a_long_program(scene):
  """More steps than the device's queue holds: the host waits in a call."""
  if RANK == 0:
    return measure(
      scene, lambda: many(jnp.ones(LEAVES), STEPS), "DEADLINE_EXCEEDED"
    )
  jax.block_until_ready(many(jnp.ones(LEAVES), STEPS // 10))
  time.sleep(3 * LIMIT)
  return True


def a_rank_that_is_killed(scene):
  """The job has to be one that outlives a rank; nothing comes after it."""
  if RANK == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  found = measure(scene, average, "jfog:")
  sys.stdout.flush()
  os._exit(0 if found else 1)  # MPI has lost a rank


# And whether ranks exchange before it.
SCENES = {
  "other operations": (other_operations, True),
  "other shapes": (other_shapes, True),
  "a first exchange without a peer": (a_rank_that_does_not_come, False),
  "a rank that does not come": (a_rank_that_does_not_come, True),
  "a rank that stops in a long program": (
    a_rank_that_stops_in_a_long_program,
    True,
  ),
  "a rank that is killed": (a_rank_that_is_killed, True),
}


def play(scene):
  """Plays a scene and makes a new world; returns whether all went as wanted."""
  run, exchanges = SCENES[scene]
  if exchanges:
    jax.block_until_ready((average(), many(jnp.ones(LEAVES), 2)))
  world.Barrier()
  found = run(scene)
  world.Barrier()
  world.reopen()
  total = float(jfog.allreduce(jnp.float32(RANK + 1), "sum"))
  case = f"{scene}, rank {RANK}: a new world"
  if total == 3.0:
    ranks.record(case, outcome="passed")
  else:
    wrong = f"the sum of 1 and 2 came out as {total}"
    ranks.record(case, outcome="failed", errors={f"rank {RANK}": wrong})
  return found and total == 3.0


if __name__ == "__main__":
  sys.exit(0 if all([play(scene) for scene in sys.argv[1:]]) else 1)
