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

  def listen(event, duration_secs, **details):
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


def test_other_peers_and_weights_of_this_rank_compile_once(place):
  n, rank = place.size, jfog.rank()
  x = jnp.arange(3.0) + rank

  def shifted(shift, own):
    source, destination = (rank - shift) % n, (rank + shift) % n
    peers = jfog.Peers(own, {source: 1 - own}, {destination: 0.5})
    return jfog.wait(jfog.neighbor_allreduce_start(x, peers)), source

  shifted(1, 0.5)
  with compilations() as found:
    for shift in range(1, n):
      for own in (0.25, 0.75):
        y, source = shifted(shift, own)
        wanted = own * (np.arange(3.0) + rank)
        wanted += (1 - own) * 0.5 * (np.arange(3.0) + source)
        np.testing.assert_allclose(y, wanted, rtol=1e-6)
  assert not found
  # Weights of 1 at all senders, which sum to 1: another form, with equal bits.
  y = jfog.neighbor_allreduce(
    jnp.full(2, 0.1), jfog.Peers(0.9, {(rank + 1) % n: 0.1}, [(rank - 1) % n])
  )
  np.testing.assert_array_equal(y, jnp.full(2, 0.1))
  with pytest.raises(ValueError, match="self_weight for this rank"):
    jfog.neighbor_allreduce(x, jfog.Peers(0.5, {rank: 0.5}, []))
  with pytest.raises(ValueError, match="weights= out"):
    jfog.neighbor_allreduce(x, jfog.Peers(1.0, {}, []), weights=np.eye(n))


def test_other_weights_compile_once(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  x = jnp.arange(2.0) + rank
  truth = np.arange(2.0) + np.arange(n)[:, None]
  random = np.random.default_rng(5)
  neighbors = list(graph.in_neighbors(rank))
  win = jfog.win_create(x, graph)

  def run(kind):
    matrix = random.random((n, n))
    y = jfog.neighbor_allreduce(x, graph, weights=kind(matrix))
    wanted = matrix[rank, rank] * truth[rank]
    wanted += matrix[rank, neighbors] @ truth[neighbors]
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    put = {r: kind(matrix[r, rank]) for r in neighbors}
    nonlocal win
    win = jfog.win_put(win, x, dst_weights=put)
    jfog.barrier()
    update = {r: kind(2 * matrix[0, r]) for r in neighbors}
    own = kind(matrix[0, 0])
    y, win = jfog.win_update(win, x, self_weight=own, src_weights=update)
    wanted = matrix[0, 0] * truth[rank]
    for r in neighbors:
      wanted += 2 * matrix[0, r] * matrix[rank, r] * truth[r]
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    jfog.barrier()

  for kind in (np.asarray, jnp.asarray, lambda w: w if w.ndim else float(w)):
    run(kind)
    with compilations() as found:
      run(kind)
    assert not found, kind
  with pytest.raises(ValueError, match="not an out-neighbor"):
    jfog.win_put(win, x, dst_weights={rank: 1.0})
  with pytest.raises(TypeError, match="real numbers"):
    jfog.win_put(win, x, dst_weights={neighbors[0]: True})
  with pytest.raises(TypeError, match="complex"):
    jfog.neighbor_allreduce(x, graph, weights=jnp.eye(n) * 1j)
  jfog.barrier()
  jfog.win_free(win)
