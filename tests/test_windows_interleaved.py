"""Operations on windows in any order against the model of all ranks' slots.

Pretended machines, as in `mpi-3x1`, reach each other by messages instead of memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import reference
from support.windows import (
  Model,
  close,
  create,
  free,
  random_graph,
  scenarios,
  some,
)

import jfog

ROUNDS = 6


def operations(graph):
  """Pairs `(what a rank does, what the model does)`."""
  matrix = reference.mixing(graph)
  even = np.arange(graph.size) % 2 == 0
  ones = np.ones_like(matrix)

  def put(win, v, self_weight, w):
    return v, jfog.win_put(win, v, dst_weights=w[:, jfog.rank()])

  def accumulate(win, v, self_weight, w):
    return v, jfog.win_accumulate(win, v, dst_weights=0.25)

  def accumulate_to_some(win, v, self_weight, w):
    weights = some(graph.out_neighbors, w[:, jfog.rank()])
    return v, jfog.win_accumulate(win, v, dst_weights=weights)

  def get_of_some(win, v, self_weight, w):
    weights = some(graph.in_neighbors, w[jfog.rank()])
    return v, jfog.win_get(win, src_weights=weights)

  def update(win, v, self_weight, w):
    return jfog.win_update(win, v)

  def update_of_some(win, v, self_weight, w):
    weights = some(graph.in_neighbors, w[jfog.rank()])
    return jfog.win_update(win, v, self_weight=self_weight, src_weights=weights)

  def only_look(win, v, self_weight, w):
    y, win = jfog.win_update(win, v, expose=False)
    return jnp.append(y[:-1], v[-1]), win  # p stays

  def only_expose(win, v, self_weight, w):
    return jfog.win_update(win, v, self_weight=1, src_weights={})

  def reset(win, v, self_weight, w):
    return jfog.win_update(
      win, v, self_weight=self_weight, src_weights=w[jfog.rank()], reset=True
    )

  def collect(win, v, self_weight, w):
    return jfog.win_update_then_collect(win, v)

  def model_look(model, x, s, w):
    before = model.exposed
    y = model.update(x, matrix.diagonal(), matrix)
    model.exposed = before
    return np.column_stack([y[:, :-1], x[:, -1]])

  return [
    (put, lambda model, x, s, w: model.send(x, w, False)),
    (accumulate, lambda model, x, s, w: model.send(x, ones / 4, True)),
    (accumulate_to_some, lambda model, x, s, w: model.send(x, w, True, even)),
    (get_of_some, lambda model, x, s, w: model.get(w, even)),
    (
      update,
      lambda model, x, s, w: model.update(x, matrix.diagonal(), matrix),
    ),
    (update_of_some, lambda model, x, s, w: model.update(x, s, w, even)),
    (only_look, model_look),
    (only_expose, lambda model, x, s, w: model.update(x, ones[0], w, False)),
    (reset, lambda model, x, s, w: model.update(x, s, w, reset=True)),
    (
      collect,
      lambda model, x, s, w: model.update(x, ones[0], ones, reset=True),
    ),
  ]


def interleaved(graph, kinds, zero_init, delay):
  """A program of one rank: the operations `kinds`, round after round."""
  table = operations(graph)

  def program(x, noise, self_weights, weights):
    win = create(x, graph, delay, zero_init=zero_init, associated_p=True)

    def one_round(carry, inputs):
      win, x = carry
      results = []
      for k, kind in enumerate(kinds):
        noise, self_weights, weights = (values[k] for values in inputs)
        operation, _ = table[kind]
        x, win = operation(win, x + noise, self_weights[jfog.rank()], weights)
        jfog.barrier()
        results.append((x, jfog.win_associated_p(win), jfog.win_version(win)))
        jfog.barrier()  # before the next writes
      return (win, x), results

    inputs = noise, self_weights, weights
    (win, _), results = lax.scan(one_round, (win, x), inputs)
    free(win)
    return results

  return program


def interleaved_by_model(graph, kinds, zero_init, delay, arguments):
  """The same of all ranks."""
  x, noise, self_weights, weights = arguments
  table = operations(graph)
  model = Model(graph, x, zero_init, delay)
  results = []
  for r in range(ROUNDS):
    for k, kind in enumerate(kinds):
      x = x + noise[:, r, k]
      y = table[kind][1](model, x, self_weights[r, k], weights[r, k])
      x = x if y is None else y
      results.append((x, model.p.copy(), model.versions.copy()))
  # [operation][x, p, versions], and then by rank and round, as the program's.
  return [
    [
      np.stack(parts, axis=1)
      for parts in zip(*results[k :: len(kinds)], strict=True)
    ]
    for k in range(len(kinds))
  ]


@pytest.mark.mpi(2, "3x1")
def test_any_interleaving_is_the_models(place, x64, rng):
  n = place.size
  for graph, dtype, zero_init, delay in scenarios(place):
    kinds = rng.permutation(len(operations(graph)))
    x = rng.randn(n, 4).astype(dtype)
    noise = rng.randn(n, ROUNDS, len(kinds), 4).astype(dtype)
    # The last entry goes along with p.
    x[..., -1] = 1
    noise[..., -1] = 0
    self_weights = rng.rand(ROUNDS, len(kinds), n)
    weights = rng.rand(ROUNDS, len(kinds), n, n) / n
    arguments = x, noise, self_weights, weights
    scenario = graph, kinds, zero_init, delay
    run = jax.jit(place.map(interleaved(*scenario), (0, 0, None, None)))
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for (y, p, versions), truth in zip(
      run(*arguments), interleaved_by_model(*scenario, arguments), strict=True
    ):
      assert y.dtype == p.dtype == dtype
      close(y, place.mine(truth[0]), tolerance)
      close(p, place.mine(truth[1]), tolerance)
      np.testing.assert_array_equal(versions, place.mine(truth[2]))
      # p undergoes the arithmetic of the data, bit for bit.
      np.testing.assert_array_equal(y[..., -1], p)


@pytest.mark.mpi("4x2")
def test_push_sum_finds_the_average_and_loses_nothing(place, x64, rng):
  n = place.size
  graph = random_graph(n, 0)
  x = rng.randn(n, 3)
  columns = rng.rand(80, 2, n, n)  # of weights [dst, src]; half is sent at most
  columns *= (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  columns /= 2 * columns.sum(axis=2, keepdims=True).clip(1)
  delay = np.asarray(2)
  if place.kind == "simulate":
    delay = rng.randint(0, 4, (n, n))
  if place.kind == "mpi":
    delay = np.asarray(0)

  def program(x, columns):
    win = create(x, graph, delay, zero_init=True, associated_p=True)

    def update(win, x, keeps, src_weights):
      jfog.barrier()
      x, win = jfog.win_update(
        win, x, self_weight=keeps, src_weights=src_weights, reset=True
      )
      jfog.barrier()
      return x, win

    def step(carry, columns):
      win, x = carry
      first, second = columns[:, :, jfog.rank()]
      win = jfog.win_accumulate(win, x, dst_weights=first)
      of_some = some(graph.in_neighbors, np.ones(n, int))
      x, win = update(win, x, 1 - first.sum(), of_some)
      win = jfog.win_accumulate(win, x, dst_weights=second)
      win = jfog.win_accumulate(win, x, dst_weights=second)
      x, win = update(win, x, 1 - 2 * second.sum(), 1)
      return (win, x), None

    (win, x), _ = lax.scan(step, (win, x), columns)
    for _ in range(np.max(delay) + 1):  # what is still on its way
      x, win = jfog.win_update_then_collect(win, x)
    p = jfog.win_associated_p(win)
    free(win)
    return x, p, jfog.allreduce((x, p), "sum")

  run = jax.jit(place.map(program, (0, None)))
  y, p, (total, mass) = run(x, columns)
  mean = x.mean(axis=0)
  np.testing.assert_allclose(mass, n, rtol=1e-12)
  np.testing.assert_allclose(total - n * mean, 0 * total, atol=1e-11)
  np.testing.assert_allclose(y / p[..., None], 0 * y + mean, atol=1e-8)
