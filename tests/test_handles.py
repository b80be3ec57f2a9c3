"""Operations that are started and waited for later, in every place."""

import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

ON_MPI = ("mpi-2", "mpi-3", "mpi-4")


@pytest.fixture
def x(place, rng):
  """A value for each rank, long enough to travel in several chunks."""
  return rng.randn(place.size, 5, 9001).astype(np.float32)


def operations(n):
  """Pairs of an operation and its split form, and arguments for both."""
  graph = topology.ring(n)
  schedule = topology.one_peer_exponential(n)
  return {
    "neighbor_allreduce": (
      lambda x: jfog.neighbor_allreduce(x, graph),
      lambda x: jfog.neighbor_allreduce_start(x, graph),
    ),
    "schedule": (
      lambda x: jfog.neighbor_allreduce(x, schedule, jnp.int32(1)),
      lambda x: jfog.neighbor_allreduce_start(x, schedule, jnp.int32(1)),
    ),
    "weights": (
      lambda x: jfog.neighbor_allreduce(
        x, graph, weights=2 * graph.mixing_matrix
      ),
      lambda x: jfog.neighbor_allreduce_start(
        x, graph, weights=2 * graph.mixing_matrix
      ),
    ),
    "pair_gossip": (
      lambda x: jfog.pair_gossip(x, n - 1 - jfog.rank()),
      lambda x: jfog.pair_gossip_start(x, n - 1 - jfog.rank()),
    ),
    "allreduce": (
      lambda x: jfog.allreduce(x, "sum"),
      lambda x: jfog.allreduce_start(x, "sum"),
    ),
    "broadcast": (
      lambda x: jfog.broadcast(x, n - 1),
      lambda x: jfog.broadcast_start(x, n - 1),
    ),
    "allgather": (jfog.allgather, jfog.allgather_start),
  }


NAMES = tuple(operations(1))


@pytest.mark.mpi(1, 3, 4)
@pytest.mark.parametrize("name", NAMES)
def test_the_split_form_gives_the_same_bits(place, x, name):
  whole, start = operations(place.size)[name]

  def both(x):
    handle = start({"a": x, "b": x[:1, :3].astype(jnp.bfloat16)})
    meanwhile = jnp.sin(x).sum()
    return (
      jfog.wait(handle),
      meanwhile,
      whole({"a": x, "b": x[:1, :3].astype(jnp.bfloat16)}),
    )

  split, _, together = place.run(jax.jit(both), x)
  jax.tree.map(np.testing.assert_array_equal, split, together)


@pytest.mark.mpi(2, 3)
def test_derivatives_and_vmap(place, x):
  graph = topology.ring(place.size, "right")
  small = x[:, :, :7]

  def split(x):
    return jfog.wait(jfog.neighbor_allreduce_start(x, graph))

  def whole(x):
    return jfog.neighbor_allreduce(x, graph)

  def every(average):
    def program(x):
      loss = lambda x: jnp.sum(jnp.sin(average(x)) * x)  # noqa: E731
      primal, tangent = jax.jvp(average, (x,), (x * x,))
      return (
        jax.grad(loss)(x),
        primal,
        tangent,
        jax.vmap(average, in_axes=1, out_axes=1)(x),
        jax.vmap(
          lambda x: (
            jfog.wait(jfog.allgather_start(x))
            if average is split
            else jfog.allgather(x)
          ),
          in_axes=1,
          out_axes=1,
        )(x),
      )

    return program

  for ours, truth in zip(
    place.run(every(split), small), place.run(every(whole), small), strict=True
  ):
    np.testing.assert_array_equal(ours, truth)


@pytest.mark.mpi(2, 3)
def test_a_handle_is_carried_through_a_loop(place, x):
  """Delayed averaging: what was started in one step is used in the next."""
  graph = topology.ring(place.size)

  def program(x):
    def body(handle, k):
      y = jfog.wait(handle)
      return jfog.neighbor_allreduce_start(y + k, graph), y.sum()

    handle = jfog.neighbor_allreduce_start(x, graph)
    handle, _ = jax.lax.scan(body, handle, jnp.arange(4.0))
    return jfog.wait(handle)

  truth = np.asarray(x, np.float64)
  matrix = graph.mixing_matrix
  for k in range(5):
    truth = np.tensordot(matrix, truth, 1)
    if k < 4:
      truth = truth + k
  np.testing.assert_allclose(
    place.run(program, x), place.mine(truth), rtol=1e-4, atol=1e-4
  )


def test_waiting_twice_and_on_nothing(place):
  def twice(x):
    handle = jfog.allreduce_start(x)
    jfog.wait(handle)
    return jfog.wait(handle)

  with pytest.raises(ValueError, match="waited on before"):
    place.run(twice, np.ones((place.size, 2), np.float32))
  with pytest.raises(TypeError, match="not a handle"):
    jfog.wait(np.ones(3))  # type: ignore[arg-type]
  with pytest.raises(TypeError, match="not a handle"):
    jfog.poll(None)  # type: ignore[arg-type]


