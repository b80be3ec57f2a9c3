"""Cost of the timeline: an average of 1 kB in a jitted loop, timeline off and on.

Run it as `jfog run -np 2 python benchmarks/timeline.py`; against another version of
jfog, run it in both environments in turn, and compare the times with the timeline off.
"""

import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

import jfog

AVERAGES = 200  # in a loop
LOOPS = 50  # in a turn
TURNS = 10


def main():
  """Measures in turns, and prints microseconds for each average."""
  world = jfog.init()
  graph = jfog.topology.ring(world.size)

  @jax.jit
  def loop(x):
    return jax.lax.fori_loop(
      0, AVERAGES, lambda _, x: jfog.neighbor_allreduce(x, graph), x
    )

  x = jax.block_until_ready(loop(jnp.ones(256)))
  path = pathlib.Path(tempfile.gettempdir(), "jfog-benchmark-timeline.json")

  def turn():
    times = []
    for _ in range(LOOPS):
      start = time.perf_counter()
      jax.block_until_ready(loop(x))
      times.append((time.perf_counter() - start) / AVERAGES * 1e6)
    return times

  found = {"off": [], "on": []}
  for _ in range(TURNS):
    jfog.barrier()
    found["off"] += turn()
    with jfog.timeline(path):
      found["on"] += turn()
  if world.rank == 0:
    for name, times in found.items():
      median = statistics.median(times)
      print(f"{name}: fastest {min(times):.3f} us, median {median:.3f} us")
    # Begin, post, sum, end, and two for each neighbor.
    events = 4 + 2 * len(graph.in_neighbors(0))
    cost = (min(found["on"]) - min(found["off"])) / events
    print(f"{events} events, {cost * 1e3:.0f} ns each")
    path.unlink()


if __name__ == "__main__":
  main()
