"""The decentralized optimizers: iterates, identities, limits, stability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import recursions
from support.algorithms import (
  CHANGING,
  SMALL,
  STATIC,
  alternating,
  directed,
  grid,
  one,
  one_peer,
  pulling,
  pushing,
)
from support.problems import RATE, Quadratic

import jfog
from jfog import optimizers, topology

STEPS = 200


def all_iterates(makers, steps):
  """A jitted scan of many transformations: a rank's problem to iterates."""

  @jax.jit
  def program(hessian, linear, start):
    def update(carry, _):
      new = {}
      for name, tx in makers.items():
        x, state = carry[name]
        updates, state = tx.update(hessian @ x - linear, state, x)
        new[name] = x + updates, state
      return new, {name: x for name, (x, _) in new.items()}

    carry = {name: (start, tx.init(start)) for name, tx in makers.items()}
    return jax.lax.scan(update, carry, length=steps)[1]

  return program


def solve_all(place, makers, problem, steps, start=None):
  """The iterates of the ranks of this process, by name."""
  start = problem.start if start is None else start
  return place.run(
    all_iterates(makers, steps), problem.hessian, problem.linear, start
  )


@pytest.mark.places("single", "simulate-8", "mesh-4", "mpi-4", "mpi-8")
@pytest.mark.parametrize(
  "cases", [STATIC, CHANGING], ids=["static", "changing"]
)
def test_iterates_are_those_of_the_dense_recursion(place, rng, x64, cases):
  problem = Quadratic(place.size, rng)
  makers = {name: case.make(place.size) for name, case in cases.items()}
  found = solve_all(place, makers, problem, STEPS)
  for name, case in cases.items():
    truth = case.truth(problem.gradient, problem.start, STEPS, place.size)
    expected = place.mine(truth.swapaxes(0, 1))
    assert np.isfinite(expected).all(), name
    np.testing.assert_allclose(
      found[name], expected, rtol=1e-10, atol=1e-10, err_msg=name
    )


# Identities: pairs of methods with equal iterates.

B = 0.6
W = topology.symmetric_exponential  # symmetric and regular for every size


def _gd(rate=RATE):
  return optax.sgd(rate)


# By name: two methods as functions of the number of ranks; the first five are
# ATC.
SAME = {
  "decentlam without momentum": (
    lambda n: optimizers.decentlam(RATE, 0.0, W(n)),
    lambda n: optimizers.adapt_then_combine(_gd(), W(n)),
  ),
  "quasi-global without momentum": (
    lambda n: optimizers.quasi_global_momentum(RATE, 0.0, W(n)),
    lambda n: optimizers.adapt_then_combine(_gd(), W(n)),
  ),
  "ATC of momentum 0": (
    lambda n: optimizers.adapt_then_combine(optax.sgd(RATE, 0.0), W(n)),
    lambda n: optimizers.adapt_then_combine(_gd(), W(n)),
  ),
  "push-sum on a doubly stochastic graph": (
    lambda n: optimizers.push_sum(_gd(), W(n)),
    lambda n: optimizers.adapt_then_combine(_gd(), W(n)),
  ),
  "gossip-PGA that never comes to the mean": (
    lambda n: optimizers.gossip_pga(_gd(), W(n), 1000),
    lambda n: optimizers.adapt_then_combine(_gd(), W(n)),
  ),
  "push-pull with one doubly stochastic graph": (
    lambda n: optimizers.push_pull(SMALL, W(n), W(n)),
    lambda n: optimizers.gradient_tracking(_gd(SMALL), W(n), "atc"),
  ),
  "DiLoCo with an outer step of 1": (
    lambda n: optimizers.diloco(_gd(), optax.sgd(1.0), 4),
    lambda n: optimizers.local_sgd(_gd(), 4),
  ),
  "slow momentum of nothing": (
    lambda n: optimizers.slow_momentum(_gd(), W(n), 3, 1.0, 0.0),
    lambda n: optimizers.gossip_pga(_gd(), W(n), 3),
  ),
  "the mean in rounds": (
    lambda n: optimizers.local_sgd(_gd(), 3, mean=topology.ceca(n)),
    lambda n: optimizers.local_sgd(_gd(), 3),
  ),
  "the mean in rounds, between gossip": (
    lambda n: optimizers.gossip_pga(_gd(), W(n), 3, mean=topology.base_k(n, 1)),
    lambda n: optimizers.gossip_pga(_gd(), W(n), 3),
  ),
  "exact diffusion is d2 of the lazy graph": (
    lambda n: optimizers.exact_diffusion(_gd(), W(n)),
    lambda n: optimizers.d2(_gd(), W(n).lazy()),
  ),
  "averaging by a function": (
    lambda n: optimizers.exact_diffusion(
      _gd(), lambda x, step: jfog.neighbor_allreduce(x, W(n))
    ),
    lambda n: optimizers.exact_diffusion(_gd(), W(n)),
  ),
}

