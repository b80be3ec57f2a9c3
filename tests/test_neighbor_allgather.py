"""Gathers of the in-neighbors' values, equal and differing in length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog.topology import (
  ceca,
  exponential,
  one_peer,
  one_peer_exponential,
  ring,
  star,
)

gather = jfog.neighbor_allgather


def sources(graph, rank, step=0):
  """The in-neighbors, from the columns of the mixing matrix."""
  row = graph[step].mixing_matrix[rank]
  return [j for j in range(graph.size) if j != rank and row[j] != 0]


def gathered(graph, x, step=0):
  """The result of every rank: a list, as lengths may differ."""
  return [
    np.concatenate([x[j] for j in sources(graph, i, step)] or [x[i][:0]])
    for i in range(graph.size)
  ]


def stacked(place, parts):
  """The truth in the form of the result of `run`."""
  if place.kind in ("simulate", "mesh"):
    return np.stack(parts)
  return parts[jfog.rank()]


def lengths(size, unit):
  """Differing lengths, one of them 0 where there are more than two ranks."""
  return [unit * ((3 * i + 1) % 4) for i in range(size)]  # 1, 0, 3, 2, 1


@pytest.mark.two_axes
@pytest.mark.mpi(2, 3, 4)
def test_value(place, rng):
  n = place.size
  graphs = [ring(n, "left"), exponential(n)]
  tree = {
    "matrix": rng.randn(n, 3, 2).astype(np.float32),
    "scalar": np.arange(n),
    "bool": rng.rand(n, 4) < 0.5,
    "half": rng.randn(n, 40_001).astype(jnp.bfloat16),
    "empty": np.zeros((n, 0, 3), np.int8),
  }
  fun = jax.jit(lambda tree: [gather(tree, graph) for graph in graphs])
  for graph, y in zip(graphs, place.run(fun, tree), strict=True):
    for name, leaf in tree.items():
      x = leaf[:, None] if leaf.ndim == 1 else leaf
      np.testing.assert_array_equal(y[name], stacked(place, gathered(graph, x)))
      assert y[name].dtype == jnp.asarray(leaf).dtype


@pytest.mark.mpi(3)
def test_traced_step_of_a_schedule(place, rng):
  """Traced once; and at known steps, eagerly."""
  n = place.size
  graph = one_peer_exponential(n)
  x = rng.randn(n, 4).astype(np.float32)
  traces = 0

  @jax.jit
  def fun(x, step):
    nonlocal traces
    traces += 1
    return gather(x, graph, step)

  for step in range(-1, 3):
    y = place.run(fun, x, np.full(n, step, np.int32))
    np.testing.assert_array_equal(y, stacked(place, gathered(graph, x, step)))
  if place.kind == "mpi":
    assert traces == 1
  y = place.run(lambda x: gather(x, graph, 1), x)
  np.testing.assert_array_equal(y, stacked(place, gathered(graph, x, 1)))


@pytest.mark.places("mpi-3", "mpi-4", "single")
def test_irregular_graphs_between_processes(place, rng):
  n = place.size
  x = rng.randn(n, 3, 2).astype(np.float32)
  y = place.run(jax.jit(lambda x: gather(x, star(n))), x)
  np.testing.assert_array_equal(y, stacked(place, gathered(star(n), x)))


@pytest.mark.two_axes
@pytest.mark.mpi(3)
def test_padding(place, rng):
  """To the longest of any rank and round, with zeros behind."""
  n = place.size
  graph = one_peer(star(n)) if n > 2 else ring(n)
  x = rng.randn(n, 2, 3).astype(np.float32)
  slots = max(
    len(sources(graph, i, t)) for t in range(len(graph)) for i in range(n)
  )
  program = jax.jit(
    lambda x, step: (
      gather(x, graph, step, pad=True),
      gather(x, star(n), pad=True),
    )
  )
  for step in range(2):
    y, z = place.run(program, x, np.full(n, step, np.int32))
    for result, g, t, length in (
      (y, graph, step, 2 * slots),
      (z, star(n), 0, 2 * (n - 1)),
    ):
      parts = [
        np.concatenate([part, np.zeros((length - len(part), 3), np.float32)])
        for part in gathered(g, x, t)
      ]
      np.testing.assert_array_equal(result, stacked(place, parts))


@pytest.mark.places("simulate-5", "mesh-4")
def test_irregular_graphs_on_a_mesh_are_refused(place):
  x = np.zeros((place.size, 2), np.float32)
  with pytest.raises(ValueError, match=r"from 1 to .*pad=True"):
    place.run(lambda x: gather(x, star(place.size)), x)


@pytest.mark.places("mpi-3", "mpi-4")
def test_rounds_of_different_lengths_need_a_known_step(place):
  n = place.size
  graph = one_peer(star(n))
  x = np.zeros(2, np.float32)
  # Per rank: the center of the star has one in-neighbor in every round.
  totals = {len(sources(graph, jfog.rank(), t)) for t in range(len(graph))}
  if len(totals) > 1:
    with pytest.raises(ValueError, match="traced step"):
      jax.eval_shape(lambda x, step: gather(x, graph, step), x, np.int32(0))
  else:
    jax.eval_shape(lambda x, step: gather(x, graph, step), x, np.int32(0))


@pytest.mark.places("mpi-2", "mpi-4")
def test_differing_lengths(place, rng):
  """Short, and in chunks: of each edge as many as it needs."""
  n, rank = place.size, jfog.rank()
  for unit, width in ((1, 2), (9_001, 3), (40, 0)):
    sizes = lengths(n, unit)
    parts = [rng.randn(size, width).astype(np.float32) for size in sizes]
    other = [np.full(size, i, np.int16) for i, size in enumerate(sizes)]
    for graph in (exponential(n), star(n), ring(n, "right")):

      @jax.jit
      def program(x, z, graph=graph, sizes=sizes):
        handle = jfog.neighbor_allgather_start((x, z), graph, axis_sizes=sizes)
        return gather((x, z), graph, axis_sizes=sizes), jfog.wait(handle)

      whole, waited = program(parts[rank], other[rank])
      for y, z in (whole, waited):
        np.testing.assert_array_equal(y, gathered(graph, parts)[rank])
        np.testing.assert_array_equal(z, gathered(graph, other)[rank])


@pytest.mark.places("mpi-4")
def test_derivative_with_differing_lengths(place, rng):
  n, rank = place.size, jfog.rank()
  for unit in (1, 12_001):
    sizes = lengths(n, unit)
    for graph in (star(n), exponential(n)):
      cotangents = [
        rng.randn(sum(sizes[j] for j in sources(graph, i)), 2) for i in range(n)
      ]
      truth = np.zeros((sizes[rank], 2))
      for i in range(n):
        at = 0
        for j in sources(graph, i):
          if j == rank:
            truth += cotangents[i][at : at + sizes[j]]
          at += sizes[j]
      c = cotangents[rank].astype(np.float32)
      grad = jax.jit(
        jax.grad(
          lambda x, graph=graph, sizes=sizes, c=c: jnp.vdot(
            gather(x, graph, axis_sizes=sizes), c
          )
        )
      )(np.zeros((sizes[rank], 2), np.float32))
      np.testing.assert_allclose(grad, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.two_axes
@pytest.mark.mpi(4)
def test_derivatives_and_vmap(place, rng):
  n = place.size
  graph = exponential(n)
  degree = len(sources(graph, 0))
  x = rng.randn(n, 3, 2).astype(np.float32)
  c = rng.randn(n, 3 * degree, 2).astype(np.float32)

  @jax.jit
  def program(x, c):
    return (
      jax.grad(lambda x: jnp.vdot(gather(x, graph), c))(x),
      jax.jvp(lambda x: gather(x, graph), (x,), (x,))[1],
      jax.vmap(lambda x: gather(x, graph), 1, 1)(x),
      # The transpose of the transpose.
      jax.jvp(
        lambda c: jax.vjp(lambda x: gather(x, graph), x)[1](c)[0], (c,), (c,)
      )[1],
    )

  grad, tangent, mapped, twice = place.run(program, x, c)
  truth = np.zeros_like(x)
  for i in range(n):
    for k, j in enumerate(sources(graph, i)):
      truth[j] += c[i, 3 * k : 3 * k + 3]
  np.testing.assert_allclose(grad, place.mine(truth), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(twice, place.mine(truth), rtol=1e-4, atol=1e-5)
  for y in (tangent, mapped):
    np.testing.assert_array_equal(y, stacked(place, gathered(graph, x)))


@pytest.mark.places("mpi-3", "mpi-4")
def test_peers_in_the_order_of_their_keys(place, rng):
  n, rank = place.size, jfog.rank()
  sizes = [i + 1 for i in range(n)]
  parts = [rng.randn(size).astype(np.float32) for size in sizes]
  others = [j for j in reversed(range(n)) if j != rank]
  everybody = jfog.Peers(0.5, dict.fromkeys(others, 0.1), others)
  fun = jax.jit(lambda x, peers: gather(x, peers, axis_sizes=sizes))
  truth = np.concatenate([parts[j] for j in others])
  np.testing.assert_array_equal(fun(parts[rank], everybody), truth)
  grad = jax.grad(lambda x: (rank + 1) * fun(x, everybody).sum())
  total = n * (n + 1) / 2 - (rank + 1)
  np.testing.assert_allclose(
    grad(jnp.asarray(parts[rank])), np.full(sizes[rank], total)
  )
  # Rank 0 only sends, the last one only receives.
  peers = jfog.Peers(
    0.0,
    {0: 1.0} if rank == n - 1 else {},
    [n - 1] if rank == 0 else [],
  )
  truth = parts[0] if rank == n - 1 else parts[rank][:0]
  np.testing.assert_array_equal(fun(parts[rank], peers), truth)


# Errors are raised before the first message, on every rank.


@pytest.mark.mpi(2)
def test_bad_arguments(place):
  n = place.size
  x = np.zeros((n, 2), np.float32)

  def refused(error, match, *args, **kwargs):
    for call in (gather, jfog.neighbor_allgather_start):
      with pytest.raises(error, match=match):
        place.run(lambda x, call=call: call(x, *args, **kwargs), x)

  refused(ValueError, rf"{n + 1} ranks", ring(n + 1))
  refused(TypeError, "protocol", ceca(n))
  refused(TypeError, "'ring'", "ring")
  refused(ValueError, "needs a step", one_peer_exponential(n))
  refused(ValueError, "axis_sizes", ring(n), axis_sizes=[2] * (n + 1))
  refused(ValueError, "axis_sizes", ring(n), axis_sizes=[-1] * n)
  refused(ValueError, "axis_sizes", ring(n), axis_sizes=[3] * n)
  refused(TypeError, "ints", ring(n), axis_sizes=[2.0] * n)
  if place.kind in ("simulate", "mesh"):
    refused(ValueError, "one program", jfog.Peers(1.0, {}, {}))
  else:
    for bad in (n, jfog.rank()):
      refused(ValueError, f"rank {bad} on", jfog.Peers(1.0, {bad: 1.0}, {}))
