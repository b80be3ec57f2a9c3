"""RelaySGD against its dense recursion."""

from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import optax
import pytest
from support.edges import TREES, assert_iterates, counted, graphs, scan
from support.problems import INNERS, WIDTH, Quadratic

import jfog
from jfog import optimizers, topology

STEPS = 200
EVERYWHERE = pytest.mark.places(
  "single", "simulate-2", "simulate-8", "mesh", "mpi"
)


def relay_sum(inner, tree, gradient, x, steps):
  """All iterates; `m[i, q]`, `c[i, q]` are the last values from `q` to `i`."""
  n, start = len(x), x
  near = np.zeros((n, n), bool)
  for i in range(n):
    near[i, list(tree.in_neighbors(i))] = True
  m, c = np.zeros((n, *x.shape)), np.zeros((n, n))
  iterates = []
  for _ in range(steps):
    h = x + inner(gradient(x), x)
    sent = h[:, None] + m.sum(axis=1, keepdims=True) - m
    m = near[..., None] * sent.swapaxes(0, 1)
    c = near * (1 + c.sum(axis=1, keepdims=True) - c).T
    missing = n - 1 - c.sum(axis=1, keepdims=True)
    x = (h + m.sum(axis=1) + missing * start) / n
    iterates.append(x)
  return np.array(iterates)


def quadratic(problem, x):
  """The gradient of one rank of `Quadratic`."""
  hessian, linear = problem
  return hessian @ x - linear


@EVERYWHERE
@pytest.mark.mpi(4, 8)
def test_relay_sum_is_the_dense_recursion_and_exact(place, rng, x64):
  steps = {"mesh": 40, "mpi": STEPS}.get(place.kind, 1500)
  problem = Quadratic(place.size, rng)
  start = np.broadcast_to(problem.start[0], problem.start.shape)
  trees = graphs(place.size)
  makers, truths = {}, {}
  kinds = [("binary", "sgd")]
  if place.name == "simulate-8":
    kinds += [("chain", "sgd"), ("star", "sgd"), ("chain", "adamw")]
  for name, kind in kinds:
    make, truth = INNERS[kind]
    makers[name, kind] = optimizers.relay_sum(make(), trees[name])
    truths[name, kind] = relay_sum(
      truth(), trees[name], problem.gradient, start, STEPS
    )
  with counted(place) as sent:
    found, _ = place.run(
      scan(makers, quadratic, steps), (problem.hessian, problem.linear), start
    )
  if place.kind == "mpi":
    neighbors = trees["binary"].in_neighbors(jfog.rank())
    assert sent == dict.fromkeys(neighbors, 8 * WIDTH * steps)
  minimizer = problem.minimizer()
  for (name, kind), truth in truths.items():
    x = found[name, kind]
    seen = min(steps, STEPS)
    assert_iterates(place, x[..., :seen, :], truth[:seen], name)
    if kind == "sgd" and steps > STEPS:
      last = x[..., -1, :]
      expected = np.broadcast_to(minimizer, last.shape)
      np.testing.assert_allclose(last, expected, rtol=0, atol=1e-9)


def test_constant_values_are_averaged_after_diameter_steps(rng, x64):
  targets = rng.randn(8, 3)
  trees = {name: graphs(8)[name] for name in TREES}
  makers = {
    name: optimizers.relay_sum(optax.sgd(1.0), tree)  # h is the target
    for name, tree in trees.items()
  }
  program = scan(makers, lambda target, x: x - target, 8)
  found: Any = jfog.simulate(program, 8)(targets, np.zeros((8, 3)))[0]
  for name, tree in trees.items():
    diameter = nx.diameter(tree.to_networkx().to_undirected())
    error = np.abs(found[name] - targets.mean(axis=0)).max(axis=(0, 2))
    assert (error[: diameter - 1] > 1e-3).all()
    assert (error[diameter - 1 :] < 1e-14).all()


def test_relay_sum_does_not_drift(rng):
  """Sums of 7 values and their eighths are inexact in float32."""
  tx = optimizers.relay_sum(optax.set_to_zero(), topology.chain(7))
  x = np.broadcast_to(rng.randn(50).astype(np.float32), (7, 50))
  program = scan({"x": tx}, lambda _, x: jnp.zeros_like(x), 3000)
  found: Any = jfog.simulate(program, 7)(np.zeros(7), x)[0]["x"]
  np.testing.assert_allclose(found[:, -1], x, rtol=1e-6)


@pytest.mark.places("single", "simulate", "mesh", "mpi")
@pytest.mark.mpi(4)
def test_debug_refuses_different_starts_on_all_ranks(place):
  tree = topology.star(place.size)
  tx = optimizers.relay_sum(optax.sgd(1.0), tree, debug=True)

  program = scan({"x": tx}, lambda _, x: x, 2)

  def last(w):
    x = {"same": jnp.ones(2, jnp.complex64), "w": w}
    return program(0, x)[0]["x"]["w"][-1]

  run = jax.jit(place.map(last))
  x = np.ones((place.size, 2), np.float32)
  np.testing.assert_array_equal(run(x), place.mine(0 * x))
  x[-1, 1] = 2
  if place.size == 1:
    run(x)
    return
  text = r"relay_sum: the ranks start .*\(params\['w'\]\).*jfog.broadcast"
  with pytest.raises(Exception, match=text):
    jax.block_until_ready(run(x))
  np.testing.assert_array_equal(run(0 * x), place.mine(0 * x))