CENTRAL = {
  "tracking on the complete graph": lambda n: optimizers.gradient_tracking(
    _gd(), topology.fully_connected(n), "atc"
  ),
  "local SGD in every step": lambda n: optimizers.local_sgd(_gd(), 1),
  "gradient allreduce": lambda n: optimizers.gradient_allreduce(_gd()),
}


@pytest.mark.places("simulate-6")
def test_identities(place, rng, x64):
  n = place.size
  problem = Quadratic(n, rng)
  makers = {
    f"{side}: {name}": make(n)
    for name, pair in SAME.items()
    for side, make in zip(("left", "right"), pair, strict=True)
  }
  found = solve_all(place, makers, problem, 300)
  for name in SAME:
    left, right = found[f"left: {name}"], found[f"right: {name}"]
    np.testing.assert_allclose(
      left, right, rtol=1e-12, atol=1e-12, err_msg=name
    )

  start = np.broadcast_to(problem.start[0], problem.start.shape)
  makers = {name: make(n) for name, make in CENTRAL.items()}
  found = solve_all(place, makers, problem, 300, start)
  x, truth = start[0], []
  for _ in range(300):
    x = x - RATE * (problem.hessian.mean(0) @ x - problem.linear.mean(0))
    truth.append(x)
  for name, iterates in found.items():
    expected = np.broadcast_to(truth, iterates.shape)
    np.testing.assert_allclose(
      iterates, expected, rtol=1e-12, atol=1e-12, err_msg=name
    )


# Conserved quantities.


@pytest.mark.places("simulate-6")
def test_trackers_hold_the_mean_gradient(place, rng, x64):
  n = place.size
  problem = Quadratic(n, rng)
  makers = {
    "awc": optimizers.gradient_tracking(_gd(SMALL), one_peer(n)),
    "atc": optimizers.gradient_tracking(_gd(SMALL), one_peer(n), "atc"),
    "push_pull": optimizers.push_pull(SMALL / 4, pulling(n), directed(n)),
    "push_diging": optimizers.push_diging(SMALL / 4, pushing(n)),
  }

  @jax.jit
  def program(hessian, linear, start):
    def update(carry, _):
      new, seen = {}, {}
      for name, tx in makers.items():
        x, before = carry[name]
        state: Any
        updates, state = tx.update(hessian @ x - linear, before, x)
        new[name] = x + updates, state
        seen[name] = state.tracker, state.gradient
        if name == "push_diging":
          seen["weight"] = state.weight
      return new, seen

    carry = {name: (start, tx.init(start)) for name, tx in makers.items()}
    return jax.lax.scan(update, carry, length=300)[1]

  found = place.run(program, problem.hessian, problem.linear, problem.start)
  weight = found.pop("weight")
  np.testing.assert_allclose(weight.sum(axis=0), n, rtol=1e-13)
  assert weight.max() > 1.1  # the test needs unequal weights
  for name, (tracker, gradient) in found.items():
    np.testing.assert_allclose(
      tracker.mean(axis=0),
      gradient.mean(axis=0),
      rtol=1e-12,
      atol=1e-12,
      err_msg=name,
    )


