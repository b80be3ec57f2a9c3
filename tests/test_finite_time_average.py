"""The exact average in finitely many rounds, for every number of ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
import jfog.runtime
from jfog.topology import (
  base_k,
  ceca,
  fully_connected,
  hyper_hypercube,
  one_peer_exponential,
  ring,
  simple_base,
)

average = jfog.finite_time_average


def graphs(size):
  """One of every kind that reaches the average at this size."""
  return [
    ceca(size),
    hyper_hypercube(size),
    base_k(size, 1),
    simple_base(size, 2),
    fully_connected(size),
    *([one_peer_exponential(size)] if size & (size - 1) == 0 else []),
  ]


@pytest.mark.mpi(1, 2, 3, 4)
def test_value(place, rng):
  """Whole and started; any shapes, and dtypes that hold fractions."""
  n = place.size
  tree = {
    "scalar": rng.randn(n).astype(np.float32),
    "long": rng.randn(n, 3, 20_001).astype(np.float32),
    "bfloat": rng.randn(n, 5).astype(jnp.bfloat16),
    "complex": (rng.randn(n, 3) + 1j * rng.randn(n, 3)).astype(np.complex64),
  }
  if place.kind == "mpi":
    tree["empty"] = np.zeros((n, 0, 2), np.float16)

  def program(tree):
    started = graphs(n)[:3] if place.kind == "mpi" else graphs(n)[:1]
    handles = [jfog.finite_time_average_start(tree, g) for g in started]
    whole = [average(tree, g) for g in graphs(n)]
    return whole, [jfog.wait(handle) for handle in handles]

  whole, waited = place.run(jax.jit(program), tree)
  for y in (*whole, *waited):
    for name, leaf in tree.items():
      wide = leaf.astype(np.complex128 if name == "complex" else np.float64)
      truth = place.mine(np.broadcast_to(wide.mean(axis=0), leaf.shape))
      assert y[name].dtype == leaf.dtype
      tolerance = 2e-2 if name == "bfloat" else 2e-6
      np.testing.assert_allclose(
        np.asarray(y[name]).astype(wide.dtype), truth, rtol=0, atol=tolerance
      )


@pytest.mark.mpi(3, 4)
def test_derivatives_vmap_and_float64(place, rng, x64):
  n = place.size
  x, c = rng.randn(2, n, 6, 2)
  for graph in (ceca(n), base_k(n, 1)):

    @jax.jit
    def program(x, c, graph=graph):
      return (
        average(x, graph),
        jax.grad(lambda x: jnp.vdot(average(x, graph), c))(x),
        jax.jvp(lambda x: average(x, graph), (x,), (c,))[1],
        jax.vmap(lambda x: average(x, graph), 1, 1)(x),
      )

    for y, truth in zip(place.run(program, x, c), (x, c, c, x), strict=True):
      truth = np.broadcast_to(truth.mean(axis=0), truth.shape)
      np.testing.assert_allclose(y, place.mine(truth), rtol=0, atol=1e-12)


def test_every_size_in_simulation(soak):
  """All matrices at once: the rows of the identity become their mean."""
  for size in (*range(1, 17), 33, 64) if soak else (1, 2, 3, 5, 7, 12, 33):
    program = jax.jit(
      jfog.simulate(
        lambda x, size=size: [
          average(x, g) for g in (ceca(size), base_k(size, 1))
        ],
        size,
      )
    )
    for y in program(np.eye(size, dtype=np.float32)):
      np.testing.assert_allclose(
        y, np.full((size, size), 1 / size), rtol=1e-5, atol=0
      )


@pytest.mark.places("mpi-16")
def test_every_size_between_processes(place, rng, soak):
  """16 ranks in all their splits into n and 16 - n, which run side by side."""
  native = jfog.runtime.mpi()
  world = jfog.init()
  assert isinstance(world, jfog.runtime.ProcessCommunicator)
  x = rng.randn(place.size, 3).astype(np.float32)
  for n in range(8, 17):
    first = world.rank < n
    context = native.split(world.context, int(first), world.rank, 60.0)
    comm = jfog.runtime.ProcessCommunicator(
      context, native.size(context), native.rank(context)
    )
    assert comm.size == (n if first else place.size - n)
    program = jax.jit(
      lambda x, comm=comm: [
        average(x, g, comm=comm)
        for g in (graphs(comm.size) if soak else graphs(comm.size)[:3:2])
      ]
    )
    members = x[:n] if first else x[n:]
    for y in program(x[world.rank]):
      np.testing.assert_allclose(y, members.mean(axis=0), rtol=0, atol=1e-6)
    native.close(context)


@pytest.mark.mpi(2)
def test_bad_arguments(place):
  n = place.size
  x = np.zeros((n, 2), np.float32)

  def refused(error, match, *args, leaf=None):
    for call in (average, jfog.finite_time_average_start):
      with pytest.raises(error, match=match):
        place.run(lambda x, call=call: call(leaf or x, *args), x)

  refused(ValueError, rf"{n + 1} ranks", ceca(n + 1))
  refused(ValueError, rf"{n + 1} ranks", base_k(n + 1, 1))
  refused(TypeError, "'ring'", "ring")
  refused(TypeError, "Peers", jfog.Peers(1.0, {}, {}))
  refused(TypeError, "int32", ceca(n), leaf=jnp.int32(1))
  if n > 3:
    refused(ValueError, "does not reach", ring(n))
