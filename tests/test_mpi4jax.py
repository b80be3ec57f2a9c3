"""mpi4jax's operations and jfog's mix in one program: they share one chain."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import launch, runtime, topology

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
needs_mpi4jax = pytest.mark.skipif(
  importlib.util.find_spec("mpi4jax") is None,
  reason="mpi4jax is not installed; see docs/install.md, 'mpi4jax'",
)
places = pytest.mark.places("mpi-2", "mpi-3", "mpi-4")
DEADLINE = 120.0  # seconds; each of these jobs takes a few when all is quiet
ENDS_WITHIN = 30.0  # far less than the timeout of an operation


@pytest.fixture
def mpi4jax(place, in_job):
  """The module mpi4jax; importing it starts MPI, so in a job only."""
  if not in_job:
    return None
  with warnings.catch_warnings():
    # A release warns about every JAX that came after it.
    warnings.filterwarnings("ignore", "\nThe latest supported JAX version")
    import mpi4jax  # type: ignore[import-not-found]
  return mpi4jax


@needs_mpi4jax
@places
def test_both_have_one_effect(place, mpi4jax):
  def program(x):
    return jfog.allreduce(x), mpi4jax.allreduce(x, op=sum_op())

  for order in (program, lambda x: program(x)[::-1]):
    assert len(jax.make_jaxpr(order)(jnp.ones(3)).effects) == 1
  text = jax.jit(program).lower(jnp.ones(3)).as_text()
  assert text.count("stablehlo.create_token") == 1  # one chain for both
  main = next(line for line in text.splitlines() if "@main" in line)
  assert "!stablehlo.token" not in main, main  # which ends with the program


@needs_mpi4jax
@places
def test_dozens_of_interleaved_operations(place, mpi4jax, soak):
  """XLA:CPU starts independent calls in any order; the posts must not follow.

  The ranks prepare the operands differently and in another order, and look at
  the results differently, so that nothing but the chain of the two libraries'
  operations is common to them.
  """
  n, rank = place.size, jfog.rank()
  count, sizes = 48, [200_000, 17, 60_001, 3, 120_000]
  graphs = [topology.ring(n), topology.exponential(n), topology.star(n)]
  add, ahead, behind = sum_op(), (rank + 1) % n, (rank - 1) % n

  def operation(k, x):
    if k % 6 == 0:
      return mpi4jax.sendrecv(x, x, source=behind, dest=ahead)
    if k % 6 == 2:
      return mpi4jax.allreduce(x, op=add)
    if k % 6 == 4:
      return mpi4jax.bcast(x, k % n)
    if k % 6 == 5:
      return jfog.allreduce(x)
    return jfog.neighbor_allreduce(x, graphs[k % 3])

  def truth(k, values):
    if k % 6 == 0:
      return values[behind]
    if k % 6 == 2:
      return values.sum()
    if k % 6 == 4:
      return values[k % n]
    if k % 6 == 5:
      return values.mean()
    return graphs[k % 3].mixing_matrix[rank] @ values

  @jax.jit
  def program(seed):
    operands = {}
    for k in range(count) if rank % 2 else reversed(range(count)):
      x = jnp.full(sizes[k % 5], seed + 100.0 * k + rank)
      if rank % 2 and k % 3 == 0:  # extra work that delays this operand
        a = jnp.full((120, 120), 1e-3 * seed)
        x = x + 0 * (a @ a @ a).sum()
      if (rank + k) % 4 == 0:
        x = x + 0 * jnp.sort(jnp.sin(x))[0]
      operands[k] = x
    results = []
    for k in range(count):
      x = operands[k]
      if results and (rank + k) % 7 == 0:  # waits for what is under way
        x = x + 0 * results[-1][0]
      results.append(operation(k, x))
    if rank % 2:  # some results are unused on odd ranks
      results = [r if k % 5 else r[:1] for k, r in enumerate(results)]
    return [(r.min(), r.max()) for r in results]

  everybody = np.arange(n)
  for repeat in range(200 if soak else 10):
    for k, (low, high) in enumerate(program(jnp.float32(repeat))):
      expected = truth(k, repeat + 100.0 * k + everybody)
      np.testing.assert_allclose([low, high], expected, rtol=1e-5)


@needs_mpi4jax
@places
def test_interleaved_in_a_scan_and_under_remat(place, mpi4jax):
  n, rank = place.size, jfog.rank()
  graph, add = topology.ring(n), sum_op()
  total = n * (n + 1) / 2

  @jax.checkpoint
  def body(x):
    x = jfog.neighbor_allreduce(x, graph)
    return jfog.allreduce(jnp.sin(mpi4jax.allreduce(x, op=add)))

  def loss(x):
    last, _ = jax.lax.scan(lambda c, _: (body(c), None), x, length=3)
    return last.sum()

  value, slope = jax.jit(jax.value_and_grad(loss))(jnp.full(5, rank + 1.0))
  y, factor = total, 1.0
  for _ in range(3):
    factor, y = factor * np.cos(y), np.sin(y) * n
  np.testing.assert_allclose(value, 5 * y / n, rtol=1e-4)
  assert slope.shape == (5,)
  assert np.isfinite(factor)


@needs_mpi4jax
@places
def test_eager_calls_of_both_stay_in_order(place, mpi4jax):
  """Dispatch is asynchronous, and each library has executables of its own."""
  n, rank, add = place.size, jfog.rank(), sum_op()
  x = jnp.full(50_000, float(rank))
  for _ in range(20):
    x = jfog.neighbor_allreduce(x, topology.ring(n))
    x = mpi4jax.allreduce(x, op=add) / n
    x = mpi4jax.sendrecv(x, x, source=(rank - 1) % n, dest=(rank + 1) % n)
  np.testing.assert_allclose(x, (n - 1) / 2, rtol=1e-5)


def sum_op():
  """MPI's sum, from mpi4py, which starts MPI when it is imported."""
  from mpi4py import MPI

  return MPI.SUM


