"""Runs and comparisons of the tests of per-edge exchanges."""

import contextlib

import jax
import networkx as nx
import numpy as np
import optax

import jfog
from jfog import topology

TREES = ("binary", "chain", "star")


def scan(makers, gradient, steps):
  """A scan from a rank's problem to its iterates and last states, by name."""

  @jax.jit
  def program(problem, start):
    def update(carry, _):
      new = {}
      for name, tx in makers.items():
        x, state = carry[name]
        updates, state = tx.update(gradient(problem, x), state, x)
        new[name] = optax.apply_updates(x, updates), state
      return new, {name: x for name, (x, _) in new.items()}

    carry = {name: (start, tx.init(start)) for name, tx in makers.items()}
    last, iterates = jax.lax.scan(update, carry, length=steps)
    return iterates, {name: state for name, (_, state) in last.items()}

  return program


def assert_iterates(place, found, truth, name=""):
  """Compares with a truth of shape (steps, ranks, ...)."""
  assert np.isfinite(truth).all(), name
  expected = place.mine(truth.swapaxes(0, 1))
  np.testing.assert_allclose(
    found, expected, rtol=1e-10, atol=1e-10, err_msg=name
  )


@contextlib.contextmanager
def counted(place):
  """On MPI, records the bytes sent to each neighbor."""
  sent: dict[int, int] = {}
  if place.kind == "mpi":
    jfog.diagnostics.reset_counters()
  yield sent
  if place.kind == "mpi":
    peers = jfog.diagnostics.counters()["peers"]
    peers.pop(jfog.rank(), None)  # collectives
    sent |= {peer: counts["bytes_sent"] for peer, counts in peers.items()}
    assert sent == {p: c["bytes_received"] for p, c in peers.items()}


def leaves(rng, n, shapes):
  """One value of each leaf for every rank."""
  return {name: rng.randn(n, *shape) for name, shape in shapes.items()}


def graphs(n):
  """Trees and other graphs with unequal degrees."""
  shuffled = nx.relabel_nodes(
    nx.path_graph(n), dict(enumerate(np.random.RandomState(1).permutation(n)))
  )
  return {
    "binary": topology.from_networkx(nx.full_rary_tree(2, n)),
    "chain": topology.from_networkx(shuffled),
    "star": topology.star(n),
    "ring": topology.ring(n),
    "exponential": topology.symmetric_exponential(n),
  }
