"""Data that differ between ranks: plain averaging against methods that correct it.

    python examples/label_split.py           # 10 virtual ranks
    jfog run -np 5 python examples/label_split.py

scikit-learn's handwritten digits, sorted by label: of ten ranks each sees one or two
digits. At a constant step size `adapt_then_combine` keeps a bias toward each rank's
own digits; `exact_diffusion` and `gradient_tracking` correct it on the same graph.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tabulate import tabulate

import jfog
from jfog import optimizers
from jfog.diagnostics import bytes_per_step, consensus_distance

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=10, help="in one process")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

SIZE = jfog.num_ranks(arguments.ranks)
TEST = 357  # of 1797 images
graph = jfog.topology.ring(SIZE)
METHODS = {
  "adapt_then_combine": optimizers.adapt_then_combine(optax.sgd(0.2), graph),
  "exact_diffusion": optimizers.exact_diffusion(optax.sgd(0.2), graph),
  "gradient_tracking": optimizers.gradient_tracking(
    optax.sgd(0.2), graph, "atc"
  ),
}
# Gradient tracking averages the parameters and the gradients.
MESSAGES = {"gradient_tracking": 2}

digits = load_digits()
order = np.random.RandomState(arguments.seed).permutation(len(digits.target))
x, y = np.float32(digits.data[order] / 16), digits.target[order]
test, x, y = (x[:TEST], y[:TEST]), x[TEST:], y[TEST:]
by_label = np.argsort(y, kind="stable")
train = jfog.shard((x[by_label], y[by_label]), SIZE)


def logits(params, x):
  return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def loss_fn(params, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(params, x), y
  ).mean()


def program(tx, params, x, y, test_x, test_y):
  """One rank's training; returns figures of all ranks."""

  def step(carry, _):
    params, state = carry
    grads = jax.grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = params, tx.init(params)
  (params, _), _ = jax.lax.scan(step, start, length=arguments.steps)
  right = jnp.mean(logits(params, test_x).argmax(axis=1) == test_y)
  mean, worst = jfog.allreduce(right), jfog.allreduce(right, "min")
  return 100 * mean, 100 * worst, consensus_distance(params)


random = np.random.RandomState(arguments.seed)
params = {
  name: jnp.float32(random.randn(*shape) * (2 / shape[0]) ** 0.5)
  for name, shape in {"hidden": (64, 32), "out": (32, 10)}.items()
}
rows = []
for name, tx in METHODS.items():
  run = jfog.map_ranks(
    lambda *args, tx=tx: program(tx, *args),
    SIZE,
    in_axes=(0, 0, 0, None, None),
    out_axes=None,
  )
  figures = jax.jit(run)(jfog.stack(params, SIZE), *train, *test)
  sent = MESSAGES.get(name, 1) * bytes_per_step(graph, params)
  rows.append((name, sent, *map(float, figures)))
if jfog.rank() == 0:
  print(f"{SIZE} ranks, {arguments.steps} steps, seed {arguments.seed}")
  print(
    tabulate(
      rows,
      headers=(
        "method",
        "bytes sent per\nrank and step",
        "accuracy\nin %",
        "that of the\nworst rank",
        "consensus\ndistance",
      ),
      floatfmt=("", ",.0f", ".1f", ".1f", ".1e"),
    )
  )
