"""Short exchanges: mailboxes in shared memory, messages between machines, both."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jobs

import jfog
from jfog import topology

SLOTS = 4  # messages that a sender may be ahead of a receiver
LONGEST = 1024  # float32 in a mailbox
GRAPHS = {
  "directed ring": lambda n: topology.ring(n, "right"),
  "star": topology.star,
  "full": topology.fully_connected,
}
TIMEOUT = 3.0

pytestmark = [
  pytest.mark.places("mpi"),
  pytest.mark.mpi(2, 3, 4),
  pytest.mark.host("mailboxes are MPI's"),
]
asleep = pytest.mark.mpi(3)


def failure(operation):
  """The text of the operation's error."""
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(operation())
  return str(caught.value)


def values(count, ranks):
  """Different everywhere; float64, shape (ranks, count)."""
  own = np.arange(count) % 251 / 16.0
  return np.stack([own * (r + 1) - 3 * r for r in range(ranks)])


def close(got, wanted):
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_length_is_averaged(place, machines, name):
  """Also those that go as messages between machines and not in mailboxes."""
  n, rank = place.size, jfog.rank()
  graph = GRAPHS[name](n)
  run = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
  for count in (0, 1, 17, LONGEST - 1, LONGEST, LONGEST + 1, 9000):
    truth = values(count, n)
    x = jnp.asarray(truth[rank], jnp.float32)
    for _ in range(SLOTS + 2):
      x, truth = run(x), graph.mixing_matrix @ truth
    close(x, truth[rank])


def test_lengths_and_graphs_in_turn(place, machines):
  n, rank = place.size, jfog.rank()
  graphs = [make(n) for make in GRAPHS.values()]
  counts = [1, 5000, 300, 20_000, 0, LONGEST, 2]

  @jax.jit
  def run(leaves):
    for k in range(9):
      leaves = [
        jfog.neighbor_allreduce(x, graphs[(k + i) % 3])
        for i, x in enumerate(leaves)
      ]
    return leaves

  truth = [values(count, n) for count in counts]
  got = run([jnp.asarray(leaf[rank], jnp.float32) for leaf in truth])
  for i, leaf in enumerate(truth):
    for k in range(9):
      leaf = graphs[(k + i) % 3].mixing_matrix @ leaf
    close(got[i], leaf[rank])


def test_leaves_of_many_dtypes(place, machines):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n)
  counts = (3, 0, 65, 1, 200)
  dtypes = (np.float32, np.float32, np.float16, np.complex64, np.float32)
  truth = [values(c, n).astype(d) for c, d in zip(counts, dtypes, strict=True)]
  leaves = [*(jnp.asarray(leaf[rank]) for leaf in truth), jnp.float32(rank)]
  *got, scalar = jfog.neighbor_allreduce(leaves, graph)
  for y, leaf in zip(got, truth, strict=True):
    wanted = np.tensordot(graph.mixing_matrix, leaf.astype(complex), 1)[rank]
    assert y.dtype == leaf.dtype
    np.testing.assert_allclose(y, wanted, rtol=2e-3, atol=1e-2)
  close(scalar, (graph.mixing_matrix @ np.arange(n))[rank])


def test_more_chunks_than_buffers(place, machines):
  """A long value: its chunks go through all buffers more than once."""
  n = place.size
  x = np.random.RandomState(5).randn(n, 1_200_011).astype(np.float32)
  for graph in (jfog.topology.ring(n), jfog.topology.ring(n, "right")):
    y = place.run(
      jax.jit(lambda x, graph=graph: jfog.neighbor_allreduce(x, graph)), x
    )
    truth = graph.mixing_matrix @ x.astype(np.float64)
    np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-6)


