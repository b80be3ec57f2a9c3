"""PowerGossip against its dense recursion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.edges import assert_iterates, counted, leaves, scan
from support.problems import RATE

import jfog
from jfog import optimizers, topology
from jfog.optimizers.contrib._edge_exchange import edges_of

STEPS = 200

SHAPES = {"b": (3,), "k": (3, 2, 2), "s": (), "w": (2, 3)}  # leaves in order


def matrices(shapes):
  """The shapes of the matrices, by leaf."""
  return {
    name: (shape[0], int(np.prod(shape[1:])))
    for name, shape in shapes.items()
    if len(shape) > 1
  }


def cases_of(place):
  """By name: a graph, and the rank of the factors."""
  n = place.size
  cases = {
    "ring": (topology.ring(n), 1),
    "star": (topology.star(n), 2),
    "exponential": (topology.symmetric_exponential(n), 9),
  }
  some = {
    "simulate-5": ("ring",),
    "simulate-8": ("exponential",),
  }
  return {name: cases[name] for name in some.get(place.name, ("star",))}


def drawn(low, high, step, rank, shapes, seed=0):
  """The factors drawn at both ends of an edge, `{leaf: (P, Q)}`."""
  key = jax.random.key(seed, impl="threefry2x32")
  for word in (low, high, step):
    key = jax.random.fold_in(key, word)
  sizes = [(x, min(rank, *mn)) for mn in shapes.values() for x in mn]
  numbers = jax.random.normal(key, (sum(x * r for x, r in sizes),), jnp.float64)
  cut = np.split(np.asarray(numbers), np.cumsum([x * r for x, r in sizes]))
  factors = [f.reshape(s) for f, s in zip(cut[:-1], sizes, strict=True)]
  pairs = zip(factors[0::2], factors[1::2], strict=True)
  return dict(zip(shapes, pairs, strict=True))


def orth(x):
  """An orthonormal basis of the columns."""
  return np.linalg.qr(x)[0]


def power_gossip(inner, matrix, rank, gradient, x, steps):
  """All iterates by leaf; the factors track the difference of each edge."""
  n = len(matrix)
  edges = [(i, j) for i in range(n) for j in range(i + 1, n) if matrix[i, j]]
  shapes = matrices({name: leaf.shape[1:] for name, leaf in x.items()})
  factors = {edge: drawn(*edge, 0, rank, shapes) for edge in edges}
  iterates = []
  for k in range(steps):
    h = {name: x[name] + u for name, u in inner(gradient(x)).items()}
    x = {name: np.tensordot(matrix, h[name], 1) for name in h}
    for name, shape in shapes.items():
      full = h[name].reshape(n, *shape)
      new = full.copy()
      for low, high in edges:
        gap = full[high] - full[low]
        p, q = factors[low, high][name]
        if k % 2 == 0:
          q = orth(q)
          p = gap @ q
        else:
          p = orth(p)
          q = gap.T @ p
        factors[low, high][name] = p, q
        new[low] += matrix[low, high] * p @ q.T
        new[high] -= matrix[low, high] * p @ q.T
      x[name] = new.reshape(h[name].shape)
    iterates.append(x)
  return {name: np.array([x[name] for x in iterates]) for name in x}


def diagonal(problem, x):
  """The gradient of a quadratic without mixed terms."""
  return jax.tree.map(lambda a, c, x: a * x - c, *problem, x)


@pytest.mark.places("single", "simulate", "mesh", "simulate-8", "mpi")
@pytest.mark.mpi(
  4, soak=(8,)
)  # every rank compiles its own program, which is slow
def test_power_gossip_is_the_dense_recursion(place, rng, x64):
  n, steps = place.size, 40 if place.kind == "mesh" else STEPS
  cases = cases_of(place)
  shapes = SHAPES if place.name == "simulate-8" else {"b": (3,), "k": (3, 2, 2)}
  curvature, linear, start = (leaves(rng, n, shapes) for _ in range(3))
  problem = jax.tree.map(lambda x: np.exp(0.3 * x), curvature), linear
  heterogeneous = "exponential" in cases
  if not heterogeneous:
    # With low rank, lasting differences amplify rounding errors into other
    # directions; ranks with the same data reach consensus.
    problem = jax.tree.map(lambda x: np.broadcast_to(x[0], x.shape), problem)
  makers = {
    name: optimizers.power_gossip(optax.sgd(RATE), graph, rank)
    for name, (graph, rank) in cases.items()
  }
  program = scan(makers, diagonal, steps)

  def with_factors(problem, start):
    iterates, states = program(problem, start)
    factors = {name: (state.p, state.q) for name, state in states.items()}
    return iterates, jfog.allgather(jax.tree.map(lambda x: x[None], factors))

  with counted(place) as sent:
    found, factors = place.run(with_factors, problem, start)
  if place.kind == "mpi":  # b, and P or Q of two columns for the 3x4 of k
    neighbors = cases["star"][0].in_neighbors(jfog.rank())
    total = (3 + 2 * 3) * steps // 2 + (3 + 2 * 4) * steps // 2
    assert sent == dict.fromkeys(neighbors, 8 * total)
  for name, (graph, rank) in cases.items():
    truth = power_gossip(
      lambda g: {name: -RATE * g[name] for name in g},
      reference.mixing(graph),
      rank,
      lambda x: diagonal(problem, x),
      start,
      steps,
    )
    for leaf in shapes:
      assert_iterates(place, found[name][leaf], truth[leaf], f"{name} {leaf}")
    # Both ends of an edge hold bit-identical factors.
    edges = edges_of(graph, "test")
    for factor in jax.tree.leaves(factors[name]):
      factor = np.asarray(factor)
      if place.kind in ("simulate", "mesh"):
        factor = factor[0]
      for slot, partners in enumerate(edges.partners.T):
        has_edge = partners >= 0
        np.testing.assert_array_equal(
          factor[has_edge, slot], factor[partners[has_edge], slot]
        )
        assert not heterogeneous or factor[has_edge, slot].any()


def test_power_gossip_in_full_rank_is_plain_gossip_in_even_steps(rng, x64):
  """Conserves the mean in all steps, also of complex matrices."""
  n, graph = 4, topology.chain(4)
  x = leaves(rng, n, {"b": (2,), "w": (4, 3), "z": (2, 2)})
  x["z"] = x["z"] + 1j * rng.randn(n, 2, 2)
  tx = optimizers.power_gossip(optax.set_to_zero(), graph, 3)
  program = scan({"x": tx}, lambda _, x: jax.tree.map(jnp.zeros_like, x), 100)
  found: Any = jfog.simulate(program, n)(np.zeros(n), x)[0]["x"]
  matrix = reference.mixing(graph)
  for name, start in x.items():
    rows = np.concatenate([start[:, None], found[name]], axis=1)
    means = rows.mean(axis=0)
    reference.assert_close(means, np.broadcast_to(means[0], means.shape), 1e-14)
    mixed = np.tensordot(matrix, rows[:, 0:100:2], 1)
    reference.assert_close(rows[:, 1:101:2], mixed, 1e-13)
    assert np.abs(rows[:, -1] - means[0]).max() < 1e-4


def test_power_gossip_finds_differences_that_come_up_again(rng):
  """Equal matrices give zero factors; later only the last entries differ."""
  n, graph = 4, topology.ring(4)
  tx = optimizers.power_gossip(optax.sgd(1.0), graph, 1)
  gradients = np.zeros((n, 240, 5, 4), np.float32)
  gradients[:, 7, 4, 3] = rng.randn(n)

  @jax.jit
  def program(gradients):
    def update(carry, g):
      x, state = carry
      updates, state = tx.update(g, state, x)
      return (x + updates, state), x

    x = jnp.ones((5, 4))
    (x, _), iterates = jax.lax.scan(update, (x, tx.init(x)), gradients)
    return x, iterates

  last, iterates = jfog.simulate(program, n)(gradients)
  np.testing.assert_array_equal(iterates[:, :8], np.ones((n, 8, 5, 4)))
  truth = np.ones((5, 4)) - gradients.sum(axis=1).mean(axis=0)
  np.testing.assert_allclose(
    last, np.broadcast_to(truth, last.shape), atol=1e-5
  )
