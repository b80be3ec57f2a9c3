"""Ranks that disagree get errors that name both sides, never wrong numbers."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology

pytestmark = [
  pytest.mark.places("mpi-2", "mpi-3", "mpi-4"),
  pytest.mark.host("NCCL reports it in the next call: see test_nccl.py"),
]
TIMEOUT = 3.0
# Tests that wait for seconds, in the same way for any number of ranks.
asleep = pytest.mark.places("mpi-3")


def outcome(operation):
  """The text of the error, or None if the operation went well."""
  try:
    jax.block_until_ready(operation())
    jax.effects_barrier()
  except jax.errors.JaxRuntimeError as error:
    return str(error)
  return None


def ring_average(x):
  return jfog.neighbor_allreduce(x, topology.ring(jfog.size()))


def idle_or_right():
  """A ring in round 0, nothing in round 1."""
  n = jfog.size()
  idle = topology.Topology(np.eye(n), connected=False)
  return topology.Schedule([topology.ring(n, "right"), idle])


MISMATCHES = {
  "dtype": lambda odd: ring_average(
    jnp.ones(4, jnp.float32 if odd else jnp.complex64)
  ),
  "shape": lambda odd: ring_average(jnp.ones(3 if odd else 30_000)),
  "leaves": lambda odd: ring_average(
    (jnp.ones(2), jnp.ones(2)) if odd else jnp.ones(4)
  ),
  "order": lambda odd: (
    (jfog.allreduce(jnp.ones(3)), ring_average(jnp.ones(3)))
    if odd
    else (ring_average(jnp.ones(3)), jfog.allreduce(jnp.ones(3)))
  ),
  "graph": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(3),
    topology.fully_connected(jfog.size()).lazy()
    if odd
    else topology.fully_connected(jfog.size()),
  ),
  "step": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(3),
    topology.Schedule(
      [topology.ring(jfog.size()), topology.ring(jfog.size()).lazy()]
    ),
    int(odd),
  ),
  # The odd rank is idle in its round: it believes in no edge, its neighbors do.
  "edge": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(3), idle_or_right(), int(odd)
  ),
  "long edge": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(300_000), idle_or_right(), int(odd)
  ),
  "only the sender": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(3), jfog.Peers(1.0, {}, [0] if odd else [])
  ),
  "only the receiver": lambda odd: jfog.neighbor_allreduce(
    jnp.ones(3), jfog.Peers(1.0, {0: 1.0} if odd else {}, [])
  ),
  "machines": lambda odd: jfog.hierarchical_neighbor_allreduce(
    jnp.ones(3 if odd else 300_000), topology.ring(1)
  ),
  "gather": lambda odd: jfog.neighbor_allgather(
    jnp.ones(3, jnp.int32 if odd else jnp.float32),
    topology.ring(jfog.size()),
  ),
  "lengths": lambda odd: jfog.neighbor_allgather(
    jnp.ones(3 if odd else 300_000), topology.ring(jfog.size())
  ),
  "rounds": lambda odd: jfog.finite_time_average(
    jnp.ones(3),
    (topology.ceca if odd else topology.fully_connected)(jfog.size()),
  ),
  "window": lambda odd: jfog.win_create(
    jnp.ones(3 if odd else 4), topology.ring(jfog.size())
  ),
  "window's graph": lambda odd: jfog.win_create(
    jnp.ones(3),
    topology.star(jfog.size()).lazy() if odd else topology.star(jfog.size()),
  ),
  "window's p": lambda odd: jfog.win_create(
    jnp.ones(3), topology.ring(jfog.size()), associated_p=odd
  ),
  "no window": lambda odd: (
    jfog.barrier()
    if odd
    else jfog.win_create(jnp.ones(3), topology.ring(jfog.size()))
  ),
  "handle": lambda odd: jfog.wait(
    jfog.neighbor_allreduce_start(
      jnp.ones(3 if odd else 300_000), topology.ring(jfog.size())
    )
  ),
  "reduction": lambda odd: jfog.allreduce(jnp.ones(3), "sum" if odd else "max"),
  "root": lambda odd: jfog.broadcast(jnp.ones(3), int(odd)),
  "collective": lambda odd: (
    jfog.broadcast(jnp.ones(3)) if odd else jfog.allgather(jnp.ones(3))
  ),
  "count": lambda odd: jfog.allreduce(jnp.ones(3 if odd else 300_000)),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch(world, name):
  odd = world.rank == world.size - 1
  start = time.monotonic()
  error = outcome(lambda: MISMATCHES[name](odd))
  assert time.monotonic() - start < 3 * TIMEOUT
  # A rank whose own operation could be completed learns of it by its next ones.
  for _ in range(3):
    error = error or outcome(lambda: ring_average(jnp.ones(2)))
  assert error is not None
  assert "jfog:" in error
  assert f"on rank {world.rank}" in error
  # ABORTED where the other side has found out first and given up its world.
  assert error.startswith(
    ("FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "ABORTED")
  )
  # From now on the first error is the answer to everything.
  again = outcome(lambda: jfog.allreduce(jnp.ones(1)))
  assert again is not None
  assert again.splitlines()[0] == error.splitlines()[0]


def test_both_sides_are_named(world):
  odd = world.rank == 1
  error = outcome(lambda: MISMATCHES["shape"](odd))
  if world.rank < 2:
    other = 1 - world.rank
    assert error is not None
    assert f"neighbor_allreduce #0 on rank {world.rank}" in error
    assert f"does not match rank {other}" in error or (
      world.size > 2 and "does not match rank" in error
    )
    assert re.search(r"other dtypes or shapes: 1 leaf, float\d+ x \d+", error)


TEXTS = {
  "leaves": r"other dtypes or shapes: (1 leaf,|2 leaves of) float\d+",
  "gather": r"other dtypes or shapes: 1 leaf, \w+ x 3; axis_sizes=",
  "step": "it uses another graph, or another step of it",
  "root": "it uses another root",
  "reduction": "it uses another reduction",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_say_what_differs(world, name):
  error = outcome(lambda: MISMATCHES[name](world.rank == 1))
  if world.rank < 2:
    assert error is not None
    # ABORTED where the other side has found out first.
    assert re.search(TEXTS[name], error) or error.startswith("ABORTED"), error


LEAVES = {
  "length": (
    (jnp.ones((2, 3)), jnp.ones((2, 6))),
    r"x\['b'\] of shape \(2, [36],?\) is float32 x (6|12) here and float32 x "
    r"(6|12) there",
  ),
  "dtype": (
    (jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32)),
    r"x\['b'\] of shape \(2, 3\) is (float32|int32) x 6 here and "
    r"(float32|int32) x 6 there",
  ),
  "halves": (
    (jnp.ones((2, 3)), jnp.ones((2, 3), jnp.bfloat16)),
    r"x\['b'\] of shape \(2, 3\) is (bfloat16|float32) x 6 here and "
    r"(bfloat16|float32) x 6 there",
  ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_the_leaf_that_differs_is_named(world, name):
  """Of a tree of several leaves, by its path, with both sides."""
  forms, text = LEAVES[name]
  b = forms[world.rank == 1]
  tree = {"a": jnp.ones(3), "b": b, "c": [jnp.ones(()), jnp.ones(0)]}
  error = outcome(lambda: jfog.allreduce(tree, "sum"))
  if world.size > 1:
    assert error is not None
    assert re.search(text, error), error


@asleep
def test_a_rank_that_does_not_come(world):
  start = time.monotonic()
  if world.rank == 1:
    time.sleep(TIMEOUT + 2)
    return
  error = outcome(
    lambda: jfog.neighbor_allreduce(
      jnp.ones(3), topology.fully_connected(world.size)
    )
  )
  assert error is not None
  assert error.startswith("DEADLINE_EXCEEDED")
  assert f"neighbor_allreduce #0 on rank {world.rank}" in error
  assert "for rank 1;" in error
  assert time.monotonic() - start > TIMEOUT
  time.sleep(2)


@asleep
def test_a_rank_that_does_not_come_to_a_collective(world):
  if world.rank == 1:
    time.sleep(TIMEOUT + 2)
    return
  error = outcome(lambda: jfog.allreduce(jnp.ones(3)))
  assert error is not None
  assert error.startswith("DEADLINE_EXCEEDED")
  assert "allreduce #0" in error
  assert "for rank 1;" in error
  time.sleep(2)


@asleep
def test_a_new_world_works_after_a_failure(world):
  if world.rank != 0:
    time.sleep(TIMEOUT + 1)
  else:
    assert outcome(lambda: jfog.allreduce(jnp.ones(3))) is not None
  jfog.shutdown()
  jfog.init(timeout=60)
  x = np.arange(world.size, dtype=np.float32)
  y = ring_average(jnp.float32(world.rank))
  truth = topology.ring(world.size).mixing_matrix @ x
  np.testing.assert_allclose(y, truth[world.rank], rtol=1e-6)


@asleep
@pytest.mark.parametrize("local_size", [None, 1])
def test_a_mutex_that_is_not_given_back(world, local_size):
  """Its peers get an error, and no rank hangs."""
  jfog.shutdown()
  world = jfog.init(timeout=TIMEOUT, local_size=local_size)
  win = jfog.win_create(jnp.ones(3), topology.ring(world.size))
  take = lambda ranks: jfog.win_mutex(win, ranks).__enter__()  # noqa: E731
  with jfog.win_mutex(win, [0]):
    error = outcome(lambda: take(None))
    assert error is not None
    assert error.startswith("FAILED_PRECONDITION")
    assert "taken it already" in error
  jfog.barrier()
  if world.rank == 0:
    with jfog.win_mutex(win, [2]):
      time.sleep(2 * TIMEOUT)
    return
  time.sleep(1)
  error = outcome(lambda: take([2]))
  assert error is not None
  assert error.startswith("DEADLINE_EXCEEDED")
  assert "win_mutex" in error
  # The world is spoiled, its windows too.
  assert outcome(lambda: jfog.win_put(win, jnp.ones(3))) == error
  time.sleep(TIMEOUT)


def test_use_after_shutdown(world):
  """In programs that were compiled before, lowered before, and made after."""
  ring, x = topology.ring(world.size), jnp.ones(2)

  def mix(x):
    return jfog.neighbor_allreduce(x, ring, comm=world)

  compiled = jax.jit(mix)
  np.testing.assert_allclose(compiled(x), 1)
  lowered = jax.jit(lambda x: mix(2 * x)).lower(x)
  jfog.shutdown()
  for operation in (
    lambda: jfog.allreduce(x, comm=world),
    lambda: compiled(x),
    lambda: lowered.compile()(x),
    lambda: jax.jit(lambda x: mix(3 * x))(x),
    lambda: jfog.neighbor_allgather(x, ring, comm=world),
  ):
    text = outcome(operation)
    assert text is not None
    assert text.startswith("FAILED_PRECONDITION"), text
    assert "on a communicator that was shut down" in text, text


def test_a_graph_is_compared_once(world, place):
  """Also where several programs use it, each with a plan of its own."""
  n = place.size
  matrix = 0.625 * np.eye(n) + 0.375 * np.roll(np.eye(n), 1, axis=1)
  graph = topology.Topology(matrix)
  x = np.arange(3.0 * n, dtype=np.float32).reshape(n, 3)

  def mix(x):
    return jfog.neighbor_allreduce(x, graph)

  before = jfog.diagnostics.counters()["agreements"]
  for f, power in (
    (mix, 1),
    (jax.jit(mix), 1),
    (jax.jit(lambda x: mix(mix(x))), 2),
    (lambda x: jfog.wait(jfog.neighbor_allreduce_start(x, graph)), 1),
  ):
    expected = np.linalg.matrix_power(graph.mixing_matrix, power) @ x
    y = f(jnp.asarray(x[jfog.rank()]))
    np.testing.assert_allclose(y, expected[jfog.rank()], rtol=1e-6)
  assert jfog.diagnostics.counters()["agreements"] == before + 1


# Peers: every rank speaks for itself, and asks new peers before it sends.


def by_rank(*arguments):
  """The peers of this rank; those behind the last have none."""
  return jfog.Peers(*[*arguments, *[(1.0, {}, [])] * 4][jfog.rank()])


def pair(other):
  return 0.5, {other: 0.5}, [other]


def exchange(peers):
  return jfog.neighbor_allreduce(jnp.ones(3), peers)


def known_and_new():
  """Pairs 0-1, and 2 alone; then rank 0 changes, and 1 does what it knows."""
  jax.block_until_ready(exchange(by_rank(pair(1), pair(0))))
  jax.block_until_ready(exchange(by_rank((1.0, {}, []))))
  return exchange(by_rank((1.0, {}, []), pair(0)))


PEERS = {
  "sent and not expected": lambda: exchange(by_rank((1.0, {}, [1]))),
  "expected and not sent": lambda: exchange(by_rank((0.5, {1: 0.5}, []))),
  "gathered and not sent": lambda: jfog.neighbor_allgather(
    jnp.ones(3), by_rank((0.5, {1: 0.5}, []))
  ),
  "known to one and not meant by the other": known_and_new,
  "gossip": lambda: jfog.pair_gossip(jnp.ones(3), [1, 1, 2, 3][jfog.rank()]),
}


@pytest.mark.places("mpi-2", "mpi-3")
@pytest.mark.parametrize("name", PEERS)
def test_peers_that_do_not_match(world, name):
  text = outcome(PEERS[name])
  rank = jfog.rank()
  if text is not None:
    assert "FAILED_PRECONDITION" in text, text
    assert "rank 0" in text and "rank 1" in text, text
  assert text is not None or rank != (0 if "known" not in name else 1)
  # Those who could do their part learn of it at their next operation.
  deadline = time.monotonic() + 60
  while text is None and time.monotonic() < deadline:
    text = outcome(lambda: exchange(jfog.Peers(1.0, {}, [])))
    time.sleep(0.02)
  assert text is not None and "does not match" in text, text


@pytest.mark.places("mpi-3", "mpi-4")
def test_peers_are_asked_once(world, place):
  """Also where a set of peers is new to one rank and not to the other."""
  n, rank = place.size, jfog.rank()
  pairs = [(i, j) for j in range(n) for i in range(j)]
  known = set()
  for check in (False, True):
    for i, j in [*pairs, *reversed(pairs)]:
      other = {i: j, j: i}.get(rank)
      peers = jfog.Peers(1.0, {}, [])
      if other is not None:
        peers = jfog.Peers(0.0, {other: 1.0}, [other], check=check)
      before = jfog.diagnostics.counters()["agreements"]
      y = jfog.neighbor_allreduce(jnp.full(3, float(rank)), peers)
      np.testing.assert_array_equal(y, rank if other is None else other)
      asked = jfog.diagnostics.counters()["agreements"] - before
      assert asked == (check and other is not None and other not in known)
      if check:
        known.add(other)
