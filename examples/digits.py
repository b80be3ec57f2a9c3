"""Decentralized training on handwritten digits, on virtual ranks or on MPI.

`python examples/digits.py` trains on 8 virtual ranks of one process, and
`jfog run -np 4 python examples/digits.py` on 4 MPI ranks, by the same program
of one rank. It compares averaging on three graphs with a gradient allreduce and
with no communication, prints a table and draws the curves.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from tabulate import tabulate
from tqdm import tqdm

import jfog
from jfog import topology
from jfog.diagnostics import bytes_per_step, consensus_distance
from jfog.optimizers import adapt_then_combine, gradient_allreduce

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = (
  "one-peer exponential",
  "static exponential",
  "ring",
  "gradient allreduce",
  "no communication",
)
GRAPHS = {
  "one-peer exponential": topology.one_peer_exponential,
  "static exponential": topology.exponential,
  "ring": topology.ring,
}
BATCH = 20
TEST = 357  # of 1797 images


class Data(NamedTuple):
  """Images as patches, and labels, of one rank or stacked over ranks."""

  x: jax.Array  # shape=(..., images, 36, 9)
  y: jax.Array  # shape=(..., images)


def load(n, split, seed):
  """The training data stacked over `n` ranks, and the test data of all."""
  digits = load_digits()
  order = np.random.RandomState(seed).permutation(len(digits.target))
  x, y = patches(digits.images[order] / 16.0), digits.target[order]
  test = Data(jnp.asarray(x[:TEST]), jnp.asarray(y[:TEST]))
  x, y = x[TEST:], y[TEST:]
  if split == "label":  # each rank gets consecutive labels
    by_label = np.argsort(y, kind="stable")
    x, y = x[by_label], y[by_label]
  each = len(y) // n
  if each < BATCH:
    raise SystemExit(f"{n} ranks get {each} images each; use fewer ranks.")
  x = x[: n * each].reshape(n, each, *x.shape[1:])
  return Data(jnp.asarray(x), jnp.asarray(y[: n * each].reshape(n, each))), test


def patches(images):
  """The 3 x 3 patches of the convolution, extracted once."""
  windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))
  return windows.reshape(len(images), 36, 9).astype(np.float32)


def init_params(seed):
  """A convolution of 16 channels and two dense layers, equal on all ranks."""
  shapes = {"conv": (9, 16), "hidden": (144, 64), "out": (64, 10)}
  random = np.random.RandomState(seed)
  return {
    name: {
      "w": jnp.asarray(
        random.randn(*shape) * (2 / shape[0]) ** 0.5, jnp.float32
      ),
      "b": jnp.zeros(shape[1]),
    }
    for name, shape in shapes.items()
  }


def batches(n, images, seed, epoch):
  """Indices of the images of each rank in each step of an epoch."""
  steps = images // BATCH
  order = [
    np.random.RandomState((seed, rank, epoch)).permutation(images)
    for rank in range(n)
  ]
  return np.stack(order)[:, : steps * BATCH].reshape(n, steps, BATCH)


def logits(params, x):
  """The network; a convolution of patches is a matrix product."""

  def dense(name, x):
    return x @ params[name]["w"] + params[name]["b"]

  h = jax.nn.relu(dense("conv", x)).reshape(-1, 3, 2, 3, 2, 16)
  h = h.max(axis=(2, 4)).reshape(-1, 144)
  return dense("out", jax.nn.relu(dense("hidden", h)))


def loss(params, x, y):
  """Mean cross entropy."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, x), y
  ).mean()


def accuracy(params, data):
  """The accuracy: the fraction of correctly classified images."""
  return jnp.mean(jnp.argmax(logits(params, data.x), axis=-1) == data.y)


def optimizer(method, n, learning_rate, steps):
  """The decentralized optimizer of a method.

  The learning rate falls to zero: what keeps the ranks apart, and the bias that
  different data leave, is proportional to it.
  """
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  inner = optax.sgd(schedule, momentum=0.9)
  if method in GRAPHS:
    return adapt_then_combine(inner, GRAPHS[method](n))
  return gradient_allreduce(inner) if method == "gradient allreduce" else inner


def make_epoch(tx):
  """One rank's program of one epoch."""

  def epoch(params, state, data, batches, test):
    def step(carry, batch):
      params, state = carry
      grads = jax.grad(loss)(params, data.x[batch], data.y[batch])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), batches)
    own = jfog.allreduce(accuracy(params, test))
    mean = accuracy(jfog.allreduce(params), test)
    return params, state, jnp.stack([own, mean, consensus_distance(params)])

  return epoch


