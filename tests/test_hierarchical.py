"""Averages inside machines and between them, and the machines themselves."""

import functools
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import reference

import jfog
import jfog.runtime
from jfog.topology import (
  ceca,
  exponential,
  one_peer_exponential,
  ring,
  star,
)

average = jfog.hierarchical_neighbor_allreduce

# Machines x local ranks: 2x1, 1x3, 2x2, 3x2, 2x3, 2x4, 4x2.
SOME = ("simulate-6x2", "mesh-4x2", "mpi-3x3", "mpi-4x2", "mpi-6x3")
ALL = (*SOME, "simulate-8x4", "mpi-2x1", "mpi-6x2", "mpi-8x4", "mpi-8x2")


def matrix(graph, place, step=0):
  """The function of all ranks: the mean inside, the graph between."""
  inside = reference.mean(place.local_size)
  return np.kron(reference.mixing(graph, step), inside)


def apply(graph, place, x, step=0):
  """The dense truth, in float64 or complex128."""
  wide = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
  return np.tensordot(matrix(graph, place, step), wide, axes=1)


def machines(place):
  """The number of machines of a place."""
  return place.size // place.local_size


@pytest.mark.places(*ALL)
def test_value_is_the_dense_product(place, rng):
  """Of any number of elements, on directed and irregular graphs."""
  m, n = machines(place), place.size
  graphs = [star(m), ring(m, "left")]
  tree = {
    "scalar": rng.randn(n).astype(np.float32),
    "empty": np.zeros((n, 0, 2), np.float32),
    "long": rng.randn(n, 7, 5_003).astype(np.float32),
    "complex": (rng.randn(n, 5) + 1j * rng.randn(n, 5)).astype(np.complex64),
  }
  fun = jax.jit(lambda tree: [average(tree, graph) for graph in graphs])
  for y, graph in zip(place.run(fun, tree), graphs, strict=True):
    for name, leaf in tree.items():
      truth = place.mine(apply(graph, place, leaf))
      np.testing.assert_allclose(y[name], truth, rtol=1e-5, atol=1e-5)
      assert y[name].dtype == leaf.dtype
      assert np.shape(y[name]) == np.shape(truth)


@pytest.mark.places("simulate-6x2", "mesh-4x2", "mpi-4x2")
def test_float64_and_16_bits(place, rng, x64):
  m, n = machines(place), place.size
  for dtype, tolerance in (
    (np.float64, 1e-12),
    (np.complex128, 1e-12),
    (np.float16, 4e-3),
    (jnp.bfloat16, 3e-2),
  ):
    x = rng.randn(n, 33).astype(dtype)
    y = place.run(lambda x: average(x, ring(m)), x)
    truth = place.mine(apply(ring(m), place, x))
    assert y.dtype == x.dtype
    wide = np.asarray(y).astype(truth.dtype)
    np.testing.assert_allclose(wide, truth, rtol=0, atol=tolerance)


@pytest.mark.places(*SOME)
def test_schedule_with_a_traced_step_is_traced_once(place, rng):
  m, n = machines(place), place.size
  graph = one_peer_exponential(m)
  x = rng.randn(n, 40).astype(np.float32)
  traces = 0

  def program(x):
    def body(x, step):
      nonlocal traces
      traces += 1
      return average(x, graph, step), None

    return lax.scan(body, x, jnp.arange(5))[0]

  y = place.run(jax.jit(program), x)
  truth = x
  for step in range(5):
    truth = apply(graph, place, truth, step)
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-4, atol=1e-5)
  assert traces == 1