USE = """
@jax.jit
def program(x):
  x = jfog.allreduce(x, "sum")
  x = mpi4jax.allreduce(x, op=MPI.SUM)
  return jfog.neighbor_allreduce(x, jfog.topology.ring(world.size))
assert float(program(jnp.float32(1))) == world.size**2
assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
"""
ORDERS = {
  "jfog first": """
    import jax, jax.numpy as jnp, jfog
    world = jfog.init()
    import mpi4jax
    from mpi4py import MPI
  """,
  "jfog's operations first": """
    import sys, jax, jax.numpy as jnp, jfog
    world = jfog.init()
    assert not {"mpi4jax", "mpi4py"} & set(sys.modules)
    assert float(jax.jit(jfog.allreduce)(jnp.float32(3))) == 3
    import mpi4jax
    from mpi4py import MPI
  """,
  "mpi4jax first": """
    import mpi4jax
    from mpi4py import MPI
    import jax, jax.numpy as jnp, jfog
    world = jfog.init()
  """,
  "the world of mpi4py": """
    from mpi4py import MPI
    import jax, jax.numpy as jnp, jfog
    world = jfog.init(comm=MPI.COMM_WORLD)
    import mpi4jax
  """,
}


def job(program, ranks=2, **environment):
  """Runs a program on ranks and returns what it left."""
  environment = {**os.environ, "MPI4JAX_NO_WARN_JAX_VERSION": "1"} | environment
  environment.pop("XLA_FLAGS", None)
  return subprocess.run(
    [
      *launch.command_line(["--no-tag-output", "-np", str(ranks)]),
      sys.executable,
      "-c",
      program,
    ],
    env=environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=DEADLINE,
  )


@needs_mpi
@needs_mpi4jax
@pytest.mark.parametrize("order", ORDERS)
def test_either_may_come_first(order):
  done = job(textwrap.dedent(ORDERS[order]) + USE)
  assert done.returncode == 0, done.stderr
  assert not done.stderr.strip()


@needs_mpi
@needs_mpi4jax
@pytest.mark.parametrize("order", ["jfog first", "mpi4jax first"])
def test_an_exception_on_one_rank_ends_the_job(order):
  """Also where mpi4py has started MPI and would end it, which waits."""
  done = job(
    f"import signal; signal.alarm({ENDS_WITHIN:.0f})\n"
    + textwrap.dedent(ORDERS[order])
    + USE
    + textwrap.dedent("""
      if world.rank == 1:
        raise RuntimeError("the data of rank 1 is broken")
      jax.block_until_ready(program(jnp.float32(1)))
    """)
  )
  assert done.returncode == 1, done.stderr
  assert "jfog run: rank 1 failed first" in done.stderr
  assert done.stderr.strip().endswith("the data of rank 1 is broken")


@needs_mpi
@pytest.mark.parametrize(
  "text",
  ["raise RuntimeError('built for another MPI')", "import gone"],
)
def test_an_mpi4jax_that_does_not_import_is_as_none(tmp_path, text):
  (tmp_path / "mpi4jax").mkdir()
  (tmp_path / "mpi4jax" / "__init__.py").write_text(text)
  program = """
import jax.numpy as jnp, jfog
jfog.init()
assert float(jfog.allreduce(jnp.float32(3))) == 3
"""
  done = job(program, PYTHONPATH=str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert not done.stderr.strip()


@needs_mpi
def test_an_mpi4jax_without_the_effect_is_spoken_of(tmp_path):
  (tmp_path / "mpi4jax").mkdir()
  (tmp_path / "mpi4jax" / "__init__.py").write_text("__version__ = '99'")
  program = """
import jax.numpy as jnp, jfog
jfog.init()
assert float(jfog.allreduce(jnp.float32(3))) == 3
"""
  done = job(program, PYTHONPATH=str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert "the ordered effect of mpi4jax 99" in done.stderr


def test_simulation_does_not_import_mpi4jax():
  program = """
import sys, jax.numpy as jnp, jfog
jfog.simulate(lambda x: jfog.allreduce(x), 3)(jnp.zeros(3))
jfog.init(backend="single")
jfog.allreduce(jnp.zeros(3))
assert not {"mpi4jax", "mpi4py"} & set(sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
