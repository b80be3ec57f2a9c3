"""Digits on six ranks, of which two are killed while they train; the others go on.

    jfog run --fault-tolerant -np 6 python examples/survive.py

Averages go on without a lost rank, in the very step in which it is lost. At the end
`jfog.recover` makes a world of the ranks that are left, for the mean accuracy. The
network and the data are those of digits.py; each rank has a sixth of the images.
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


def main():
  """Trains as one rank; the first rank that is left prints and draws."""
  options = arguments()
  world = jfog.init(on_missing="reweight")
  rank, size = world.rank, world.size
  graph = jfog.topology.exponential(size)
  tx = jfog.optimizers.adapt_then_combine(optax.sgd(0.1, 0.9), graph)
  train, test = digits.load(size, "even", seed=0)
  x, y = train.x[rank], train.y[rank]
  random = np.random.RandomState(rank)

  @jax.jit
  def train_step(params, state, x, y):
    grads = jax.grad(digits.loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  accuracy = jax.jit(
    lambda params: jnp.mean(digits.logits(params, test.x).argmax(-1) == test.y)
  )
  params = digits.init_params(seed=0)
  state = tx.init(params)
  curve, losses, seconds, gone = [], {}, [], ()
  for step in range(options.steps):
    if options.kill.get(rank) == step:
      os.kill(os.getpid(), signal.SIGKILL)
    begin = time.perf_counter()
    batch = random.choice(len(y), digits.BATCH)
    params, state = jax.block_until_ready(
      train_step(params, state, x[batch], y[batch])
    )
    seconds.append(time.perf_counter() - begin)
    for lost in set(jfog.missing_ranks()) - set(gone):
      losses[lost] = step
    gone = jfog.missing_ranks()
    if step % 10 == 9:
      curve.append((step + 1, float(accuracy(params))))

  # An allreduce needs all ranks of its world.
  left = jfog.recover() if gone else world
  mean = float(jfog.allreduce(accuracy(params)))
  if left.rank == 0:
    report(options, size, curve, losses, seconds, mean)


def report(options, size, curve, losses, seconds, mean):
  """Prints the accuracy and the goodput, and draws the curve of one rank."""
  usual, waited = np.median(seconds), 0.0
  for lost, step in sorted(losses.items(), key=lambda loss: loss[1]):
    took = max(seconds[max(0, step - 1) : step + 2])
    waited += max(0.0, took - usual)
    print(f"rank {lost} is lost at step {step}, which took {took:.2f} s")
  # The part of the time, but for the first step, which compiles, that is not spent
  # on waits for lost ranks.
  goodput = 1 - waited / sum(seconds[1:])
  print(
    f"{size - len(losses)} of {size} ranks are left: accuracy {mean:.1%}, "
    f"goodput {goodput:.1%} in {options.steps} steps"
  )
  figure, axes = plt.subplots(figsize=(6, 3.4))
  axes.plot(*zip(*curve, strict=True), ".-", label="a rank that is left")
  for lost, step in losses.items():
    axes.axvline(step, color="tab:red", ls="--", lw=1)
    axes.text(step, 0.05, f" rank {lost} is killed", color="tab:red")
  axes.set(xlabel="step", ylabel="accuracy on test images", ylim=(0, 1))
  axes.legend(loc="center right")
  axes.grid(alpha=0.3)
  figure.savefig(options.plot, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
  main()