@pytest.mark.places(*SOME)
def test_gradient_vmap_and_start(place, rng):
  m, n = machines(place), place.size
  graph = star(m) if m > 2 else ring(m, "left")
  x = rng.randn(n, 6, 2).astype(np.float32)
  c = rng.randn(n, 6, 2).astype(np.float32)

  @jax.jit
  def program(x, c):
    handle = jfog.hierarchical_neighbor_allreduce_start(x, graph)
    return (
      jax.grad(lambda x: jnp.vdot(average(x, graph), c))(x),
      jax.jvp(lambda x: average(x, graph), (x,), (c,))[1],
      jax.vmap(lambda x: average(x, graph), 1, 1)(x),
      jfog.wait(handle),
    )

  grad, tangent, mapped, waited = place.run(program, x, c)
  adjoint = np.tensordot(matrix(graph, place).T, c, axes=1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(grad, place.mine(adjoint))
  close(tangent, place.mine(apply(graph, place, c)))
  close(mapped, place.mine(apply(graph, place, x)))
  close(waited, place.mine(apply(graph, place, x)))


@pytest.mark.places(*SOME, "simulate-6x3")
def test_equal_values_stay_bit_for_bit(place):
  row = np.random.RandomState(1).randn(1000).astype(np.float32)
  x = np.tile(row, (place.size, 1))
  y = place.run(lambda x: average(x, ring(machines(place))), x)
  np.testing.assert_array_equal(y, place.mine(x))


@pytest.mark.host("with NCCL comm.local and comm.machines count it")
@pytest.mark.places("mpi-4x2", "mpi-6x3", "mpi-8x4")
def test_every_rank_sends_its_share_to_other_machines(place, rng):
  """`1 / local_size` of the vector to each neighboring machine."""
  m, local = machines(place), place.local_size
  for graph, count in ((ring(m), 10), (ring(m), 120_000), (exponential(m), 7)):
    x = rng.randn(place.size, count).astype(np.float32)
    jfog.diagnostics.reset_counters()
    place.run(lambda x, graph=graph: average(x, graph), x)
    peers = jfog.diagnostics.counters()["peers"]
    mine = jfog.machine_rank()
    sent = {}
    for peer, counts in peers.items():
      if peer // local != mine:
        assert peer % local == jfog.local_rank()
        sent[peer // local] = counts["bytes_sent"]
    assert sorted(sent) == list(graph.out_neighbors(mine))
    for count_sent in sent.values():
      assert abs(count_sent - 4 * count / local) < 4
    # Inside: its own part goes out, and the other parts come and go.
    inside = sum(
      counts["bytes_sent"]
      for peer, counts in peers.items()
      if peer // local == mine
    )
    assert abs(inside - 2 * 4 * count * (local - 1) / local) < 8 * local


@pytest.mark.places("mpi-3x3", "mpi-4x2")
def test_many_operations_at_once(place, rng):
  """More than there are channels, of several segments, waited for backwards."""
  graph = ring(machines(place))
  xs = [rng.randn(place.size, 200_003).astype(np.float32) for _ in range(5)]

  @jax.jit
  def program(*xs):
    handles = [jfog.hierarchical_neighbor_allreduce_start(x, graph) for x in xs]
    between = jfog.neighbor_allreduce(xs[0], ring(place.size))
    return [jfog.wait(h) for h in reversed(handles)], between

  for _ in range(3):
    results, between = place.run(program, *xs)
    for y, x in zip(results, reversed(xs), strict=True):
      truth = place.mine(apply(graph, place, x))
      np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-5)
    truth = place.mine(reference.mixing(ring(place.size)) @ xs[0])
    np.testing.assert_allclose(between, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.places("mpi-4")
def test_without_shared_memory(place, in_job):
  """In messages alone; in a job of its own."""
  if in_job:
    return
  program = """
import jax, jfog, numpy as np
world = jfog.init(local_size=2, timeout=60)
x = np.random.RandomState(0).randn(4, 300_007).astype(np.float32)
graph = jfog.topology.ring(2)
fun = jax.jit(lambda x: jfog.hierarchical_neighbor_allreduce(x, graph))
for _ in range(3):
  y = fun(x[world.rank])
np.testing.assert_allclose(y, x.mean(axis=0), rtol=1e-5, atol=1e-5)
"""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "jfog.cli", "run", "--no-tag-output"),
      *("-np", "4"),
      *("env", "JFOG_SHARED_MEMORY=0", sys.executable, "-c", program),
    ],
    cwd=pathlib.Path(__file__).parent,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr.decode()


