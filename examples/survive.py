"""Digits on six ranks: two are killed while they train, and one is replaced.

    jfog run --fault-tolerant -np 6 --spares 1 python examples/survive.py

Averages go on without a lost rank, in the very step in which it is lost. Every 20 steps
`jfog.recover` makes a world of the ranks that are left, in which a spare, as long as
there is one, has the place of a lost rank, and its state from a neighbor. The network
and the data are those of digits.py; each place has a sixth of the images.
"""

import argparse
import os
import signal
import time

import digits
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jfog

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVERY = 20  # steps, after which lost ranks are replaced


def arguments():
  """The parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument(
    "--kill",
    nargs="*",
    default=["4@80", "1@160"],
    metavar="RANK@STEP",
    help="which rank is killed before which step; --kill alone kills none",
  )
  parser.add_argument("--plot", default="survive.png")
  options = parser.parse_args()
  options.kill = dict(map(int, text.split("@")) for text in options.kill)
  return options


def make(size):
  """The optimizer, the step and the graph for a number of ranks."""
  graph = jfog.topology.exponential(size)
  tx = jfog.optimizers.adapt_then_combine(optax.sgd(0.1, 0.9), graph)

  @jax.jit
  def train_step(params, state, x, y):
    grads = jax.grad(digits.loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return tx, train_step, graph


accuracy = jax.jit(digits.accuracy)


def main():
  """Trains as one rank; rank 0 of the last world prints and draws."""
  options = arguments()
  # A spare comes this far when the job starts, and waits in jfog.init for a place.
  params, state, step, place = digits.init_params(seed=0), None, 0, None
  world, is_new = jfog.init(on_missing="reweight"), True
  shards = world.size
  history = {
    "seconds": np.zeros(options.steps),
    "present": np.zeros(options.steps, np.int64),  # a bit for each place
    "accuracy": np.full(options.steps, np.nan),
  }
  begin = time.perf_counter()
  while True:
    try:
      if is_new:
        places = world.launched_ranks or tuple(range(world.size))
        tx, train_step, graph = make(world.size)
        state = tx.init(params) if state is None else state
        step, shards, params, state, history = jfog.share_state(
          (step, shards, params, state, history), graph
        )
        # Ranks may come from neighboring steps.
        step = int(jfog.allreduce(jnp.int32(step), "max"))
        state = state._replace(step=jnp.int32(step))
        if place is None:  # which a rank keeps for good
          place = places[world.rank]
          train, test = digits.load(shards, "even", seed=0)
          x, y = train.x[place], train.y[place]
          random = np.random.RandomState((place, step))
        is_new = False
      if step == options.steps:
        mean = float(jfog.allreduce(accuracy(params, test)))
        break
      if step % EVERY == 0 and jfog.missing_ranks():
        world, is_new = jfog.recover(), True
        continue
      if options.kill.get(place) == step:
        os.kill(os.getpid(), signal.SIGKILL)
      batch = random.choice(len(y), digits.BATCH)
      done = jax.block_until_ready(
        train_step(params, state, x[batch], y[batch])
      )
    except jax.errors.JaxRuntimeError as error:
      if not jfog.is_rank_failure(error):
        raise
      world, is_new = jfog.recover(), True  # another rank has called it
      continue
    params, state = done
    gone = jfog.missing_ranks()
    history["present"][step] = sum(
      1 << place for rank, place in enumerate(places) if rank not in gone
    )
    if step % 10 == 9:
      history["accuracy"][step] = accuracy(params, test)
    history["seconds"][step] = time.perf_counter() - begin
    begin = time.perf_counter()
    step += 1
  if world.rank == 0:
    report(options, shards, world.size, history, mean)


def report(options, shards, left, history, mean):
  """Prints who was lost and came back, accuracy and goodput, and draws a curve."""
  seconds = history["seconds"]
  present = history["present"][:, None] >> np.arange(shards) & 1
  changes = np.diff(present, axis=0, prepend=1)
  usual, waited = np.median(seconds), 0.0
  for step, place in np.argwhere(changes):
    took = seconds[max(0, step - 1) : step + 2].max()
    waited += max(0.0, took - usual)
    what = "is lost" if changes[step, place] < 0 else "is back"
    print(f"rank {place} {what} at step {step}, which took {took:.2f} s")
  # The part of the time, but for the first step, which compiles, that is not spent
  # on waits for lost ranks, and on new worlds and their programs.
  goodput = 1 - waited / seconds[1:].sum()
  print(
    f"{left} of {shards} ranks are left: accuracy {mean:.1%}, "
    f"goodput {goodput:.1%} in {options.steps} steps"
  )
  figure, axes = plt.subplots(figsize=(6, 3.4))
  steps = np.flatnonzero(np.isfinite(history["accuracy"]))
  axes.plot(steps + 1, history["accuracy"][steps], ".-", label="one rank")
  axes.plot(present.mean(axis=1), "k:", lw=1, label="ranks that train")
  for step, place in np.argwhere(changes):
    color, what, height = "tab:red", "is killed", 0.05
    if changes[step, place] > 0:
      color, what, height = "tab:green", "is replaced", 0.15
    axes.axvline(step, color=color, ls="--", lw=1)
    axes.text(step, height, f" {place} {what}", color=color)
  axes.set(xlabel="step", ylabel="accuracy on test images", ylim=(0, 1.05))
  axes.legend(loc="center right")
  axes.grid(alpha=0.3)
  figure.savefig(options.plot, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
  main()
