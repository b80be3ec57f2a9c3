"""Communication is ordered and never dropped, whatever XLA does around it."""

import gc
import pathlib
import sys
import tempfile
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jfog
from jfog import topology

pytestmark = pytest.mark.places("mpi-2", "mpi-3", "mpi-4")


def test_many_large_independent_operations(place, soak):
  """XLA:CPU starts independent calls in any order; the posts must not follow.

  Ranks compute different things around the same operations, so that their
  schedules differ.
  """
  n, rank = place.size, jfog.rank()
  graphs = [topology.ring(n), topology.exponential(n), topology.star(n)]
  sizes = [200_000, 17, 60_001, 3]

  @jax.jit
  def program(seed):
    results = []
    for k in range(12):
      x = jnp.full(sizes[k % 4], seed + 100.0 * k + rank)
      if (rank + k) % 3 == 0:  # extra work that delays this operand
        x = x + 0 * jnp.sort(jnp.sin(x))[0]
      if k % 4 == 3:
        results.append(jfog.allreduce(x))
      else:
        results.append(jfog.neighbor_allreduce(x, graphs[k % 3]))
    if rank % 2:  # some results are unused on odd ranks
      results = [r if k % 5 else r[:1] for k, r in enumerate(results)]
    return [(r.min(), r.max()) for r in results]

  everybody = np.arange(n)
  for repeat in range(500 if soak else 20):
    for k, (low, high) in enumerate(program(jnp.float32(repeat))):
      values = repeat + 100.0 * k + everybody
      if k % 4 == 3:
        truth = values.mean()
      else:
        truth = graphs[k % 3].mixing_matrix[rank] @ values
      np.testing.assert_allclose([low, high], truth, rtol=1e-5)


def test_ranks_with_different_programs(place):
  """Only the operations must agree; what lies between may differ."""
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)

  @jax.jit
  def program(x):
    first = jfog.neighbor_allreduce(x, graph)
    if rank == 0:
      first, _ = jax.lax.scan(lambda c, _: (jnp.cos(c), None), first, length=50)
      second = jfog.allreduce(x, "sum")
    else:
      second = jfog.allreduce(x, "sum")
      second = second + 0 * jnp.sum(first)
    return second, jfog.broadcast(2 * x, n - 1)

  for _ in range(5):
    total, last = program(jnp.full(1000, rank + 1.0))
    np.testing.assert_allclose(total, n * (n + 1) / 2)
    np.testing.assert_allclose(last, 2.0 * n)


def test_unused_results_are_sent_all_the_same(place):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)

  @jax.jit
  def program(x):
    y = jfog.neighbor_allreduce(x, graph)
    return y.sum() if rank == 0 else x.sum()  # only rank 0 uses it

  before = jfog.diagnostics.counters()["operations"]
  program(jnp.ones(10)).block_until_ready()
  assert jfog.diagnostics.counters()["operations"] == before + 1


def test_operations_of_several_calls_stay_in_order(place):
  """Dispatch is asynchronous: many calls are under way at once."""
  n = place.size
  graph = topology.one_peer_exponential(n)
  step = jax.jit(lambda x, k: jfog.neighbor_allreduce(x, graph, k))
  x = jnp.full(50_000, float(jfog.rank()))
  for k in range(30):
    x = step(x, jnp.int32(k))
  truth = np.arange(n, dtype=np.float64)
  for k in range(30):
    truth = graph[k].mixing_matrix @ truth
  np.testing.assert_allclose(x, truth[jfog.rank()], rtol=1e-4)


def test_ahead_of_time_executables(place):
  n, rank = place.size, jfog.rank()
  graph = topology.one_peer_exponential(n)
  step = jax.jit(lambda x, k: 2 * jfog.neighbor_allreduce(x, graph, k))
  compiled = step.lower(jnp.ones(3), jnp.int32(0)).compile()
  for k in range(100):
    x = jnp.full(3, 10.0 * k + rank)
    truth = 2 * graph[k].mixing_matrix[rank] @ (10.0 * k + np.arange(n))
    np.testing.assert_allclose(compiled(x, jnp.int32(k)), np.full(3, truth))


