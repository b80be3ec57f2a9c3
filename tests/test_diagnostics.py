"""Traces of a training, and what the documentation of optimizers lists."""

import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.problems import RATE, Quadratic, row, tree

import jfog
from jfog import optimizers, topology
from jfog.diagnostics import bytes_per_step, trace

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, EVERY = 7, 3


def program(graph, sent=None):
  """One rank's training on its own quadratic, with batches that shift it."""
  tx = optimizers.adapt_then_combine(optax.sgd(RATE), graph)

  def train(hessian, linear, start, shifts, solution):
    def loss(params, shift):
      x = row(params)
      return x @ hessian @ x / 2 - (linear + shift) @ x

    params, _, seen = trace(
      tx,
      loss,
      tree(start),
      STEPS,
      batches=shifts,
      every=EVERY,
      distance_to=tree(solution),
      bytes_per_step=sent,
    )
    return row(params), seen

  return train


@pytest.mark.places("simulate-5", "mesh", "mpi")
@pytest.mark.mpi(2)
def test_trace_is_that_of_the_dense_recursion(place, rng, x64):
  n = place.size
  graph = topology.star(n)  # ranks send differently often
  problem = Quadratic(n, rng)
  shifts = rng.randn(n, STEPS, 5)
  solution = problem.minimizer()
  formula = bytes_per_step(graph, problem.start[0])
  train = place.map(program(graph, formula), in_axes=(0, 0, 0, 0, None))
  if place.kind != "mpi":  # under jit nothing is counted
    train = jax.jit(train)
  x, seen = train(
    *(problem.hessian, problem.linear, problem.start, shifts, solution)
  )

  now, entries = problem.start, []
  for k in range(STEPS):
    linear = problem.linear + shifts[:, k]
    curved = np.einsum("nij,nj->ni", problem.hessian, now)
    if k % EVERY == 0:
      values = np.sum((curved / 2 - linear) * now, axis=1)
      spread = np.sum((now - now.mean(axis=0)) ** 2, axis=1)
      error = np.sum((now - solution) ** 2, axis=1)
      entries.append(
        [k, values.mean(), *np.sqrt([spread.mean(), error.mean()])]
      )
    now = graph.mixing_matrix @ (now - RATE * (curved - linear))
  truth = np.array(entries).T
  np.testing.assert_allclose(x, place.mine(now), rtol=1e-12)
  for got, expected in zip(seen[:4], truth, strict=True):
    got = np.asarray(got).reshape(-1, truth.shape[1])  # equal on all ranks
    np.testing.assert_allclose(got, [expected] * len(got), rtol=1e-12)
  assert np.all(np.asarray(seen.bytes_per_step) == formula) and formula > 0


@pytest.mark.places("mpi")
@pytest.mark.mpi(2)
def test_bytes_are_those_of_the_formula(place, rng):
  """The trace's own averages do not count, and no argument is needed."""
  graph = topology.ring(2)
  x = jnp.zeros([4, 6])
  own = jnp.asarray(rng.randn(2, 4, 6), jnp.float32)[jfog.rank()]

  def sent(tx):
    """The trace of two steps on another quadratic on each rank."""
    return trace(tx, lambda x: jnp.sum((x - own) ** 2), x, 2)[2].bytes_per_step

  sgd = optax.sgd(RATE)
  plain = optimizers.adapt_then_combine(sgd, graph)
  assert sent(plain).tolist() == [bytes_per_step(graph, x)] * 2 == [96.0] * 2
  compressor = optimizers.top_k(k=3)
  tx = optimizers.choco(sgd, graph, compressor, 0.5)
  formula = bytes_per_step(graph, x, compressor=compressor)
  assert sent(tx).tolist() == [formula] * 2 == [18.0] * 2


def test_without_a_count_bytes_are_unknown():
  tx = optimizers.adapt_then_combine(optax.sgd(RATE), topology.ring(3))
  train = functools.partial(trace, tx, lambda x: x**2, steps=2)
  _, _, seen = jfog.simulate(train, 3)(jnp.ones(3))
  assert seen.bytes_per_step.shape == (3, 2)
  assert np.all(np.isnan(seen.bytes_per_step))
  assert seen.distance is None


@pytest.mark.places("single")
def test_alone_nothing_is_sent_and_the_state_goes_on(place):
  tx = optimizers.gradient_allreduce(optax.sgd(RATE, momentum=0.9))
  train = functools.partial(trace, tx, jnp.square)
  x, state, first = train(2.0, 3)
  x, _, second = train(x, 2, state=state)
  whole, _, seen = train(2.0, 5)
  assert float(x) == float(whole)
  joined = [*first.loss.tolist(), *second.loss.tolist()]
  assert joined == seen.loss.tolist()
  assert seen.bytes_per_step.tolist() == [0.0] * 5


@pytest.mark.places("single")
@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"steps": 2, "every": 0}, "every=0 must be at least 1"),
    (
      {"steps": 3, "batches": {"x": np.zeros([2, 5])}},
      r"batches\['x'\] has shape \(2, 5\).*steps=3",
    ),
  ],
)
def test_invalid_arguments_are_refused(place, options, text):
  with pytest.raises(ValueError, match=text):
    trace(optax.sgd(RATE), jnp.square, jnp.ones([]), **options)


def test_every_optimizer_and_compressor_has_a_row():
  """docs/optimizers.md leaves nothing out, and lists nothing that is not there."""
  text = (ROOT / "docs" / "optimizers.md").read_text()
  rows = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
  functions = {
    name
    for name, _ in inspect.getmembers(optimizers, inspect.isfunction)
    if not name.startswith("_") and name != "message_bytes"
  }
  assert rows == functions
