"""Problems and graphs on which all optimizers are tested."""

import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax

from jfog import topology
from support import reference

WIDTH = 5  # parameters of one rank: {"b": (), "w": (2, 2)}, in this order
RATE = 0.1


def chords(n, weights):
  """A directed cycle with chords from rank 0: degrees of both kinds differ."""
  graph = nx.DiGraph()
  graph.add_nodes_from(range(n))
  if n > 1:
    graph.add_edges_from((i, (i + 1) % n) for i in range(n))
    graph.add_edges_from((0, i) for i in range(2, n))
  return topology.from_networkx(graph, weights=weights)


# The transformation beside its dense truth.
INNERS = {
  "sgd": (lambda: optax.sgd(RATE), lambda: reference.sgd(RATE)),
  "momentum": (
    lambda: optax.sgd(RATE, momentum=0.8),
    lambda: reference.sgd(RATE, momentum=0.8),
  ),
  "nesterov": (
    lambda: optax.sgd(RATE, momentum=0.8, nesterov=True),
    lambda: reference.sgd(RATE, momentum=0.8, nesterov=True),
  ),
  "adam": (lambda: optax.adam(RATE), lambda: reference.adam(RATE)),
  "adamw": (
    lambda: optax.adamw(RATE, weight_decay=0.3),
    lambda: reference.adam(RATE, decay=0.3),
  ),
  "clipped": (
    lambda: optax.chain(optax.clip_by_global_norm(0.7), optax.sgd(RATE)),
    lambda: reference.clipped(0.7, reference.sgd(RATE)),
  ),
}


class Quadratic:
  """`f_i(x) = x.H_i.x / 2 - c_i.x` with another `H_i` and `c_i` on each rank."""

  def __init__(self, size, rng):
    turn = np.linalg.qr(rng.randn(size, WIDTH, WIDTH))[0]
    curvature = rng.uniform(0.5, 2.0, (size, 1, WIDTH))
    self.hessian = (turn * curvature) @ turn.transpose(0, 2, 1)
    self.linear = rng.randn(size, WIDTH)
    self.start = rng.randn(size, WIDTH)

  def gradient(self, x):
    """All ranks' gradients, each at its own row."""
    return np.einsum("nij,nj->ni", self.hessian, x) - self.linear

  def minimizer(self):
    """Where the sum of all `f_i` is least."""
    return np.linalg.solve(self.hessian.sum(axis=0), self.linear.sum(axis=0))


def tree(x):
  """One rank's row as a pytree."""
  return {"b": x[0], "w": x[1:].reshape(2, 2)}


def row(params):
  """The inverse of `tree`."""
  return jnp.concatenate([params["b"][None], params["w"].ravel()])