def test_jitted_calls_take_the_path_without_python(place):
  graph = topology.ring(place.size)
  step = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
  x = step(step(jnp.ones(3)))
  calls = []
  sys.setprofile(lambda frame, event, arg: calls.append(frame.f_code.co_name))
  try:
    x = step(x)
  finally:
    sys.setprofile(None)
  assert len(calls) <= 2, calls  # of this function, of setprofile
  np.testing.assert_allclose(x, np.ones(3))


def test_a_program_is_lowered_and_compiled_once(place):
  """By a call and ahead of time, as without communication."""
  graph = topology.ring(place.size)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **_: compiled.append(event)
  )
  counts = []
  for average in (lambda x: x, lambda x: jfog.neighbor_allreduce(x, graph)):
    step = jax.jit(lambda x, average=average: average(x) * 2)
    x = jnp.ones(7)
    compiled.clear()
    step.lower(x).compile()
    step(x)
    step.lower(x).compile()
    counts.append(sum("backend_compile" in event for event in compiled))
  assert counts[0] == counts[1], counts


def test_a_program_that_is_dropped_frees_its_constants(place):
  graph = topology.ring(place.size)

  def run():
    constant = jnp.arange(1000.0)
    step = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph) + constant)
    jax.block_until_ready(step(jnp.ones(1000)))
    return weakref.ref(constant)

  alive = run()
  gc.collect()
  assert alive() is None


def test_dispatch_runs_ahead_of_the_peers(place):
  """Rank 0 dispatches ten steps before the others start with the first one."""
  n = place.size
  graph = topology.ring(n, "right")
  step = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph) + 1)
  x = step(jnp.zeros(500)).block_until_ready()
  number = jfog.broadcast(jnp.asarray(time.time_ns() % 2**31), 0)
  dispatched = pathlib.Path(tempfile.gettempdir(), f"jfog-order-{int(number)}")
  if jfog.rank() > 0:
    until = time.monotonic() + 60
    while not dispatched.exists():
      assert time.monotonic() < until, (
        "rank 0 waits for its peers in a dispatch"
      )
      time.sleep(0.01)
  for _ in range(10):
    x = step(x)
  if jfog.rank() == 0:
    # A neighbor of rank 0 has not begun, so not even the first step has ended.
    assert not x.is_ready()
    dispatched.touch()
  np.testing.assert_allclose(x, np.full(500, 11.0))
  jfog.barrier()
  if jfog.rank() == 0:
    dispatched.unlink()


def test_separate_programs_run_in_the_order_of_dispatch(place, soak):
  """Programs of different costs, some with dropped results, and eager calls."""
  n, rank = place.size, jfog.rank()
  graph = topology.exponential(n)
  rng = np.random.default_rng(7)  # equal on all ranks

  def program(kind):
    def run(x, a):
      if kind % 3 == rank % 3:  # costs some ranks more than others
        x = x + 0 * jnp.sum(jnp.sin(a @ a))
      if kind % 2:
        return jfog.allreduce(x, "max")
      return jfog.neighbor_allreduce(x, graph) + kind

    return jax.jit(run)

  programs = [program(kind) for kind in range(6)]
  a = jnp.ones((200, 200))
  everybody = np.arange(n, dtype=np.float64)
  for repeat in range(500 if soak else 20):
    kept = []
    for kind in rng.permutation(6):
      y = programs[kind](jnp.full(20, float(rank + repeat)), a)
      values = everybody + repeat
      if kind % 2:
        truth = values.max()
      else:
        truth = graph.mixing_matrix[rank] @ values + kind
      if (kind + rank + repeat) % 4:
        kept.append((y, truth))
      if kind == 3:
        eager = jfog.allreduce(jnp.full(3, float(rank)), "sum")
        kept.append((eager, everybody.sum()))
    for y, truth in kept:
      np.testing.assert_allclose(y, np.full(y.shape, truth), rtol=1e-5)


def _plain(x, average):
  return average(x)