@pytest.mark.places("simulate-6")
def test_without_gradients_the_mean_stays(place, rng):
  """Over 10 000 float32 steps; without the division the mean is lost."""
  n = place.size
  x = (3 + rng.randn(n, 4)).astype(np.float32)
  still = optax.sgd(0.0)
  makers = {
    "push_sum": optimizers.push_sum(still, directed(n)),
    "push_sum, changing": optimizers.push_sum(still, pushing(n)),
    "push_diging": optimizers.push_diging(0.1, directed(n)),
    "undivided": optimizers.adapt_then_combine(still, directed(n), check=False),
    "uniform_in": optimizers.adapt_then_combine(still, pulling(n), check=False),
  }
  makers["tracking"] = optimizers.gradient_tracking(still, one_peer(n))

  @jax.jit
  def program(x):
    def update(_, carry):
      new = {}
      for name, tx in makers.items():
        x, state = carry[name]
        updates, state = tx.update(jnp.zeros_like(x), state, x)
        new[name] = x + updates, state
      return new

    carry = {name: (x, tx.init(x)) for name, tx in makers.items()}
    end = jax.lax.fori_loop(0, 10_000, update, carry)
    return {name: x for name, (x, _) in end.items()}

  found = place.run(program, x)
  mean = np.broadcast_to(x.mean(axis=0, dtype=float), x.shape)
  for name in ("undivided", "uniform_in"):
    assert abs(found.pop(name) - mean).max() > 0.05, name
  for name, end in found.items():
    np.testing.assert_allclose(end, mean, rtol=2e-5, err_msg=name)


# Limits on heterogeneous data.

EXACT = {
  "exact_diffusion": lambda n: optimizers.exact_diffusion(
    _gd(), topology.ring(n)
  ),
  "d2": lambda n: optimizers.d2(_gd(), grid(n)),
  "nids": lambda n: optimizers.nids(RATE, topology.star(n)),
  "nids, falling": lambda n: optimizers.nids(
    lambda k: jnp.where(k < 5, 3 * RATE, RATE), topology.ring(n)
  ),
  "extra": lambda n: optimizers.extra(RATE, topology.ring(n)),
  "extra, falling": lambda n: optimizers.extra(
    lambda k: jnp.where(k < 5, 2 * RATE, RATE), topology.ring(n)
  ),
  "tracking awc": lambda n: optimizers.gradient_tracking(
    _gd(SMALL), topology.exponential(n)
  ),
  "tracking atc": lambda n: optimizers.gradient_tracking(
    _gd(), topology.exponential(n), "atc"
  ),
  "tracking, changing": lambda n: optimizers.gradient_tracking(
    _gd(SMALL), one_peer(n), "atc"
  ),
  "push_diging": lambda n: optimizers.push_diging(SMALL, directed(n)),
  "push_diging, changing": lambda n: optimizers.push_diging(SMALL, pushing(n)),
  "push_pull": lambda n: optimizers.push_pull(SMALL, pulling(n), directed(n)),
}

BIASED = {
  "atc": lambda n: optimizers.adapt_then_combine(_gd(SMALL), topology.ring(n)),
  "atc, half": lambda n: optimizers.adapt_then_combine(
    _gd(SMALL / 2), topology.ring(n)
  ),
  "atc, exponential": lambda n: optimizers.adapt_then_combine(
    _gd(SMALL), topology.exponential(n)
  ),
  "awc": lambda n: optimizers.adapt_with_combine(_gd(SMALL), topology.ring(n)),
  "decentlam": lambda n: optimizers.decentlam(SMALL, 0.7, topology.ring(n)),
  "quasi_global": lambda n: optimizers.quasi_global_momentum(
    SMALL, 0.7, topology.ring(n)
  ),
  "quasi_global, mu": lambda n: optimizers.quasi_global_momentum(
    SMALL, 0.5, topology.ring(n), mu=0.8
  ),
  "dmsgd": lambda n: optimizers.adapt_then_combine(
    optax.sgd(SMALL / 2, momentum=0.5), topology.ring(n)
  ),
  "dmsgd_sync": lambda n: optimizers.dmsgd_sync(
    SMALL / 2, 0.5, topology.ring(n)
  ),
  "gossip_pga": lambda n: optimizers.gossip_pga(
    _gd(SMALL), topology.ring(n), 4
  ),
  "push_sum": lambda n: optimizers.push_sum(_gd(SMALL), directed(n)),
}


