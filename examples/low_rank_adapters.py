"""Low-rank adapters of a pretrained network: they alone are trained, and travel.

    python examples/low_rank_adapters.py     # 8 virtual ranks
    jfog run -np 4 python examples/low_rank_adapters.py

A network learns scikit-learn's handwritten digits in a few seconds, without ranks.
Then the ranks get images turned by 90 degrees, which it does not recognize, and
train a product of two thin matrices that is added to each weight. The average takes
these factors; the pretrained weights stay as they are. The last row trains and
averages all weights for comparison.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tabulate import tabulate

import jfog
from jfog.diagnostics import bytes_per_step

parser = argparse.ArgumentParser()
parser.add_argument("--ranks", type=int, default=8, help="in one process")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--rank-of-adapters", type=int, default=4)
arguments = parser.parse_args()

SIZE = jfog.num_ranks(arguments.ranks)
TEST = 357  # of 1797 images
WIDTHS = (64, 256, 256, 10)
graph = jfog.topology.one_peer_exponential(SIZE)
random = np.random.RandomState(0)

digits = load_digits()
order = random.permutation(len(digits.target))
upright, y = digits.images[order] / 16, digits.target[order]
turned = jnp.float32(np.rot90(upright, axes=(1, 2)).reshape(-1, 64))
upright = jnp.float32(upright.reshape(-1, 64))


def logits(weights, x):
  *hidden, last = weights
  for w in hidden:
    x = jax.nn.relu(x @ w)
  return x @ last


def adapted(weights, adapters):
  """The weights with the products of their factors added."""
  return [w + a @ b for w, (a, b) in zip(weights, adapters, strict=True)]


def loss_fn(weights, x, y):
  return optax.softmax_cross_entropy_with_integer_labels(
    logits(weights, x), y
  ).mean()


def accuracy(weights, x):
  return jnp.mean(logits(weights, x[:TEST]).argmax(axis=1) == y[:TEST])


def fit(tx, loss, params, steps):
  """Trains `params` with `tx`; on a rank it is the program of that rank."""

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


shapes = list(itertools.pairwise(WIDTHS))
weights = [jnp.float32(random.randn(*s) * (2 / s[0]) ** 0.5) for s in shapes]
pretrain = jax.jit(
  lambda weights: fit(
    optax.adam(1e-3),
    lambda weights: loss_fn(weights, upright[TEST:], y[TEST:]),
    weights,
    100,
  )
)
weights = pretrain(weights)

r = arguments.rank_of_adapters
adapters = [  # their product is zero at the start
  (jnp.float32(random.randn(m, r) / m**0.5), jnp.zeros((r, n)))
  for m, n in shapes
]
tx = jfog.optimizers.adapt_then_combine(optax.adam(1e-2), graph)
train = jfog.shard((turned[TEST:], y[TEST:]), SIZE)


def tune(name, params, merge):
  """Trains and averages `params` on the turned images; returns a table's row."""

  def program(params, x, y):
    params = fit(tx, lambda p: loss_fn(merge(p), x, y), params, arguments.steps)
    return jfog.allreduce(accuracy(merge(params), turned))

  run = jfog.map_ranks(program, SIZE, out_axes=None)
  score = jax.jit(run)(jfog.stack(params, SIZE), *train)
  return name, bytes_per_step(graph, params), 100 * float(score)


rows = [
  ("pretrained, upright", 0, 100 * float(accuracy(weights, upright))),
  ("pretrained, turned", 0, 100 * float(accuracy(weights, turned))),
  tune("adapters, turned", adapters, lambda a: adapted(weights, a)),
  tune("all weights, turned", weights, lambda weights: weights),
]
if jfog.rank() == 0:
  headers = ("trained on ranks", "bytes per rank\nand step", "accuracy\nin %")
  print(f"{SIZE} ranks, {arguments.steps} steps, adapters of rank {r}")
  print(tabulate(rows, headers, floatfmt=("", ",.0f", ".1f")))