def train(method, arguments, n, data, test, progress):
  """Trains with one method; returns the curves and the bytes sent."""
  images = data.y.shape[1]
  steps = arguments.epochs * (images // BATCH)
  tx = optimizer(method, n, arguments.learning_rate, steps)
  progress.set_description(f"{method}, compiling")
  start = init_params(arguments.seed)
  params = jfog.stack(start, n)
  state = jfog.map_ranks(tx.init, n)(params)
  epoch = jax.jit(
    jfog.map_ranks(
      make_epoch(tx), n, in_axes=(0, 0, 0, 0, None), out_axes=(0, 0, None)
    )
  )
  curves = []
  for number in range(arguments.epochs):
    order = batches(n, images, arguments.seed, number)
    params, state, metrics = epoch(params, state, data, order, test)
    curves.append(np.asarray(metrics).tolist())
    progress.set_description(method)
    progress.update()
  if method in GRAPHS:
    sent = bytes_per_step(GRAPHS[method](n), start)
  elif method == "gradient allreduce":
    sent = 2 * (n - 1) / n * bytes_per_step(topology.ring(2), start)
  else:
    sent = 0.0
  return {
    "accuracy": [own for own, _, _ in curves],
    "accuracy_of_mean": [mean for _, mean, _ in curves],
    "consensus_distance": [distance for _, _, distance in curves],
    "bytes_per_step": sent,
  }


def report(results, arguments, n, place):
  """Prints the table and draws the plot."""
  print(
    f"{n} ranks ({place}), split: {arguments.split}, {arguments.epochs} epochs, "
    f"seed {arguments.seed}"
  )
  rows = []
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
  for method, curves in results.items():
    rows.append(
      (
        method,
        f"{100 * curves['accuracy'][-1]:.2f} %",
        f"{100 * curves['accuracy_of_mean'][-1]:.2f} %",
        curves["consensus_distance"][-1],
        curves["bytes_per_step"],
      )
    )
    epochs = range(1, len(curves["accuracy"]) + 1)
    left.plot(epochs, 100 * np.array(curves["accuracy"]), label=method)
    distance = np.maximum(curves["consensus_distance"], 1e-8)
    right.semilogy(epochs, distance, label=method)
  print(
    tabulate(
      rows,
      headers=(
        "method",
        "accuracy\n(mean)",
        "accuracy of\naveraged model",
        "consensus\ndistance",
        "bytes sent per\nrank and step",
      ),
      floatfmt=("", "", "", ".1e", ",.0f"),
      colalign=("left", *4 * ["right"]),
    )
  )
  print("(gradient allreduce: bytes of a ring allreduce, 2 (n-1)/n times)")
  left.set(xlabel="epoch", ylabel="test accuracy of the ranks' models in %")
  right.set(xlabel="epoch", ylabel="consensus distance (floor 1e-8)")
  left.legend(fontsize=8)
  left.grid(alpha=0.3)
  right.grid(alpha=0.3)
  figure.suptitle(f"Digits on {n} ranks, split: {arguments.split}")
  figure.tight_layout()
  figure.savefig(arguments.output, dpi=120)
  print(f"plot: {arguments.output}")


def parse():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--ranks", type=int, default=8, help="virtual ranks, when not on MPI"
  )
  parser.add_argument("--split", choices=("iid", "label"), default="iid")
  parser.add_argument("--epochs", type=int, default=30)
  parser.add_argument("--learning-rate", type=float, default=0.1)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--methods",
    nargs="+",
    choices=METHODS,
    default=METHODS,
    metavar="METHOD",
    help="some of: " + ", ".join(METHODS),
  )
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("digits.png")
  )
  parser.add_argument("--json", type=pathlib.Path, help="write the curves here")
  return parser.parse_args()


def main():
  """Trains with every method and reports."""
  arguments = parse()
  n = jfog.num_ranks(arguments.ranks)
  data, test = load(n, arguments.split, arguments.seed)
  results = {}
  with tqdm(
    total=len(arguments.methods) * arguments.epochs,
    disable=jfog.rank() != 0,
    unit="epoch",
    mininterval=1.0,
  ) as progress:
    for method in arguments.methods:
      results[method] = train(method, arguments, n, data, test, progress)
  if jfog.rank() == 0:
    backend = jfog.init().backend
    place = "virtual" if backend == "single" else backend.upper()
    report(results, arguments, n, place)
    if arguments.json:
      arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
  main()
