"""Eager calls between processes: compiled once, with the results of jitted ones."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

pytestmark = pytest.mark.places("mpi-3", "mpi-4")


@contextlib.contextmanager
def compilations():
  """Counts the programs that JAX compiles."""
  found = []

  def listen(event, seconds, **details):
    if event.endswith("backend_compile_duration"):
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def windows(win, x):
  """Every operation on windows once, with weights that are numbers or none."""
  win = jfog.win_put(win, x)
  jfog.barrier()
  first, win = jfog.win_update(win, x)
  jfog.barrier()
  win = jfog.win_accumulate(win, x, dst_weights=0.5)
  jfog.barrier()
  second, win = jfog.win_update(win, x, self_weight=1.0, src_weights=2)
  jfog.barrier()
  win = jfog.wait(jfog.win_get_start(win))
  jfog.barrier()
  version = jax.block_until_ready(jfog.win_version(win))
  jfog.barrier()  # before the writes of a next round
  return first, second, version


def test_windows_compile_once(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  x = jnp.arange(3.0) + rank
  win = jfog.win_create(x, graph)
  before = windows(win, x)
  with compilations() as found:
    first, second, version = windows(win, x)
  assert not found
  truth = np.arange(3.0) + np.arange(n)[:, None]
  mean = graph.mixing_matrix @ truth
  np.testing.assert_allclose(first, mean[rank], rtol=1e-6)
  # Slots keep their values after an update: x of the put and half of it.
  neighbors = list(graph.in_neighbors(rank))
  wanted = truth[rank] + 2 * 1.5 * truth[neighbors].sum(axis=0)
  np.testing.assert_allclose(second, wanted, rtol=1e-6)
  np.testing.assert_array_equal(version, before[2])
  jfog.barrier()
  jfog.win_free(win)
  with pytest.raises(ValueError, match="was freed"):
    jfog.win_put(win, x)


def test_other_peers_and_lengths_compile_once(place):
  n, rank = place.size, jfog.rank()
  x = jnp.full(rank + 1, float(rank))
  sizes = list(range(1, n + 1))
  peers = [rank ^ 1 if rank ^ 1 < n else rank, rank]

  def run():
    gathered = jfog.allgather(x, axis_sizes=sizes)
    pairs = [jfog.pair_gossip(jnp.float32(rank), peer) for peer in peers]
    return gathered, pairs

  run()
  with compilations() as found:
    gathered, pairs = run()
  assert not found
  np.testing.assert_array_equal(gathered, np.repeat(np.arange(n), sizes))
  np.testing.assert_allclose(pairs, [(rank + peers[0]) / 2, rank])


def test_weights_that_change_are_not_compiled_for_ever(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n, "right")
  x = jnp.float32(rank + 1)
  win = jfog.win_create(x, graph)
  jfog.win_put(win, x, dst_weights=-1.0)
  with compilations() as found:
    for k in range(40):
      win = jfog.win_put(win, x, dst_weights=k / 8)
      jfog.barrier()
      y, win = jfog.win_update(win, x, self_weight=0, src_weights=1)
      np.testing.assert_allclose(y, k / 8 * ((rank - 1) % n + 1))
      jfog.barrier()
  assert len(found) < 30
  jfog.barrier()
  jfog.win_free(win)


def test_equal_numbers_of_other_types_are_different(place):
  n = place.size
  x = jnp.ones(2, jnp.int32)
  win = jfog.win_create(x, topology.ring(n))
  win = jfog.win_put(win, x, dst_weights=1)
  with pytest.raises(TypeError, match="weight"):
    jfog.win_put(win, x, dst_weights=True)
  with pytest.raises(ValueError, match="out of range"):
    jfog.pair_gossip(jnp.ones(2), n)
  with pytest.raises(TypeError, match="axis_sizes"):
    jfog.allgather(x, axis_sizes=2)
  jfog.barrier()
  jfog.win_free(win)
