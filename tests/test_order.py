"""Communication is ordered and never dropped, whatever XLA does around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_second_call_of_an_ahead_of_time_executable_fails(place):
  """A sharp bit of JAX's ordered effects, documented in docs/sharp_bits.md."""
  graph = topology.ring(place.size)
  compiled = (
    jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
    .lower(jnp.ones(3))
    .compile()
  )
  np.testing.assert_allclose(compiled(jnp.ones(3)), np.ones(3))
  with pytest.raises(Exception, match=r"(?i)token|buffer|argument|effect"):
    jax.block_until_ready(compiled(jnp.ones(3)))


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