@pytest.mark.places("simulate-8")
def test_exact_methods_reach_the_minimizer_where_averaging_stalls(
  place, rng, x64
):
  n = place.size
  problem = Quadratic(n, rng)
  makers = {name: make(n) for name, make in {**EXACT, **BIASED}.items()}
  found = solve_all(place, makers, problem, 2000)
  end = {name: np.asarray(x)[:, -4:] for name, x in found.items()}
  target = problem.minimizer()
  bias = {name: abs(x - target).max() for name, x in end.items()}
  for name in EXACT:
    assert bias[name] < 1e-9, (name, bias[name])
  for name in BIASED:
    assert bias[name] > 1e-3, (name, bias[name])

  for name in ("decentlam", "quasi_global", "quasi_global, mu", "dmsgd"):
    np.testing.assert_allclose(
      end[name], end["atc"], rtol=0, atol=1e-10, err_msg=name
    )
  assert bias["atc"] < bias["awc"]
  assert 1.7 < bias["atc"] / bias["atc, half"] < 2.3
  assert bias["gossip_pga"] < bias["atc"]
  assert bias["atc, exponential"] < bias["atc"]
  # At the effective step size of DmSGD: averaged momentum has a smaller bias.
  assert bias["dmsgd_sync"] < bias["dmsgd"]


DRIFT = {
  "exact_diffusion": lambda n: optimizers.exact_diffusion(
    _gd(), topology.ring(n)
  ),
  "d2": lambda n: optimizers.d2(_gd(), topology.ring(n).lazy()),
  "nids": lambda n: optimizers.nids(RATE, topology.ring(n)),
  "extra": lambda n: optimizers.extra(RATE, topology.ring(n)),
  "tracking awc": lambda n: optimizers.gradient_tracking(
    _gd(SMALL), topology.ring(n)
  ),
  "tracking atc": lambda n: optimizers.gradient_tracking(
    _gd(SMALL), topology.ring(n), "atc"
  ),
  "push_diging": lambda n: optimizers.push_diging(SMALL / 2, directed(n)),
  "push_pull": lambda n: optimizers.push_pull(
    SMALL / 2, pulling(n), directed(n)
  ),
}


@pytest.mark.places("simulate-8")
def test_no_drift_in_float32(place):
  """20 000 steps of recursions with a double root at 1 in exact arithmetic."""
  n, rng = place.size, np.random.RandomState(2)
  curvature = (1 + rng.rand(n, 4)).astype(np.float32)
  target = (3 + rng.randn(n, 4)).astype(np.float32)
  wide = curvature.astype(float)
  minimizer = (wide * target).sum(axis=0) / wide.sum(axis=0)
  makers = {name: make(n) for name, make in DRIFT.items()}

  @jax.jit
  def program(curvature, target):
    def update(_, carry):
      new = {}
      for name, tx in makers.items():
        x, state = carry[name]
        updates, state = tx.update(curvature * (x - target), state, x)
        new[name] = x + updates, state
      return new

    start = jnp.zeros_like(target)
    carry = {name: (start, tx.init(start)) for name, tx in makers.items()}
    end = jax.lax.fori_loop(0, 20_000, update, carry)
    return {name: x for name, (x, _) in end.items()}

  for name, x in place.run(program, curvature, target).items():
    error = abs(np.asarray(x, float) / minimizer - 1).max()
    assert error < 1e-5, (name, error)


# Without gradients the disagreement changes by the largest root in each step.


def largest_root(values, *polynomial):
  """The largest root over all eigenvalues except 1, one polynomial for each."""
  return max(
    abs(np.roots([coefficient(v) for coefficient in polynomial])).max()
    for v in values
    if abs(v - 1) > 1e-9
  )


def psi_root(matrix):
  values = np.linalg.eigvals(matrix)
  return largest_root(values, lambda v: 1, lambda v: -2 * v, lambda v: v)


def extra_root(matrix):
  values = np.linalg.eigvals(matrix)
  return largest_root(
    values, lambda v: 1, lambda v: -(1 + v), lambda v: (1 + v) / 2
  )