# Communicators inside a machine and across machines.


@pytest.mark.places("simulate-6x2", "mesh-4x2", "mpi-4x2", "mpi-6x3", "mpi-3x3")
def test_sub_communicators(place, rng):
  x = rng.randn(place.size, 4).astype(np.float32)
  m, local = machines(place), place.local_size

  def program(x):
    comm = jfog.runtime.resolve()
    inside, across = comm.local, comm.machines
    assert (inside.size, across.size) == (local, m)
    assert (inside.machine_size, inside.local_size) == (1, local)
    assert (across.machine_size, across.local_size) == (m, 1)
    return (
      jfog.allreduce(x, "sum", comm=inside),
      jfog.allreduce(x, "sum", comm=across),
      jfog.allgather(x, comm=inside),
      jfog.broadcast(x, local - 1, comm=inside),
      average(x, ring(1), comm=inside),
      average(x, ring(m), comm=across),
      comm.rank - comm.machine_rank * local - comm.local_rank,
    )

  results = place.run(jax.jit(program), x)
  groups = x.reshape(m, local, 4)

  def spread(by_machine):
    return np.repeat(by_machine, local, axis=0)

  across = np.tile(groups.sum(axis=0), (m, 1, 1)).reshape(place.size, 4)
  mixed = np.einsum("ab,bli->ali", reference.mixing(ring(m)), groups)
  truths = (
    spread(groups.sum(axis=1)),
    across,
    spread(groups.reshape(m, local * 4)).reshape(place.size, local, 4),
    spread(groups[:, -1]),
    spread(groups.mean(axis=1)),
    mixed.reshape(place.size, 4),
    np.zeros(place.size),
  )
  for k, (y, truth) in enumerate(zip(results, truths, strict=True)):
    y = np.reshape(y, np.shape(place.mine(truth)))
    np.testing.assert_allclose(
      y, place.mine(truth), rtol=1e-5, atol=1e-5, err_msg=str(k)
    )


@pytest.mark.places("mpi-3")
def test_machines_of_different_sizes(place, rng, monkeypatch):
  """Hierarchy is refused with the counts; all else works."""
  x = rng.randn(3, 5).astype(np.float32)
  native = jfog.runtime.mpi()
  uneven = types.SimpleNamespace(
    **{name: getattr(native, name) for name in dir(native)}
  )
  uneven.machines = lambda context: [0, 0, 2]
  monkeypatch.setattr("jfog.runtime._extensions.mpi", lambda: uneven)
  jfog.shutdown()
  try:
    world = jfog.init(timeout=60)
    assert world.machine_size == 2
    assert world.local_size == (2, 2, 1)[place.mine(np.arange(3))]
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
      _ = world.machines
    for start in (average, jfog.hierarchical_neighbor_allreduce_start):
      with pytest.raises(ValueError, match=r"\[2, 1\].*local_size"):
        place.run(lambda x, start=start: start(x, ring(2)), x)
    y = place.run(
      lambda x: (
        jfog.allreduce(x),
        jfog.neighbor_allreduce(x, ring(3)),
        jfog.allreduce(x, "sum", comm=world.local),
      ),
      x,
    )
    truths = (
      np.tile(x.mean(axis=0), (3, 1)),
      np.tile(x.mean(axis=0), (3, 1)),
      np.stack([x[0] + x[1], x[0] + x[1], x[2]]),
    )
    for one, truth in zip(y, truths, strict=True):
      np.testing.assert_allclose(one, place.mine(truth), rtol=1e-5, atol=1e-5)
  finally:
    jfog.shutdown()
    monkeypatch.undo()
    jfog.init(timeout=60)