def test_more_in_flight_than_slots(place, machines):
  """Waited for in another order on each rank."""
  n, rank = place.size, jfog.rank()
  graphs = [make(n) for make in GRAPHS.values()]
  starts = 3 * SLOTS + 1
  truth = values(40, n)

  @jax.jit
  def run(x):
    handles = [
      jfog.neighbor_allreduce_start(x + k, graphs[k % 3]) for k in range(starts)
    ]
    order = [((4 + rank) * k + rank) % starts for k in range(starts)]
    done = {k: jfog.wait(handles[k]) for k in order}
    return [done[k] for k in range(starts)]

  for _ in range(3):
    for k, y in enumerate(run(jnp.asarray(truth[rank], jnp.float32))):
      close(y, (graphs[k % 3].mixing_matrix @ (truth + k))[rank])


@pytest.mark.parametrize("jitted", [False, True])
def test_a_sender_that_runs_ahead(place, machines, jitted):
  """Rank 0 receives from none: it waits where the others are too far behind."""
  n, rank = place.size, jfog.rank()
  path = np.eye(n)
  for r in range(1, n):
    path[r, r - 1 : r + 1] = 0.5
  graph = topology.Topology(path, connected=False)
  step = lambda x, k: jfog.neighbor_allreduce(x + k, graph)  # noqa: E731
  if jitted:
    step = jax.jit(step)
  truth = values(100, n)
  x = jnp.asarray(truth[rank], jnp.float32)
  time.sleep(0.3 * rank)
  for k in range(5 * SLOTS):
    x, truth = step(x, float(k)), path @ (truth + k)
  np.testing.assert_allclose(x, truth[rank], rtol=1e-4, atol=1e-3)


