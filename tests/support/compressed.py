"""Compressors and constants of the tests of compressed averaging."""

import optax

from jfog import optimizers
from support.problems import RATE

GAMMA = 0.3
ETA = 0.5
SEED = 7

COMPRESSORS = {
  "identity": optimizers.identity(),
  "low_rank": optimizers.low_rank(1),
  "quantize": optimizers.quantize(5),
  "random_k": optimizers.random_k(k=1),
  "sign": optimizers.sign(),
  "top_k": optimizers.top_k(k=1),
}

SQUEEZED = {"quantize": optimizers.quantize(8), "sign": optimizers.sign()}
PLAIN, SIGN = optax.sgd(RATE), optimizers.sign()


def side_by_side(compressors):
  """A compressor of dicts that applies to each entry the one of its name."""

  def init(tree):
    return {name: compressors[name].init(part) for name, part in tree.items()}

  def encode(key, tree, state):
    results = {
      name: compressors[name].encode(key, part, state[name])
      for name, part in tree.items()
    }
    message, state = (
      {name: result[i] for name, result in results.items()} for i in range(2)
    )
    return message, state

  def decode(message, like):
    return {
      name: compressors[name].decode(message[name], part)
      for name, part in like.items()
    }

  return optimizers.Compressor(init, encode, decode)