def peers_of(place, machine):
  """A directed choice of each machine: from all machines before it."""
  before = list(range(machine))
  after = list(range(machine + 1, machines(place)))
  own = 1 / (machine + 1)
  return jfog.Peers(own, {b: own / 2 for b in before}, {b: 2.0 for b in after})


@pytest.mark.places("mpi-4x2", "mpi-3x1", "mpi-3x3", "single")
def test_machines_that_choose_their_peers(place, rng):
  n, m = place.size, machines(place)
  tree = {
    "matrix": rng.randn(n, 5, 7).astype(np.float32),
    "scalar": rng.randn(n),
    "empty": np.zeros((n, 0, 3), np.float32),
    "complex": (rng.randn(n, 3) + 1j * rng.randn(n, 3)).astype(np.complex64),
  }
  mixing = np.zeros((m, m))
  for a in range(m):
    mixing[a, : a + 1] = 1 / (a + 1)
  dense = np.kron(
    mixing, np.full((place.local_size,) * 2, 1 / place.local_size)
  )
  start = jfog.hierarchical_neighbor_allreduce_start

  def own(comm):
    return peers_of(place, comm.machine_rank)

  def program(x):
    comm = jfog.runtime.resolve()
    gradient = jax.grad(lambda x: jnp.sum(average(x, own(comm)) * x[0]))
    return (
      average(x, own(comm)),
      jfog.wait(start(x, own(comm))),
      gradient(x["scalar"][None])[0],
    )

  for compiled in (program, jax.jit(program)):
    blocking, split, gradient = place.run(compiled, tree)
    for name, x in tree.items():
      truth = np.einsum("ij,j...->i...", dense, x)
      for y in (blocking[name], split[name]):
        assert np.shape(y)[-x.ndim + 1 :] == x.shape[1:] or x.ndim == 1
        np.testing.assert_allclose(
          y, place.mine(truth), rtol=1e-5, atol=1e-6, err_msg=name
        )
    x = tree["scalar"]
    truth = dense.T @ x + dense @ x
    np.testing.assert_allclose(
      gradient, place.mine(truth), rtol=1e-4, atol=1e-5
    )


@pytest.mark.places("mpi-4x2", "simulate-6x2", "single")
def test_bad_peers_of_machines(place, rng):
  x = rng.randn(place.size, 3).astype(np.float32)
  m = machines(place)
  text = "on a mesh" if place.kind == "simulate" else f"rank {m}"
  for call in (average, jfog.hierarchical_neighbor_allreduce_start):
    with pytest.raises(ValueError, match=text):
      place.run(lambda x, c=call: c(x, jfog.Peers(0.5, {m: 0.5}, [])), x)


# Errors are raised before the first message, on every rank.


@pytest.mark.places("simulate-6x2", "mesh-4x2", "mpi-4x2", "single")
def test_bad_arguments(place, rng):
  m = machines(place)
  x = rng.randn(place.size, 3).astype(np.float32)

  def refused(error, match, *args, leaf=None):
    for call in (average, jfog.hierarchical_neighbor_allreduce_start):
      with pytest.raises(error, match=match):
        place.run(lambda x, call=call: call(leaf or x, *args), x)

  refused(ValueError, rf"{m + 1} ranks.*{m} machines", ring(m + 1))
  if place.local_size > 1:
    refused(ValueError, "neighbor_allreduce", ring(place.size))
  refused(TypeError, "protocol", ceca(m))
  refused(TypeError, "'ring'", "ring")
  refused(ValueError, "needs a step", one_peer_exponential(m))
  refused(TypeError, "integer scalar", one_peer_exponential(m), 1.5)
  refused(TypeError, "int32", ring(m), leaf=jnp.int32(1))
  refused(TypeError, "bool", ring(m), leaf=jnp.asarray(True))