def test_communicators_do_not_share_mailboxes(place, machines):
  """The world and its local part in turn, where these are as large, too."""
  n, rank = place.size, jfog.rank()
  local = machines.local
  members = [r for r in range(n) if r // local.size == rank // local.size]
  ring, full = topology.ring(n), topology.fully_connected(local.size)
  x, truth = jnp.full(5, float(rank)), np.arange(n, dtype=float)
  for k in range(3 * SLOTS):
    y = jfog.neighbor_allreduce(x, ring)
    for _ in range(1 + k % 2):
      z = jfog.neighbor_allreduce(x + k, full, comm=local)
    close(y, (ring.mixing_matrix @ truth)[rank])
    close(z, np.mean(members) + k)


def test_derivatives_pass_mailboxes(place, machines):
  n, rank = place.size, jfog.rank()
  graph = topology.ring(n, "right")
  truth = values(7, n)

  def loss(x):
    return jnp.sum(jfog.neighbor_allreduce(x, graph) ** 2)

  got = jax.grad(loss)(jnp.asarray(truth[rank], jnp.float32))
  matrix = graph.mixing_matrix
  close(got, (2 * matrix.T @ matrix @ truth)[rank])


def test_a_reader_that_does_not_come(world):
  """A full mailbox is not waited for longer than the timeout."""
  if world.rank > 0:
    time.sleep(TIMEOUT + 2)
    return
  peers = jfog.Peers(1.0, {}, [1], check=False)
  text = failure(
    lambda: [jfog.neighbor_allreduce(jnp.ones(3), peers) for _ in range(9)]
  )
  assert text.startswith("DEADLINE_EXCEEDED"), text
  assert f"neighbor_allreduce #{SLOTS} on rank 0" in text
  assert "for rank 1;" in text
  time.sleep(2)


@asleep
def test_handles_in_another_order_beside_a_late_rank(place, world):
  """A later number of a peer proves nothing where its mail has no room."""
  jfog.shutdown()
  jfog.init(timeout=8.0)
  n, rank = place.size, jfog.rank()
  graph = topology.fully_connected(n)
  starts = 2 * SLOTS + 1
  run = jax.jit(
    lambda x, order: [
      jfog.neighbor_allreduce_start(x + k, graph) for k in range(starts)
    ],
    static_argnums=1,
  )
  # Compiled by all before one of them is late, a quarter of the timeout.
  jfog.neighbor_allreduce(jnp.ones(3), graph).block_until_ready()
  if rank == 2:
    time.sleep(2.0)
  handles = run(jnp.full(3, float(rank)), None)
  first = (SLOTS + 1, starts - 1, 0)[rank]
  order = [first, *(k for k in range(starts) if k != first)]
  for k in order:
    close(jfog.wait(handles[k]), np.mean(np.arange(n)) + k)


OTHERS = {
  "collective": lambda x: jfog.allreduce(x),
  "hierarchical": lambda x: jfog.hierarchical_neighbor_allreduce(
    x, topology.ring(1)
  ),
}


@asleep
@pytest.mark.parametrize("name", OTHERS)
def test_mail_shows_what_a_rank_runs(world, name):
  """Ranks that wait for mail, and ranks that wait for messages, name each other.

  Long before the timeout, by which they would announce what they run.
  """
  ring = topology.ring(world.size)
  jfog.neighbor_allreduce(jnp.ones(3), ring).block_until_ready()
  if world.rank == 1:
    text = failure(lambda: OTHERS[name](jnp.ones(3)))
  else:
    text = failure(lambda: jfog.neighbor_allreduce(jnp.ones(3), ring))
  assert text.startswith("FAILED_PRECONDITION"), text
  assert "does not match rank" in text
  assert "neighbor_allreduce #1" in text
  assert "allreduce #1" in text.split("does not match")[1]


@pytest.mark.mpi(2)
def test_operations_that_differ_in_name_only(world):
  other = 1 - world.rank
  if world.rank == 0:
    text = failure(lambda: jfog.pair_gossip(jnp.ones(3), jnp.int32(other)))
  else:
    peers = jfog.Peers(0.5, {other: 0.5}, [other])
    text = failure(lambda: jfog.neighbor_allreduce(jnp.ones(3), peers))
  names = ["pair_gossip #0", "neighbor_allreduce #0"]
  own, theirs = names[world.rank], names[other]
  assert f"{own} on rank {world.rank}" in text
  assert f"does not match rank {other}: it is in {theirs}" in text


def test_a_new_communicator_has_empty_mailboxes(world):
  """After a failure that leaves messages unread."""
  if world.rank == 0:
    peers = jfog.Peers(1.0, {}, [1], check=False)
    for _ in range(SLOTS):
      jfog.neighbor_allreduce(jnp.full(3, np.nan), peers).block_until_ready()
  jfog.shutdown()
  jfog.init(timeout=60)
  n = jfog.size()
  ring = topology.ring(n)
  for k in range(2 * SLOTS):
    y = jfog.neighbor_allreduce(jnp.full(3, float(jfog.rank() + k)), ring)
    close(y, (ring.mixing_matrix @ np.arange(n))[jfog.rank()] + k)


CHUNKS = """
import jax, jax.numpy as jnp, numpy as np, jfog
world = jfog.init(local_size=2)
n, machines = world.size, world.machine_size
x = np.random.RandomState(3).randn(n, 1_200_011).astype(np.float32)
own = jnp.asarray(x[world.rank])
for graph in (jfog.topology.ring(n), jfog.topology.ring(n, "right")):
  y = jfog.neighbor_allreduce(own, graph)
  truth = graph.mixing_matrix[world.rank] @ x.astype(np.float64)
  np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-6)
ring = jfog.topology.ring(machines)
y = jfog.hierarchical_neighbor_allreduce(own, ring)
means = x.astype(np.float64).reshape(machines, 2, -1).mean(axis=1)
truth = ring.mixing_matrix[world.rank // 2] @ means
np.testing.assert_allclose(y, truth, rtol=1e-5, atol=1e-6)
from jfog.runtime import _extensions
print("RIGHT", _extensions.mpi().chunks_in_flight(world.context), flush=True)
"""


@pytest.mark.parametrize("chunks", ["3", "64"])
def test_more_chunks_in_flight(chunks):
  code, out, err = jobs.run_program(
    CHUNKS, 4, deadline=240, environment={"JFOG_CHUNKS_IN_FLIGHT": chunks}
  )
  assert (code, out.count(f"RIGHT {chunks}\n")) == (0, 4), err