def decentlam_root(matrix, b):
  values = np.linalg.eigvals(matrix)
  return largest_root(values, lambda v: 1, lambda v: -(b + v), lambda v: b)


def _wild(method, *args):
  return lambda graph: getattr(optimizers, method)(*args, graph, check=False)


GROWTH = {
  "d2, alternating": (_wild("d2", _gd()), alternating, psi_root, 1.5798),
  "d2, hypercube": (_wild("d2", _gd()), topology.hypercube, psi_root, 1.366),
  "d2, grid": (_wild("d2", _gd()), topology.mesh_grid_2d, psi_root, 1.113),
  "d2, exponential": (
    _wild("d2", _gd()),
    topology.exponential,
    psi_root,
    1.0427,
  ),
  "exact_diffusion, alternating": (
    _wild("exact_diffusion", _gd()),
    alternating,
    lambda w: psi_root(recursions.lazy(w)),
    0.9396,
  ),
  "exact_diffusion, directed ring": (
    _wild("exact_diffusion", _gd()),
    lambda n: topology.ring(n, "right"),
    lambda w: psi_root(recursions.lazy(w)),
    1.2557,
  ),
  "extra, directed ring": (
    _wild("extra", RATE),
    lambda n: topology.ring(n, "right"),
    extra_root,
    1.2557,
  ),
  "exact_diffusion, exponential": (
    _wild("exact_diffusion", _gd()),
    topology.exponential,
    lambda w: psi_root(recursions.lazy(w)),
    0.976,
  ),
  "decentlam, exponential": (
    _wild("decentlam", RATE, 0.9),
    topology.exponential,
    lambda w: decentlam_root(w, 0.9),
    1.2375,
  ),
  "decentlam, ring": (
    _wild("decentlam", RATE, 0.9),
    topology.ring,
    lambda w: decentlam_root(w, 0.9),
    0.9**0.5,
  ),
}


@pytest.mark.places("simulate-8")
def test_disagreement_grows_by_the_largest_root(place, rng, x64):
  n = place.size
  problem = Quadratic(n, rng)
  problem.hessian, problem.linear = 0 * problem.hessian, 0 * problem.linear
  makers = {name: make(graph(n)) for name, (make, graph, *_) in GROWTH.items()}
  periodic = {
    "decentlam, one-peer": optimizers.decentlam(
      RATE, 0.9, one_peer(n), check=False
    ),
    "quasi-global, one-peer": optimizers.quasi_global_momentum(
      RATE, 0.9, one_peer(n)
    ),
    "quasi-global, exponential": optimizers.quasi_global_momentum(
      RATE, 0.9, topology.exponential(n)
    ),
  }
  found = solve_all(place, {**makers, **periodic}, problem, 600)

  def rate(x, first, last):
    apart = np.linalg.norm(x - x.mean(axis=0), axis=(0, 2))
    return (apart[last] / apart[first]) ** (1 / (last - first))

  for name, (_, graph, root, table) in GROWTH.items():
    predicted = root(one(graph(n)))
    assert predicted == pytest.approx(table, abs=1e-3), name
    # A decreasing disagreement reaches the level of rounding.
    first, last = (200, 500) if predicted > 1 else (50, 250)
    measured = rate(np.asarray(found[name]), first, last)
    assert measured == pytest.approx(predicted, abs=0.01), name
  measured = rate(np.asarray(found["decentlam, one-peer"]), 200, 500) ** 3
  assert measured == pytest.approx(1.38, abs=0.01)
  for name in ("quasi-global, one-peer", "quasi-global, exponential"):
    assert rate(np.asarray(found[name]), 20, 200) < 1, name


def test_a_small_graph_may_survive_and_a_larger_one_does_not():
  roots = [
    psi_root(recursions.lazy(one(topology.exponential(n)))) for n in (8, 16, 32)
  ]
  np.testing.assert_allclose(roots, [0.976, 1.031, 1.055], atol=1e-3)
  torus = one(topology.torus_2d(16, (4, 4)))
  np.testing.assert_allclose(psi_root(torus), 1.580, atol=1e-3)
