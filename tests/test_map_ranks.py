"""`map_ranks`, `num_ranks`, `stack` and `shard`: one script in all places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

pytestmark = pytest.mark.places("single", "mpi-2", "mpi-3")


def ranks_of(place):
  """The number of ranks, and a slice of those that this process runs."""
  if place.name == "single":
    return 5, slice(None)
  return place.size, slice(jfog.rank(), jfog.rank() + 1)


def test_results_are_those_of_all_ranks_in_all_places(place):
  n, held = ranks_of(place)
  assert jfog.num_ranks(5) == n
  graph = topology.ring(n)
  x = np.random.default_rng(2).standard_normal((n, 3)).astype(np.float32)
  truth = np.float64(x)

  def step(tree, shift):
    y = jfog.neighbor_allreduce(tree["x"] + shift, graph)
    return {"x": y}, jnp.sum(y) * jfog.rank()

  run = jax.jit(jfog.map_ranks(step, 5, in_axes=(0, None)))
  tree = {"x": x}  # of all ranks; later calls have the results of earlier ones
  for _ in range(3):
    tree, scaled = run(tree, 1.0)
    truth = graph.mixing_matrix @ (truth + 1)
    np.testing.assert_allclose(tree["x"], truth[held], rtol=1e-5)
    np.testing.assert_allclose(
      scaled, (truth.sum(axis=1) * np.arange(n))[held], rtol=1e-5, atol=1e-6
    )


def test_axes_keys_and_keywords(place):
  n, held = ranks_of(place)
  x = np.arange(4.0 * n, dtype=np.float32).reshape(2, n, 2)
  keys = jax.random.split(jax.random.key(3), n)

  def program(x, key, *, scale):
    mean = jfog.allreduce(x)
    return x * scale, mean, jax.random.normal(key, (2,))

  run = jfog.map_ranks(program, 5, in_axes=(1, 0), out_axes=(2, None, 0))
  own, mean, noise = run(x, keys, scale=np.arange(n, dtype=np.float32))
  truth = np.moveaxis(x, 1, 2) * np.arange(n)
  np.testing.assert_allclose(own, truth[:, :, held])
  np.testing.assert_allclose(mean, x.mean(axis=1), rtol=1e-6)
  drawn = np.stack([jax.random.normal(key, (2,)) for key in keys])
  np.testing.assert_allclose(noise, drawn[held], rtol=1e-6)


def test_windows_and_handles_cross_calls(place):
  n, held = ranks_of(place)
  graph = topology.ring(n, "right")
  x = np.arange(n, dtype=np.float32)
  start = jfog.map_ranks(lambda x: jfog.win_create(x, graph), 5)
  win = start(x)
  put = jfog.map_ranks(lambda win, x: jfog.win_put(win, x), 5)
  win = put(win, x + 1)
  if place.size > 1:
    jfog.barrier()
  y, win = jfog.map_ranks(jfog.win_update, 5)(win, x)
  mixing = graph.mixing_matrix
  truth = np.diag(mixing) * x + (mixing - np.diag(np.diag(mixing))) @ (x + 1)
  np.testing.assert_allclose(y, truth[held], rtol=1e-6)
  handle = jfog.map_ranks(jfog.allreduce_start, 5)(x)
  total = jfog.map_ranks(jfog.wait, 5)(handle)
  np.testing.assert_allclose(total, np.full(n, x.mean())[held])
  if place.size > 1:
    jfog.barrier()


def test_stack_and_shard(place):
  n, held = ranks_of(place)
  stacked = jfog.stack({"w": np.ones(2), "b": jnp.float32(3)}, 5)
  count = len(range(n)[held])
  assert stacked["w"].shape == (count, 2)
  np.testing.assert_array_equal(stacked["b"], np.full(count, 3.0))
  samples, labels = np.arange(4 * n + 1), np.arange(8 * n + 2).reshape(-1, 2)
  parts = jfog.shard((samples, labels), 5)
  np.testing.assert_array_equal(parts[0], samples[:-1].reshape(n, 4)[held])
  np.testing.assert_array_equal(parts[1], labels[:-1].reshape(n, 4, 2)[held])


def test_bad_arguments(place):
  n, _ = ranks_of(place)
  double = jfog.map_ranks(lambda x: 2 * x, 5)
  with pytest.raises(ValueError, match=rf"\({n + 2},\).*in_axes=None"):
    double(np.ones(n + 2))
  with pytest.raises(ValueError, match=r"\[0\].*shape \(\)"):
    double(1.0)
  with pytest.raises(ValueError, match="samples along axis 0 for"):
    jfog.shard(np.ones(n - 1), 5)
  with pytest.raises(ValueError, match=r"\[7, 8\] samples"):
    jfog.shard((np.ones(7), np.ones(8)), 5)
  with pytest.raises(ValueError, match="number of ranks"):
    jfog.num_ranks(0)


@pytest.mark.places("single")
def test_devices_are_ranks(place):
  n = jax.device_count()
  assert jfog.num_ranks() == n
  x = jnp.arange(float(n))
  y = jfog.map_ranks(jfog.allreduce)(x)
  np.testing.assert_allclose(y, np.full(n, x.mean()))
  if n > 1:
    assert len(y.devices()) == n


def test_a_mesh_is_used_in_one_process(place):
  if place.name == "single" and jax.device_count() < 4:
    pytest.skip("needs 4 devices")
  mesh = None
  if place.name == "single":
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("jfog", "model"))
    with pytest.raises(ValueError, match="2 ranks along 'jfog', size is 3"):
      jfog.map_ranks(jfog.allreduce, 3, mesh=mesh)(jnp.ones((3, 2)))
  n = place.size if mesh is None else 2
  x = jnp.arange(4.0 * n).reshape(n, 4)
  mean = jax.jit(jfog.map_ranks(jfog.allreduce, mesh=mesh))
  y = mean(x)
  np.testing.assert_allclose(y, np.tile(x.mean(axis=0), (len(y), 1)))
  assert len(y) == (1 if mesh is None else 2)