def _scanned(x, average):
  return jax.lax.scan(lambda c, _: (average(c), None), x, length=3)[0]


def _counted(x, average):
  return jax.lax.while_loop(
    lambda c: c[1] < 2, lambda c: (average(c[0]), c[1] + 1), (x, 0)
  )[0]


def _branched(x, average):
  return jax.lax.cond(jnp.sum(x) > -1, average, lambda x: x, average(x))


def _inner(x, average):
  return jax.jit(lambda x: jax.jit(average)(x) + 1)(x)


def _remat(x, average):
  loss = jax.checkpoint(lambda x: jnp.sum(jnp.sin(average(x))))
  return jax.grad(loss)(x)


def _custom(x, average):
  @jax.custom_vjp
  def f(x):
    return average(x)

  f.defvjp(lambda x: (average(x), None), lambda _, ct: (average(ct),))
  return jax.value_and_grad(lambda x: jnp.sum(f(x) ** 2))(x)[1]


def _with_io(x, average):
  x = average(x)
  y = io_callback(
    lambda v: np.asarray(2 * v),
    jax.ShapeDtypeStruct((5,), x.dtype),
    x,
    ordered=True,
  )
  return average(y)


def _keys(x, average):
  key = jax.random.fold_in(jax.random.key(3), 5)
  return average(x + jax.random.normal(key, x.shape))


PROGRAMS = [
  *(_plain, _scanned, _counted, _branched, _inner, _remat, _custom, _with_io),
  _keys,
]


@pytest.mark.parametrize(
  ("program", "donate"),
  [*((f, False) for f in PROGRAMS), *((f, True) for f in PROGRAMS[:2])],
  ids=lambda value: getattr(value, "__name__", str(value)).strip("_"),
)
def test_programs_with_effects_inside(place, program, donate):
  """Equal to the same program in simulation, which has no effects at all."""
  n, rank = place.size, jfog.rank()
  graph = topology.exponential(n)
  start = np.arange(5.0 * n, dtype=np.float32).reshape(n, 5) / 7

  def average(x):
    return jfog.neighbor_allreduce(x, graph)

  dense = jnp.asarray(graph.mixing_matrix, jnp.float32)
  truth = DENSE[program](jnp.asarray(start), dense)
  step = jax.jit(
    lambda x: program(x, average), donate_argnums=(0,) if donate else ()
  )
  for _ in range(3):
    x = jnp.asarray(start[rank])
    np.testing.assert_allclose(step(x), truth[rank], rtol=2e-5, atol=1e-5)
    assert x.is_deleted() == donate


# The same on the values of all ranks at once, by the mixing matrix.
DENSE = {
  _plain: lambda x, w: w @ x,
  _scanned: lambda x, w: w @ w @ w @ x,
  _counted: lambda x, w: w @ w @ x,
  _branched: lambda x, w: w @ w @ x,
  _inner: lambda x, w: w @ x + 1,
  _remat: lambda x, w: w.T @ jnp.cos(w @ x),
  _custom: lambda x, w: w @ (2 * (w @ x)),
  _with_io: lambda x, w: w @ (2 * (w @ x)),
  _keys: lambda x, w: (
    w
    @ (
      x
      + jax.random.normal(jax.random.fold_in(jax.random.key(3), 5), x.shape[1:])
    )
  ),
}


def test_counters_count_payload(place):
  n = place.size
  graph = topology.ring(n, "right")
  jfog.diagnostics.reset_counters()
  x = {"a": jnp.ones(1000), "b": jnp.ones(24, jnp.float32)}
  jax.block_until_ready(jfog.neighbor_allreduce(x, graph))
  counters = jfog.diagnostics.counters()
  peer = (jfog.rank() + 1) % n
  assert counters["bytes_sent"] == counters["bytes_received"] == 4 * 1024
  assert counters["bytes_sent"] == jfog.diagnostics.bytes_per_step(graph, x)
  assert counters["messages_sent"] == 1
  assert counters["operations"] == 1
  assert counters["peers"][peer]["bytes_sent"] == 4 * 1024
