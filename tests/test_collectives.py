"""allreduce, broadcast, allgather, barrier against NumPy, in every place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
import jfog.runtime

REDUCTIONS = {
  "sum": lambda x: x.sum(axis=0),
  "mean": lambda x: x.mean(axis=0),
  "min": lambda x: x.min(axis=0),
  "max": lambda x: x.max(axis=0),
  "prod": lambda x: x.prod(axis=0),
}


@pytest.fixture
def x(place, rng):
  """A value for each rank."""
  return rng.randn(place.size, 3, 2).astype(np.float32)


def everywhere(place, truth):
  """The same truth on every rank."""
  truth = np.asarray(truth)
  return place.mine(np.broadcast_to(truth, (place.size, *truth.shape)))


@pytest.mark.two_axes
@pytest.mark.parametrize("op", REDUCTIONS)
def test_allreduce(place, x, op):
  y = place.run(jax.jit(lambda x: jfog.allreduce(x, op)), x)
  truth = REDUCTIONS[op](x.astype(np.float64))
  np.testing.assert_allclose(y, everywhere(place, truth), rtol=1e-5, atol=1e-6)


@pytest.mark.mpi(3)
@pytest.mark.parametrize(
  "dtype",
  [
    "float64",
    "float16",
    "bfloat16",
    "complex64",
    "int8",
    "uint16",
    "int32",
    "uint64",
    "bool",
  ],
)
def test_allreduce_dtypes(place, rng, x64, dtype):
  dtype = jnp.dtype(dtype)
  x = rng.randint(-3, 4, size=(place.size, 6))
  values = jnp.asarray(x).astype(dtype)
  wide = np.asarray(values)
  if jnp.issubdtype(dtype, jnp.inexact):
    wide = wide.astype(complex if dtype.kind == "c" else float)
  ops = ["sum", "prod"]
  ops += ["mean"] if jnp.issubdtype(dtype, jnp.inexact) else []
  ops += [] if dtype.kind == "c" else ["min", "max"]

  def program(x):
    return {op: jfog.allreduce(x, op) for op in ops}

  y = place.run(jax.jit(program), values)
  for op in ops:
    if dtype == np.bool_:
      truth = (wide.all if op in ("prod", "min") else wide.any)(axis=0)
    elif wide.dtype.kind in "iu":  # wraps around in the type itself
      truth = getattr(np, op)(
        wide, axis=0, **({"dtype": wide.dtype} if op in ("sum", "prod") else {})
      )
    else:
      truth = REDUCTIONS[op](wide)
    assert y[op].dtype == dtype
    got = np.asarray(y[op])
    got = got.astype(wide.dtype)
    np.testing.assert_allclose(
      got, everywhere(place, truth), rtol=1e-2 if dtype.itemsize == 2 else 1e-6
    )


def test_allreduce_of_a_pytree(place, x):
  n = place.size
  tree = {
    "a": x,
    "count": np.arange(n, dtype=np.int32),
    "empty": np.zeros((n, 0), np.float32),
    "half": jnp.asarray(x, jnp.bfloat16),
    "again": 2 * x,
  }
  y = place.run(lambda t: jfog.allreduce(t, "sum"), tree)
  assert jax.tree.structure(y) == jax.tree.structure(tree)
  np.testing.assert_allclose(
    y["again"], everywhere(place, 2 * x.sum(axis=0)), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(
    y["count"], everywhere(place, np.int32(n * (n - 1) // 2))
  )
  assert y["half"].dtype == jnp.bfloat16
  assert y["empty"].shape[-1] == 0


@pytest.mark.mpi(2, 3, 4)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_allreduce_of_long_vectors(place, rng, op):
  """MPI reduces these in parts, of which one may be empty or longer."""
  n = place.size
  x = {
    "floats": rng.uniform(-2, 2, (n, 70_001)).astype(np.float32),
    "halves": jnp.asarray(rng.randint(-2, 3, (n, 40_003)), jnp.bfloat16),
  }
  x["floats"][n // 2, 69_999] = np.nan
  if op != "mean":
    x["bytes"] = rng.randint(-128, 128, (n, 70_003)).astype(np.int8)
  y = place.run(jax.jit(lambda x: jfog.allreduce(x, op)), x)
  for name, leaf in x.items():
    wide = np.asarray(leaf)
    if name != "bytes":
      wide = wide.astype(np.float64)
    elif op in ("sum", "prod"):
      wide = wide.astype(np.int64)
    truth = REDUCTIONS[op](wide)
    got = np.asarray(y[name])
    if name == "bytes":
      np.testing.assert_array_equal(
        got, everywhere(place, truth.astype(np.int8))
      )
    else:
      np.testing.assert_allclose(
        got.astype(np.float64), everywhere(place, truth), rtol=1e-2, atol=1e-5
      )


@pytest.mark.mpi(2, 3)
@pytest.mark.parametrize("op", ["sum", "prod"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_small_integers_wrap_around(place, dtype, op):
  """Also where there are enough of them for vector instructions."""
  limits = np.iinfo(dtype)
  x = np.linspace(limits.min, limits.max, place.size * 1003).astype(dtype)
  x = x.reshape(place.size, 1003)
  y = place.run(jax.jit(lambda x: jfog.allreduce(x, op)), x)
  truth = getattr(np, op)(x, axis=0, dtype=dtype)
  np.testing.assert_array_equal(y, everywhere(place, truth))


@pytest.mark.mpi(3)
@pytest.mark.parametrize("op", ["min", "max"])
def test_nan_wins(place, op):
  x = np.arange(place.size * 2, dtype=np.float32).reshape(place.size, 2)
  x[place.size // 2, 1] = np.nan
  y = place.run(jax.jit(lambda x: jfog.allreduce(x, op)), x)
  truth = everywhere(place, [REDUCTIONS[op](x)[0], np.nan])
  np.testing.assert_array_equal(y, truth)


@pytest.mark.two_axes
@pytest.mark.mpi(2, 3)
def test_derivatives_of_allreduce(place, x, rng):
  n = place.size
  c = rng.randn(*x.shape).astype(np.float32)
  for op, scale in (("sum", 1), ("mean", 1 / n)):
    grad = place.run(
      jax.jit(jax.grad(lambda x, c, op=op: jnp.vdot(jfog.allreduce(x, op), c))),
      x,
      c,
    )
    truth = everywhere(place, c.sum(axis=0) * scale)
    np.testing.assert_allclose(grad, truth, rtol=1e-4, atol=1e-5)
  _, dy = place.run(
    lambda x, c: jax.jvp(lambda x: jfog.allreduce(x, "sum"), (x,), (c,)), x, c
  )
  np.testing.assert_allclose(
    dy, everywhere(place, c.sum(axis=0)), rtol=1e-4, atol=1e-5
  )
  for op in ("min", "max", "prod"):
    with pytest.raises(TypeError, match=f'"{op}" has no derivative'):
      place.run(jax.grad(lambda x, op=op: jfog.allreduce(x, op).sum()), x)


@pytest.mark.two_axes
@pytest.mark.mpi(2, 5)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_broadcast_gives_the_roots_bits(place, rng, dtype):
  root = place.size - 1
  x = jnp.asarray(rng.randint(0, 2, size=(place.size, 7)) - 0.5).astype(dtype)
  if dtype == "float32":
    x = x.at[:, 0].set(jnp.nan).at[:, 1].set(-0.0).at[:, 2].set(jnp.inf)
  y = place.run(jax.jit(lambda x: jfog.broadcast(x, root)), x)
  assert y.dtype == x.dtype
  truth = everywhere(place, np.asarray(x)[root])
  np.testing.assert_array_equal(
    np.asarray(y).view(np.uint8), np.ascontiguousarray(truth).view(np.uint8)
  )


@pytest.mark.host("NCCL needs the root when a program is compiled")
def test_broadcast_from_a_traced_root(place, x, rng):
  """Another root compiles nothing; the derivative follows the root."""
  c = rng.randn(*x.shape).astype(np.float32)

  @jax.jit
  def both(x, c, root):
    def loss(x):
      return jnp.vdot(jfog.broadcast(x, root), c)

    return jfog.broadcast(x, root), jax.grad(loss)(x)

  for root in range(place.size):
    y, dx = place.run(both, x, c, np.int32(root), in_axes=(0, 0, None))
    np.testing.assert_array_equal(y, everywhere(place, x[root]))
    truth = np.zeros_like(x)
    truth[root] = c.sum(axis=0)
    np.testing.assert_allclose(dx, place.mine(truth), rtol=1e-5, atol=1e-6)


@pytest.mark.places("mpi-3")
def test_a_traced_root_that_is_out_of_range(place):
  step = jax.jit(jfog.broadcast)
  with pytest.raises(
    jax.errors.JaxRuntimeError, match=r"root=3 is out of range"
  ):
    jax.block_until_ready(step(jnp.ones(2), jnp.int32(3)))
  np.testing.assert_allclose(step(jnp.ones(2), jnp.int32(2)), np.ones(2))


@pytest.mark.places("mpi-3")
def test_eager_broadcasts_from_all_roots_share_one_program(place):
  x = jnp.full(3, float(jfog.rank()))
  jfog.broadcast(x, 0)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **_: compiled.append(event)
  )
  for root in range(place.size):
    np.testing.assert_array_equal(jfog.broadcast(x, root), np.full(3, root))
  assert not [event for event in compiled if "compile" in event]


def test_broadcast_of_a_tree_and_its_derivative(place, x, rng):
  c = rng.randn(*x.shape).astype(np.float32)
  tree = {"w": x, "steps": np.arange(place.size)}
  y = place.run(lambda t: jfog.broadcast(t), tree)
  np.testing.assert_array_equal(y["steps"], everywhere(place, 0))
  grad = place.run(
    jax.jit(jax.grad(lambda x, c: jnp.vdot(jfog.broadcast(x), c))), x, c
  )
  truth = np.zeros_like(x)
  truth[0] = c.sum(axis=0)
  np.testing.assert_allclose(grad, place.mine(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.two_axes
def test_allgather(place, x, rng):
  n = place.size
  tree = {
    "x": x,
    "scalar": np.arange(n, dtype=np.float32),
    "empty": np.zeros((n, 0, 3), np.float32),
    "flags": rng.randint(0, 2, size=(n, 2)).astype(bool),
  }
  y = place.run(jax.jit(lambda t: jfog.allgather(t)), tree)
  for name, leaf in tree.items():
    truth = leaf if name == "scalar" else leaf.reshape(-1, *leaf.shape[2:])
    np.testing.assert_array_equal(y[name], everywhere(place, truth))
    assert y[name].dtype == leaf.dtype


@pytest.mark.two_axes
@pytest.mark.mpi(3)
def test_derivative_and_vmap_of_allgather(place, x, rng):
  n = place.size
  c = rng.randn(n, n * 3, 2).astype(np.float32)
  grad = place.run(
    jax.jit(jax.grad(lambda x, c: jnp.vdot(jfog.allgather(x), c))), x, c
  )
  truth = c.sum(axis=0).reshape(n, 3, 2)
  np.testing.assert_allclose(grad, place.mine(truth), rtol=1e-4, atol=1e-5)
  y = place.run(jax.jit(jax.vmap(jfog.allgather, in_axes=1, out_axes=1)), x)
  np.testing.assert_array_equal(y, everywhere(place, x.reshape(-1, 2)))


@pytest.mark.places("mpi")
def test_allgather_of_differing_lengths(place):
  n, rank = place.size, jfog.rank()
  sizes = [(3 * i + 1) % 4 for i in range(n)]  # 1, 0, 3, 2, 1
  parts = [np.full((sizes[i], 2), i, np.float32) for i in range(n)]
  fun = jax.jit(lambda x: jfog.allgather(x, axis_sizes=sizes))
  np.testing.assert_array_equal(fun(parts[rank]), np.concatenate(parts))
  grad = jax.grad(lambda x: (rank + 1) * fun(x).sum())(jnp.asarray(parts[rank]))
  np.testing.assert_allclose(grad, np.full(parts[rank].shape, n * (n + 1) / 2))
  with pytest.raises(ValueError, match=f"for rank {rank}"):
    jfog.allgather(np.zeros((7, 2)), axis_sizes=sizes)


def test_barrier_eagerly_and_jitted(place, x):
  def program(x):
    jfog.barrier()
    return jfog.allreduce(x, "sum")

  y = place.run(jax.jit(program), x)
  np.testing.assert_allclose(
    y, everywhere(place, x.sum(axis=0)), rtol=1e-5, atol=1e-5
  )
  if place.kind in ("mpi", "single"):
    assert jfog.barrier() is None


@pytest.mark.places("simulate-6x2", "mpi-4")
def test_sub_communicators(place, x):
  """Inside the machine, and across machines, of two pretended ones."""
  if place.kind == "mpi":
    jfog.shutdown()
    world = jfog.init(timeout=60, local_size=2)
    assert (world.local_size, world.machine_size) == (2, 2)
    assert world.rank == 2 * world.machine_rank + world.local_rank

  def program(x):
    comm = jfog.runtime.resolve()
    return (
      jfog.allreduce(x, "sum", comm=comm.local),
      jfog.allreduce(x, "sum", comm=comm.machines),
    )

  local, machines = place.run(program, x)
  pairs = x.reshape(place.size // 2, 2, *x.shape[1:])
  inside = np.repeat(pairs.sum(axis=1), 2, axis=0)
  across = np.tile(pairs.sum(axis=0), (place.size // 2, 1, 1))
  np.testing.assert_allclose(local, place.mine(inside), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(machines, place.mine(across), rtol=1e-5, atol=1e-5)
  if place.kind == "mpi":
    jfog.shutdown()
    jfog.init(timeout=60)


# Bad input is refused before anything is sent, on every rank.


@pytest.mark.mpi(2)
def test_bad_arguments(place, x):
  with pytest.raises(ValueError, match="'average'"):
    place.run(lambda x: jfog.allreduce(x, "average"), x)
  with pytest.raises(TypeError, match=r'int32.*op="sum"'):
    place.run(lambda x: jfog.allreduce(jnp.int32(1)), x)
  with pytest.raises(TypeError, match="complex"):
    place.run(lambda x: jfog.allreduce(x + 0j, "max"), x)
  for root in (-1, place.size):
    with pytest.raises(ValueError, match=f"root={root}"):
      place.run(lambda x, root=root: jfog.broadcast(x, root), x)
  bad: list[Any] = [0.0, True, "0"]
  for root in bad:
    with pytest.raises(TypeError, match="root="):
      place.run(lambda x, root=root: jfog.broadcast(x, root), x)
  with pytest.raises(ValueError, match="axis_sizes"):
    place.run(lambda x: jfog.allgather(x, axis_sizes=[3] * (place.size + 1)), x)
