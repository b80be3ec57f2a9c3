"""Age of what ranks read: a put at the start of an update against one at its end.

Run it as `jfog run -np 2 --no-tag-output python benchmarks/freshness.py`. Each rank
works for 2 to 6 ms, as for a gradient, and reads what its neighbor has put. A rank's
value is the number of its steps: a read is stale if it is below the reader's own.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import jfog

STEPS = 300
ELEMENTS = 100_000


def ages(put_first, in_step):
  """The reader's step less the value that it reads, for each step."""
  world = jfog.init()
  graph = jfog.topology.ring(world.size, "right")
  read = jax.jit(
    lambda win, x: jfog.win_update(win, x, self_weight=0.0, src_weights=1.0)
  )
  put = jax.jit(jfog.win_put)
  rng = np.random.default_rng(world.rank)
  x = jnp.zeros(ELEMENTS)
  win = put(jfog.win_create(x, graph), x)
  _, win = read(win, x)
  jax.block_until_ready(win)
  jfog.barrier()
  found = []
  for step in range(STEPS):
    if in_step:
      jfog.barrier()
    time.sleep(rng.uniform(0.002, 0.006))  # the gradient
    if put_first:
      win = put(win, x)
    got, win = read(win, x)
    found.append(step - float(got[0]))
    x = x + 1
    if not put_first:
      win = put(win, x)
  jax.block_until_ready(win)
  jfog.barrier()
  jfog.win_free(win)
  return np.asarray(jfog.allgather(jnp.array(found)))


def main():
  """Prints the share of stale reads, of all ranks."""
  for in_step, pace in (
    (True, "a barrier in each step"),
    (False, "no barrier"),
  ):
    for put_first, place in ((True, "start"), (False, "end")):
      stale = np.mean(ages(put_first, in_step) > 0)
      if jfog.rank() == 0:
        print(f"{pace}, put at the {place}: {stale:.1%} of reads stale")


if __name__ == "__main__":
  main()