@pytest.mark.places("single", "simulate")
def test_where_the_result_is_part_of_the_handle_poll_is_true(place):
  def program(x):
    handle = jfog.allreduce_start(x)
    ended = jfog.poll(handle)
    return jfog.wait(handle), ended

  _, ended = place.run(program, np.ones((place.size, 2), np.float32))
  assert np.all(ended)


@pytest.mark.places(*ON_MPI)
def test_handles_cross_jit_and_are_waited_on_in_any_order(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  start = jax.jit(lambda x: jfog.neighbor_allreduce_start(x, graph))
  wait = jax.jit(jfog.wait)
  sizes = [3, 200_000, 17, 40_000, 1]
  handles = [start(jnp.full(sizes[k % 5], 100.0 * k + rank)) for k in range(20)]
  order = range(20) if rank % 2 else reversed(range(20))
  for k in order:
    truth = graph.mixing_matrix[rank] @ (100.0 * k + np.arange(n))
    y = wait(handles[k])
    np.testing.assert_allclose([y.min(), y.max()], truth, rtol=1e-6)
  with pytest.raises(jax.errors.JaxRuntimeError, match="is not open"):
    jax.block_until_ready(wait(handles[0]))
  with pytest.raises(jax.errors.JaxRuntimeError, match="is not open"):
    jax.block_until_ready(jax.jit(jfog.poll)(handles[0]))


@pytest.mark.places(*ON_MPI)
def test_the_leaves_may_be_donated_at_once(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  start = jax.jit(lambda x: (jfog.neighbor_allreduce_start(x, graph), x + 1.0))
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  x = jnp.full(300_000, float(rank))
  handle, y = start(x)
  del x
  for _ in range(3):
    y = overwrite(y)
  jax.block_until_ready(y)
  truth = graph.mixing_matrix[rank] @ np.arange(float(n))
  np.testing.assert_allclose(jfog.wait(handle), truth, rtol=1e-6)


@pytest.mark.places("mpi-3")
def test_the_exchange_goes_on_while_nobody_waits(place):
  """A rank asleep in Python still serves its neighbors."""
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  x = jnp.full(1_000_000, float(rank))
  jfog.barrier()
  handle = jfog.neighbor_allreduce_start(x, graph)
  start = time.monotonic()
  if rank == 0:
    time.sleep(6)
  y = jax.block_until_ready(jfog.wait(handle))
  waited = time.monotonic() - start
  np.testing.assert_allclose(
    y[0], graph.mixing_matrix[rank] @ np.arange(float(n)), rtol=1e-6
  )
  if rank != 0:
    assert waited < 5.5
  jfog.barrier()


@pytest.mark.places("mpi-2", "mpi-3")
def test_poll_turns_true_without_a_wait(place):
  world = jfog.init()
  if jfog.rank() == 0:
    # The others have polled before they come here.
    jfog.barrier()
    handle = jfog.allreduce_start(jnp.ones(1000), comm=world.local)
  else:
    handle = jfog.allreduce_start(jnp.ones(1000), comm=world.local)
    assert not jfog.poll(handle)
    jfog.barrier()
  deadline = time.monotonic() + 60
  while not jfog.poll(handle):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  np.testing.assert_array_equal(jfog.wait(handle), 1)


@pytest.mark.places("mpi-2", "mpi-3")
def test_a_shutdown_with_open_handles_is_counted(place):
  jfog.shutdown()
  world = jfog.init(timeout=60)
  graph = topology.ring(world.size)
  x = jnp.ones(300_000)
  handles = [jfog.neighbor_allreduce_start(x, graph) for _ in range(3)]
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jfog.shutdown()
  assert any("3 operations were started" in str(w.message) for w in caught)
  jfog.init(timeout=60)
  with pytest.raises(jax.errors.JaxRuntimeError, match="is not open"):
    jax.block_until_ready(jfog.wait(handles[0]))
  np.testing.assert_allclose(jfog.allreduce(jnp.ones(3)), 1)


@pytest.mark.places("mpi-2", "mpi-3")
def test_handles_of_several_threads(place):
  """Threads wait at the same time; each gets its own."""
  rank = jfog.rank()
  handles = [
    jfog.allreduce_start(jnp.full(50_000, float(k + rank))) for k in range(8)
  ]
  results = [np.zeros(0)] * 8

  def wait(k):
    results[k] = np.asarray(jfog.wait(handles[k]))

  threads = [threading.Thread(target=wait, args=(k,)) for k in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  mean = (place.size - 1) / 2
  for k, result in enumerate(results):
    np.testing.assert_allclose(result, k + mean)


@pytest.mark.places("mpi-2", "mpi-3")
def test_hundreds_are_waited_on_in_any_order(place):
  """More than the progress engine polls in one turn."""
  n, rank = place.size, jfog.rank()
  graph = topology.fully_connected(n)
  start = jax.jit(lambda x: jfog.neighbor_allreduce_start(x, graph))
  wait = jax.jit(jfog.wait)
  count = 300
  handles = [start(jnp.full(3, float(k + rank))) for k in range(count)]
  order = [37 * k % count for k in range(count)]
  for k in order if rank == 0 else reversed(order):
    np.testing.assert_allclose(wait(handles[k]), k + (n - 1) / 2, rtol=1e-6)
