"""A training under a schedule of failures, on ranks and in simulation.

As a program, `schedule.py FOLDER`, it is one rank: the ranks of `KILLS` end by SIGKILL
right before their step, when all others have ended the step before it as well. What
each rank has after each step lies in a file of its own.
"""

import functools
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jfog
from jfog import topology

SIZE, STEPS = 6, 18
SHAPES = {"w": (4,), "v": (20_000,)}  # the second one travels in chunks
GRAPHS = (topology.ring(SIZE), topology.one_peer_exponential(SIZE))
# For each graph, which are used in turn: a step, and who is not there from then on.
KILLS = ({6: (2,)}, {4: (0, 5)})


def alive():
  """The ranks that are there, by graph, step and rank."""
  there = np.ones((len(GRAPHS), STEPS, SIZE), bool)
  for g, kills in enumerate(KILLS):
    for step, ranks in kills.items():
      there[g, step:, list(ranks)] = False
      there[g + 1 :, :, list(ranks)] = False
  return there


def problem():
  """The data of all ranks, stacked: least squares in w, and a target of v."""
  random = np.random.RandomState(0)
  return {
    "a": random.randn(SIZE, 8, 4).astype(np.float32),
    "b": random.randn(SIZE, 8).astype(np.float32),
    "c": random.randn(SIZE, *SHAPES["v"]).astype(np.float32),
  }


def transformation(graph):
  """Adapt-then-combine with momentum."""
  return jfog.optimizers.adapt_then_combine(
    optax.sgd(0.05, momentum=0.9), graph
  )


def zeros():
  """The start of each rank."""
  return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def train_step(graph, params, state, data):
  """One step of one rank."""

  def loss(params):
    residual = data["a"] @ params["w"] - data["b"]
    distance = params["v"] - data["c"]
    return jnp.mean(residual**2) + jnp.sum(distance**2) / 2

  grads = jax.grad(loss)(params)
  updates, state = transformation(graph).update(grads, state, params)
  return optax.apply_updates(params, updates), state


def simulated():
  """All parameters after each step, by graph: dicts of arrays [step, rank, ...]."""
  data = problem()
  params = jax.tree.map(lambda x: jnp.stack([x] * SIZE), zeros())
  found = []
  for graph, there in zip(GRAPHS, alive(), strict=True):
    state = jax.vmap(transformation(graph).init)(params)

    def body(carry, there, graph=graph):
      step = functools.partial(train_step, graph)
      carry = jfog.simulate(step, SIZE, alive=there)(*carry, data)
      return carry, carry[0]

    (params, _), steps = jax.lax.scan(body, (params, state), jnp.asarray(there))
    found.append(jax.tree.map(np.asarray, steps))
  return found


def meet(folder, name, ranks, me):
  """Waits until these ranks have come here."""
  pathlib.Path(folder, f"{name}-{me}").touch()
  end = time.monotonic() + 60
  while not all(os.path.exists(f"{folder}/{name}-{r}") for r in ranks):
    if time.monotonic() > end:
      raise RuntimeError(f"not all of {ranks} have come to {name}")
    time.sleep(0.005)


def log_of(folder, g, rank, mode="r"):
  """The values of a rank after each step with a graph."""
  shape = (STEPS, sum(int(np.prod(shape)) for shape in SHAPES.values()))
  path = pathlib.Path(folder) / f"{g}-{rank}.npy"
  if mode == "r":
    return np.load(path)
  return np.lib.format.open_memmap(path, mode, np.float32, shape)


def main(folder):
  """Runs this rank to its end."""
  world = jfog.init(on_missing="reweight", timeout=100)
  me, there = world.rank, alive()
  data = jax.tree.map(lambda x: x[me], problem())
  params = zeros()
  for g, graph in enumerate(GRAPHS):
    log = log_of(folder, g, me, "w+")
    log[:] = np.nan
    step = jax.jit(functools.partial(train_step, graph))
    state = transformation(graph).init(params)
    step.lower(params, state, data).compile()
    before = there[g - 1, -1] if g else np.ones(SIZE, bool)
    for t in range(STEPS):
      if not np.array_equal(before, there[g, t]):
        meet(folder, f"{g}-{t}", np.flatnonzero(before), me)
        if not there[g, t, me]:
          os.kill(os.getpid(), signal.SIGKILL)
      before = there[g, t]
      params, state = jax.block_until_ready(step(params, state, data))
      log[t] = np.concatenate([params["w"], params["v"]])
  print("DONE", me, flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
