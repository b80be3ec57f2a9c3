"""Problems and graphs of the optimizer tests."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax

from jfog import topology
from support import reference

WIDTH = 5  # parameters of one rank: {"b": (), "w": (2, 2)}, in this order
RATE = 0.1


def chords(n, weights):
  """A directed cycle with chords from rank 0: unequal in- and out-degrees."""
  graph = nx.DiGraph()
  graph.add_nodes_from(range(n))
  if n > 1:
    graph.add_edges_from((i, (i + 1) % n) for i in range(n))
    graph.add_edges_from((0, i) for i in range(2, n))
  return topology.from_networkx(graph, weights=weights)


# Transformations, each with its dense truth.
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
  """`f_i(x) = x.H_i.x / 2 - c_i.x` with its own `H_i` and `c_i` on each rank."""

  def __init__(self, size, rng):
    turn = np.linalg.qr(rng.randn(size, WIDTH, WIDTH))[0]
    curvature = rng.uniform(0.5, 2.0, (size, 1, WIDTH))
    self.hessian = (turn * curvature) @ turn.transpose(0, 2, 1)
    self.linear = rng.randn(size, WIDTH)
    self.start = rng.randn(size, WIDTH)

  def gradient(self, x):
    """The gradients of all ranks, each at its row of `x`."""
    return np.einsum("nij,nj->ni", self.hessian, x) - self.linear

  def minimizer(self):
    """The minimizer of the sum of all `f_i`."""
    return np.linalg.solve(self.hessian.sum(axis=0), self.linear.sum(axis=0))


def tree(x):
  """One rank's row as a pytree."""
  return {"b": x[0], "w": x[1:].reshape(2, 2)}


def row(params):
  """Inverse of `tree`."""
  return jnp.concatenate([params["b"][None], params["w"].ravel()])


def iterates(tx, steps):
  """A jitted scan from a rank's problem to its iterates and last state."""

  @jax.jit
  def program(hessian, linear, start):
    def loss(params):
      x = row(params)
      return x @ hessian @ x / 2 - linear @ x

    def update(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), row(params)

    params = tree(start)
    (_, state), rows = jax.lax.scan(
      update, (params, tx.init(params)), length=steps
    )
    return rows, state

  return program
