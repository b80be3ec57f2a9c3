"""Windows against a dense model of all ranks' slots, in every place.

Pretended machines, as in `mpi-3x1`, reach each other by messages instead of memory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from support import reference
from support.windows import (
  Model,
  close,
  free,
  random_graph,
  uniform_graph,
  window_axis,
)

import jfog
from jfog import topology


@pytest.mark.two_axes
@pytest.mark.mpi(3, 4)
def test_each_operation(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x, new = rng.randn(2, n, 3).astype(np.float32)

  @jax.jit
  def program(x, new):
    found = {}
    win = jfog.win_create(x, graph, zero_init=True)
    found["zeros"], win = jfog.win_update(
      win, new, self_weight=0, src_weights=1
    )
    jfog.barrier()
    win = jfog.win_get(win)  # of what the update has exposed
    jfog.barrier()
    found["got zeros"], win = jfog.win_update(win, new, src_weights=1)
    free(win)

    win = jfog.win_create(x, graph)
    found["copies"], win = jfog.win_update(win, x)
    jfog.barrier()
    win = jfog.win_get(win, src_weights=2)
    jfog.barrier()
    found["twice what was got"], win = jfog.win_update(
      win, new, self_weight=0, src_weights=1
    )
    jfog.barrier()
    win = jfog.win_put(jfog.win_put(win, x), new)
    jfog.barrier()
    found["written twice"] = jfog.win_version(win)
    found["mean"], win = jfog.win_update(win, new)
    found["of the same slots"], win = jfog.win_update(win, new)
    found["read"] = jfog.win_version(win)
    jfog.barrier()
    win = jfog.win_accumulate(win, new, dst_weights=2)
    jfog.barrier()
    found["put and accumulated"], win = jfog.win_update_then_collect(win, new)
    found["collected before"], win = jfog.win_update_then_collect(win, new)
    free(win)
    return found

  matrix = reference.mixing(graph)
  edges = (matrix != 0) & ~np.eye(n, dtype=bool)
  truth = {
    "zeros": 0 * x,
    "got zeros": matrix.diagonal()[:, None] * new,
    "copies": x,
    "twice what was got": 2 * edges @ x,
    "written twice": 2 * edges,
    "mean": matrix @ new,
    "of the same slots": matrix @ new,
    "read": 0 * edges,
    "put and accumulated": new + 3 * edges @ new,
    "collected before": new,
  }
  found = place.run(program, x, new)
  assert found.keys() == truth.keys()
  for name, value in truth.items():
    np.testing.assert_allclose(
      found[name], place.mine(value), rtol=1e-5, atol=1e-5, err_msg=name
    )
  np.testing.assert_array_equal(found["copies"], place.mine(x))


@pytest.mark.mpi(3, "3x1")
def test_dtypes_and_pytrees(place, x64, rng):
  n = place.size
  graph = random_graph(n, 1)
  edges = (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  values = rng.randint(-9, 10, (n, 2, 3))
  fractions = {
    "half": np.asarray(jnp.asarray(values, jnp.float16)),
    "brain": np.asarray(jnp.asarray(values, jnp.bfloat16)),
    "single": values.astype(np.float32),
    "double": (values.astype(np.float64), None),
    "complex": (values + 2j * values[:, ::-1]).astype(np.complex64),
    "scalar": values[:, 0, 0].astype(np.float32),
    "empty": np.zeros((n, 0, 2), np.float16),
  }
  integers = [
    (100 * values).astype(dtype)  # the small ones wrap around
    for dtype in (np.int8, np.uint8, np.int32, np.int64)
  ]
  weights = {"fractions": 0.5, "integers": 3}
  trees = {"fractions": fractions, "integers": integers}

  @jax.jit
  def program(trees):
    found = {}
    for name, x in trees.items():
      win = jfog.win_create(x, graph, associated_p=True)
      win = jfog.win_get(win, src_weights=weights[name])
      jfog.barrier()
      win = jfog.win_accumulate(win, x)
      jfog.barrier()
      y, win = jfog.win_update(win, x, self_weight=2, src_weights=-1)
      found[name] = y, jfog.win_associated_p(win)
      free(win)
    return found

  def truth(x, weight):
    kind = {"i": np.int64, "u": np.int64, "c": np.complex128}
    wide = x.reshape(n, -1).astype(kind.get(x.dtype.kind, np.float64))
    received = ((1 + weight) * edges).astype(wide.real.dtype) @ wide
    return (2 * wide - received).reshape(x.shape)

  def check(actual, x, wide):
    assert actual.dtype == x.dtype
    eps = 0 if x.dtype.kind in "iu" else jnp.finfo(x.dtype).eps
    rounded = wide.astype(x.dtype).astype(wide.dtype)
    actual = np.asarray(actual).astype(wide.dtype)
    reference.assert_close(actual, rounded, 200 * float(eps))

  for name, (y, p) in place.run(program, trees).items():
    x, weight = trees[name], weights[name]
    assert jax.tree.structure(y) == jax.tree.structure(x)
    wide = jax.tree.map(lambda x, w=weight: truth(x, w), x)
    jax.tree.map(check, y, place.mine(x), place.mine(wide))
    assert p.dtype == (np.float64 if name == "fractions" else np.float32)
    np.testing.assert_allclose(p, place.mine(truth(np.ones(n), weight)))


@pytest.mark.mpi(2, "3x1")
def test_a_weight_of_one_returns_the_bits(place):
  graph = topology.ring(place.size, "right")
  real = np.array([-0.0, 0.0, np.inf, -np.inf, 1e4], np.float32)
  pairs = np.stack([real, real[::-1]], axis=1).copy()
  x = {
    "real": real,
    "half": real.astype(np.float16),
    "complex": pairs.view(np.complex64)[:, 0],
  }
  x = jax.tree.map(lambda x: np.tile(x, (place.size, 1)), x)

  @jax.jit
  def program(x):
    win = jfog.win_put(jfog.win_create(x, graph, zero_init=True), x)
    jfog.barrier()
    y, win = jfog.win_update(win, x, self_weight=0, src_weights=1)
    jfog.barrier()
    win = jfog.win_get(win)
    jfog.barrier()
    z, win = jfog.win_update(win, x, self_weight=0, src_weights=1)
    free(win)
    return y, z

  if place.size > 1:
    for found in place.run(program, x):
      for key, value in place.mine(x).items():
        np.testing.assert_array_equal(
          np.asarray(found[key]).view(np.uint8), value.view(np.uint8)
        )


# Windows as values.


@pytest.mark.mpi(3)
def test_a_window_crosses_jit_and_is_traced_once(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x = rng.randn(n, 3).astype(np.float32)
  traces = 0

  def create_(x):
    return jfog.win_create(x, graph, associated_p=True)

  def step(win, x):
    nonlocal traces
    traces += 1
    win = jfog.win_put(win, x)
    jfog.barrier()
    y, win = jfog.win_update(win, x)
    jfog.barrier()
    return y, win

  axis = window_axis(place)
  win = jax.jit(place.map(create_))(x)
  assert win.topology is graph
  assert "1 leaf" in repr(win)
  step = jax.jit(place.map(step, (axis, axis)))
  y = place.mine(x)
  for k in range(1, 5):
    y, win = step(win, y)
    truth = np.linalg.matrix_power(reference.mixing(graph), k) @ x
    np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)
  # The first arguments lie elsewhere than what a mesh returns.
  assert traces == (2 if place.kind == "mesh" else 1)
  if axis is None:
    free(win)


@pytest.mark.mpi(3, "3x1")
def test_split_forms(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x = rng.randn(n, 3).astype(np.float32)

  @jax.jit
  def program(x):
    win = jfog.win_create({"a": x}, graph, zero_init=True)
    handle = jfog.win_put_start(win, {"a": x}, dst_weights=0.5)
    may_wait = [jfog.poll(handle)]
    win = jfog.wait(handle)
    jfog.barrier()
    handle = jfog.win_accumulate_start(win, {"a": x})
    may_wait.append(jfog.poll(handle))
    win = jfog.wait(handle)
    jfog.barrier()
    y, win = jfog.win_update_then_collect(win, {"a": x})
    jfog.barrier()
    handle = jfog.win_get_start(win, src_weights=0.5)
    may_wait.append(jfog.poll(handle))
    win = jfog.wait(handle)
    jfog.barrier()
    z, win = jfog.win_update_then_collect(win, y)
    free(win)
    return y["a"], z["a"], may_wait

  y, z, may_wait = place.run(program, x)
  edges = (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  truth = x + 1.5 * edges @ x
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)
  truth = truth + 0.5 * edges @ truth
  np.testing.assert_allclose(z, place.mine(truth), rtol=1e-5, atol=1e-5)
  for answer in may_wait:
    assert answer.dtype == bool
    assert place.kind == "mpi" or np.all(answer)


@pytest.mark.places("mesh")
def test_in_a_shard_map_that_checks_varying_types(place, x64, rng):
  n = place.size
  graph = random_graph(n, 1)
  x = rng.randn(n, 3)

  def program(x):
    win = jfog.win_create(x, graph, delay=1, associated_p=True)

    def step(carry, _):
      win, x = carry
      win = jfog.win_accumulate(win, x, dst_weights=0.5)
      x, win = jfog.win_update(jfog.win_get(win), x, reset=True)
      return (win, x), jfog.win_version(win)

    (win, x), versions = lax.scan(step, (win, x), length=5)
    return x, jfog.win_associated_p(win), versions

  def body(x):
    return jax.tree.map(lambda y: y[None], program(x[0]))

  own = PartitionSpec("jfog")
  run = jax.shard_map(
    body,
    mesh=Mesh(np.array(jax.devices()), ("jfog",)),
    in_specs=own,
    out_specs=own,
    check_vma=True,
  )
  model, y, versions = Model(graph, x, delay=1), x, []
  matrix = reference.mixing(graph)
  for _ in range(5):
    model.send(y, 0.5 * np.ones((n, n)), True)
    model.get(np.ones((n, n)))
    y = model.update(y, matrix.diagonal(), matrix, reset=True)
    versions.append(model.versions.copy())
  actual = jax.jit(run)(x)
  close(actual[0], y, 1e-12)
  close(actual[1], model.p, 1e-12)
  np.testing.assert_array_equal(actual[2], np.stack(versions, axis=1))
