"""Jobs that go on when a rank fails: averages without it, and a world without it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults import check
from support import jobs
from test_pages import programs

import jfog
from jfog import launch, runtime, topology

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
SEEDS = (4, 5)
SIZE = 5
GRAPHS = [
  topology.ring(SIZE),
  topology.ring(SIZE, "right"),
  topology.one_peer_exponential(SIZE),
  topology.star(SIZE),
]


def dense(matrix, present):
  """A mixing matrix whose missing edges count for the receiver's own value."""
  kept = matrix * present
  np.fill_diagonal(kept, 0)
  own = np.diag(matrix) + (matrix * ~present).sum(axis=1)
  own -= np.diag(matrix) * ~np.diag(present)
  return kept + np.diag(own)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_simulation_goes_on_without_ranks_and_messages(graph):
  random = np.random.RandomState(0)
  x = random.randn(SIZE, 3).astype(np.float32)

  @jax.jit
  def average(x, alive, edge_ok, step):
    # Jitted inside as well: its cache must not ignore who is missing.
    mix = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph, step))
    mix = jfog.simulate(mix, SIZE, alive=alive, edge_ok=edge_ok)
    return mix(x)

  for step in range(4):
    alive, edge_ok = random.rand(SIZE) > 0.3, random.rand(SIZE, SIZE) > 0.3
    present = edge_ok & alive[:, None] & alive[None, :]
    expected = dense(graph[step].mixing_matrix, present) @ x
    got = average(x, alive, edge_ok, step)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_at_run_time_go_to_the_own_value():
  graph = topology.ring(SIZE)
  weights = jnp.asarray(graph.mixing_matrix)
  alive = np.arange(SIZE) != 2
  x = np.random.RandomState(0).randn(SIZE).astype(np.float32)
  got = jfog.simulate(
    lambda x: jfog.neighbor_allreduce(x, graph, weights=weights),
    SIZE,
    alive=alive,
  )(x)
  expected = dense(graph.mixing_matrix, alive[:, None] & alive[None, :]) @ x
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_pairs_go_on_without_ranks_and_messages():
  peers = [1, 0, 3, 2, 4]
  alive = np.arange(SIZE) != 3
  edge_ok = np.ones((SIZE, SIZE), bool)
  edge_ok[0, 1] = False
  x = np.random.RandomState(0).randn(SIZE, 3).astype(np.float32)
  matrix = np.zeros((SIZE, SIZE))
  matrix[np.arange(SIZE), peers] = 0.25
  matrix += 0.75 * np.eye(SIZE)
  expected = dense(matrix, edge_ok & alive[:, None] & alive[None, :]) @ x
  for peer in (lambda: peers, lambda: jnp.asarray(peers)[jfog.rank()]):
    got = jfog.simulate(
      lambda x, peer=peer: jfog.pair_gossip(
        x, peer(), self_weight=0.75, pair_weight=0.25
      ),
      SIZE,
      alive=alive,
      edge_ok=edge_ok,
    )(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_other_operations_refuse_missing_ranks():
  alive = jnp.ones(SIZE, bool)
  for operation in (jfog.allreduce, jfog.broadcast, jfog.allgather):
    with pytest.raises(
      ValueError,
      match="only neighbor_allreduce, pair_gossip and those of windows",
    ):
      jfog.simulate(operation, SIZE, alive=alive)(jnp.ones((SIZE, 1)))


@pytest.mark.parametrize(
  "masks", [{"alive": np.ones(3, bool)}, {"edge_ok": np.ones((SIZE, SIZE))}]
)
def test_masks_of_another_shape_or_dtype(masks):
  run = jfog.simulate(lambda x: x, SIZE, **masks)
  with pytest.raises(ValueError, match="pass bools of shape"):
    run(jnp.ones(SIZE))


def test_a_graph_without_ranks():
  graph = topology.without(topology.hypercube(8), [1, 6])
  assert graph.is_doubly_stochastic
  assert graph.in_neighbors(1) == ()
  smaller = topology.without(topology.hypercube(8), [1, 6], renumber=True)
  left = [0, 2, 3, 4, 5, 7]
  kept = graph.mixing_matrix[np.ix_(left, left)]
  np.testing.assert_allclose(smaller.mixing_matrix, kept)
  schedule = topology.one_peer_exponential(4)
  assert topology.without(schedule, [2], renumber=True).size == 3
  with pytest.raises(ValueError, match="renumber=True"):
    topology.without(schedule, [2])
  with pytest.raises(ValueError, match="not strongly connected"):
    topology.without(topology.ring(6), [0, 3], renumber=True)
  with pytest.raises(ValueError, match="all 3 ranks are missing"):
    topology.without(topology.ring(3), range(3))


def test_bad_on_missing_names_the_values():
  with pytest.raises(ValueError, match="must be 'error' or 'reweight'"):
    jfog.init(on_missing="retry")


# The optimizers of the table in docs/failures.md. The losses are |x - b|^2 / 2, so the
# optimum of some ranks is the mean of their b.
RING = topology.ring(SIZE)
LOST = 2
OPTIMIZERS = {
  "adapt_then_combine": lambda: jfog.optimizers.adapt_then_combine(
    optax.sgd(0.05), RING
  ),
  "push_sum": lambda: jfog.optimizers.push_sum(optax.sgd(0.05), RING),
  "gradient_tracking": lambda: jfog.optimizers.gradient_tracking(
    optax.sgd(0.05), RING
  ),
  "exact_diffusion": lambda: jfog.optimizers.exact_diffusion(
    optax.sgd(0.05), RING
  ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_as_documented(name):
  tx = OPTIMIZERS[name]()
  b = np.random.RandomState(0).randn(SIZE, 4).astype(np.float32)
  left = [rank for rank in range(SIZE) if rank != LOST]

  @jax.jit
  def train(params, state, alive):
    def body(carry, _):
      def step(params, state, b):
        updates, state = tx.update(params - b, state, params)
        return optax.apply_updates(params, updates), state

      return jfog.simulate(step, SIZE, alive=alive)(*carry, b), None

    return jax.lax.scan(body, (params, state), length=400)[0]

  init = jax.jit(jfog.simulate(tx.init, SIZE))
  params = jnp.zeros((SIZE, 4))
  params, state = train(params, init(params), jnp.ones(SIZE, bool))
  alive = jnp.arange(SIZE) != LOST
  kept, _ = train(params, state, alive)
  anew, _ = train(params, init(params), alive)
  best, before = b[left].mean(axis=0), b.mean(axis=0)
  means = [np.asarray(x)[left].mean(axis=0) for x in (kept, anew)]
  remembers = name in ("gradient_tracking", "exact_diffusion")
  np.testing.assert_allclose(means[0], before if remembers else best, atol=2e-3)
  np.testing.assert_allclose(means[1], best, atol=2e-3)


def launched(program, ranks, *options):
  """Runs a program on ranks of a fault-tolerant job."""
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", str(ranks), *options]
  )
  return jobs.run_program(
    program, ranks, deadline=check.DEADLINE, command=command
  )


@needs_mpi
@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults(seed):
  check.run(check.Plan.of_seed(seed))


@needs_mpi
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_random_faults(seed):
  check.run(check.Plan.of_seed(seed))


@needs_mpi
def test_the_programs_of_the_page():
  reweight, recover, stuck, join = programs("failures.md")
  code, out, err = launched(reweight, 3)
  assert code == 0, err
  assert out == "{1: 70}\n"
  code, out, err = launched(recover, 3)
  assert code == 0, err
  assert sorted(out.splitlines()) == ["0 of 2 (0, 2)", "1 of 2 (0, 2)"]
  assert "rank 1 failed (exit code 1); the others go on" in err
  code, out, err = launched(stuck, 3)
  assert code == 0, err
  assert sorted(out.splitlines()) == ["0 (1,)", "2 (1,)"]
  code, out, err = launched(join, 3, "--spares", "2")
  assert code == 0, err
  lines = [f"{rank} of 3 (1,)" for rank in range(3)]
  assert sorted(out.splitlines()) == lines


OPERATIONS = """
import json, os, signal, time
import jax, jax.numpy as jnp, numpy as np, jfog
world = jfog.init(on_missing="reweight")
x = jnp.full(3, float(world.rank))
ring = jfog.topology.ring
operations = [
  lambda x, n: jfog.allreduce(x, "sum"),
  lambda x, n: jfog.neighbor_allgather(x, ring(n)),
  lambda x, n: jfog.broadcast(x, 0),
  lambda x, n: jfog.finite_time_average(x, jfog.topology.ceca(n)),
]
for k, operation in enumerate(operations):
  me, n = world.rank, world.size
  try:
    jfog.barrier()  # some may still be in it when the rank is lost
    if me == (0 if k % 2 else n - 1):
      os.kill(os.getpid(), signal.SIGKILL)
    # The rank that is lost is the last neighbor of some, and none of others.
    for _ in range(3):
      jax.block_until_ready(operation(x, n))
    print("NO ERROR", k, flush=True)
  except jax.errors.JaxRuntimeError as error:
    assert jfog.is_rank_failure(error), error
    assert str(error).startswith("UNAVAILABLE: jfog: "), error
  world = jfog.recover()
  assert world.size == n - 1
total = jfog.allreduce(x, "sum")
print("TOTAL", json.dumps([world.launched_ranks, float(total[0])]), flush=True)
"""


@needs_mpi
def test_each_operation_names_the_rank_and_the_rest_recover():
  code, out, err = launched(OPERATIONS, 6)
  assert code == 0, err
  assert "NO ERROR" not in out, out
  totals = [json.loads(text) for text in re.findall("TOTAL (.*)", out)]
  assert totals == [[[2, 3], 5.0]] * 2, (out, err)


# Rank 1 is lost before step 6. Each step has peers that are new at first.
PEERS = """
import json, os, signal
import jax, jax.numpy as jnp, numpy as np, jfog
LOST, AT, STEPS = 1, 6, 24
world = jfog.init(on_missing="reweight", timeout=100)
me, n = world.rank, world.size
values = truth = np.random.RandomState(0).randn(n, {length}).astype(np.float32)
x = jnp.asarray(values[me])
pair = jax.jit(lambda x, peer: jfog.pair_gossip(x, peer))
for step in range(STEPS):
  if (me, step) == (LOST, AT):
    os.kill(os.getpid(), signal.SIGKILL)
  matrix = np.zeros((n, n))
  if step % 2:
    for i in range(n):
      matrix[i, i] += 0.5
      matrix[i, i ^ (1 << step // 2 % 2)] += 0.5
    x = pair(x, me ^ (1 << step // 2 % 2))
  else:
    shift = 1 + step // 2 % (n - 1)
    for i in range(n):
      matrix[i, i], matrix[i, (i - shift) % n] = 0.25, 0.5 if step % 4 else 0.75
    source, destination = (me - shift) % n, (me + shift) % n
    x = jfog.neighbor_allreduce(
      x, jfog.Peers(0.25, {{source: matrix[me, source]}}, [destination]))
  if step >= AT:
    here = np.arange(n) != LOST
    absent = ~(here[:, None] & here[None, :])
    np.fill_diagonal(absent, False)
    matrix += np.diag((matrix * absent).sum(axis=1))
    matrix[absent] = 0
  truth = matrix @ truth
  np.testing.assert_allclose(x, truth[me], rtol=1e-4, atol=1e-5)
counted = jfog.diagnostics.counters()["missing"]
# Where the sender scales, its weight is known to it alone.
scaled = None
if me in (0, 2):
  try:
    peers = jfog.Peers(0.5, {{LOST: 0.5}}, {{LOST: 2.0}})
    jax.block_until_ready(jfog.neighbor_allreduce(x, peers))
  except jax.errors.JaxRuntimeError as error:
    scaled = jfog.is_rank_failure(error)
print("DONE", json.dumps([me, scaled, counted]), flush=True)
"""


@needs_mpi
@pytest.mark.parametrize("length", [3, 40_000])
@pytest.mark.parametrize("local_size", ["", "1"], ids=["shared", "messages"])
def test_peers_go_on_without_a_rank(local_size, length):
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", "4"]
  )
  code, out, err = jobs.run_program(
    PEERS.format(length=length),
    4,
    deadline=check.DEADLINE,
    command=command,
    environment={"JFOG_LOCAL_SIZE": local_size},
  )
  assert code == 0, err
  rows = sorted(json.loads(text) for text in re.findall("DONE (.*)", out))
  assert [row[:2] for row in rows] == [[0, True], [2, True], [3, None]], rows
  for _, _, counted in rows:
    assert counted["1"] > 0, rows


@needs_mpi
def test_a_job_all_of_whose_ranks_fail_fails():
  code, _, err = launched(
    "import jfog\nr = jfog.init().rank\njfog.barrier()\nraise ValueError(r)", 2
  )
  assert code == 1
  assert "failed first (exit code 1)" in err


@needs_mpi
def test_a_rank_that_fails_before_init_ends_the_job():
  code, _, err = launched(
    "import os, jfog\n"
    "if os.environ['OMPI_COMM_WORLD_RANK'] == '1': raise ValueError('no data')\n"
    "jfog.init()",
    2,
  )
  assert code == 1
  assert "ValueError: no data" in err


@needs_mpi
def test_recovery_needs_the_option():
  program = """
import jfog
jfog.init()
for call in (jfog.recover, lambda: jfog.init(on_missing="reweight")):
  try:
    call()
  except (RuntimeError, ValueError) as error:
    print(error)
  jfog.shutdown()
"""
  code, out, err = jobs.run_program(program, 1, deadline=check.DEADLINE)
  assert code == 0, err
  assert out.count("start it with `jfog run --fault-tolerant`") == 2, out


PROGRAMS = """
import hashlib, os, signal
import jax, jax.numpy as jnp, jfog
world = jfog.init(local_size={local_size})
x = jnp.ones(3)

def digest():
  graph = jfog.topology.ring(world.size)
  def step(x):
    x = jfog.neighbor_allreduce(jfog.allreduce(x), graph)
    return jfog.allreduce(x, comm=world.local)
  text = jax.jit(step).lower(x).as_text()
  return hashlib.sha256(text.encode()).hexdigest()[:12]

if not world.launched_ranks:
  print("FIRST", world.rank, world.size, digest(), flush=True)
  jfog.barrier()
  old = world
  if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  try:
    while True:
      jfog.allreduce(x).block_until_ready()
  except jax.errors.JaxRuntimeError as error:
    world = jfog.recover()
  if world.size != old.size:
    try:
      jfog.barrier(comm=old)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      assert "jfog" in str(error), error
    else:
      raise AssertionError("the old world is in use")
print("LATER", world.rank, world.size, digest(), flush=True)
jfog.barrier()
"""


@needs_mpi
@pytest.mark.parametrize("local_size", [None, 2])
def test_a_world_whose_ranks_are_replaced_has_the_same_programs(local_size):
  program = PROGRAMS.format(local_size=local_size)
  code, out, err = launched(program, 4, "--spares", "1")
  assert code == 0, (out, err)
  first, later = (
    dict(re.findall(rf"{when} (\d 4) (\w+)", out))
    for when in ("FIRST", "LATER")
  )
  assert len(first) == len(later) == 4, out
  assert first == later


@needs_mpi
def test_a_smaller_world_refuses_communicators_of_the_larger_one():
  code, out, err = launched(PROGRAMS.format(local_size=None), 4)
  assert code == 0, (out, err)
  assert len(re.findall(r"LATER \d 3", out)) == 3, out


WATCHED = """
import os, signal
import jax, jax.numpy as jnp, jfog
world = jfog.init(on_missing="reweight", check_programs=True, timeout=100)
x = jnp.ones(1000)

def average(x):
  return jfog.neighbor_allreduce(x, jfog.topology.ring(world.size))

if not world.joined_ranks:
  x = jax.jit(average)(x).block_until_ready()
  if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  while not jfog.missing_ranks():
    pass
  # It is compiled without the lost rank, which the check waits for in vain.
  x = jax.jit(lambda x: average(2 * x))(x).block_until_ready()
  world = jfog.recover()
for _ in range(5):
  x = jax.jit(average)(x)
x.block_until_ready()
print("END", world.rank, flush=True)
"""


@needs_mpi
def test_the_summary_is_that_of_the_last_world():
  options = ("--fault-tolerant", "--spares", "1", "--summary", "-np", "4")
  command = launch.command_line(["--no-tag-output", *options])
  code, out, err = jobs.run_program(
    WATCHED, 4, deadline=check.DEADLINE, command=command
  )
  assert code == 0, err
  assert sorted(out.splitlines()) == [f"END {rank}" for rank in range(4)]
  rows = re.findall(r"jfog: +(\d) +(\d+) +40 kB +40 kB", err)
  assert rows == [(str(rank), "5") for rank in range(4)], err
  assert "jfog: 4 ranks, " in err


LATE = """
import os, signal, threading, time
import jax, jax.numpy as jnp, numpy as np, jfog
world = jfog.init(local_size=1, on_missing="reweight", timeout=100.0)
n, x = world.size, jnp.ones(4) * world.rank
random = np.random.RandomState(0)
averages = []
for _ in range(40):
  weights = random.uniform(size=(n, n))
  graph = jfog.topology.Topology(weights / weights.sum(axis=1, keepdims=True))
  averages.append(
    jax.jit(lambda x, graph=graph: jfog.neighbor_allreduce(x, graph)).lower(x).compile()
  )
zeros, ring = jnp.zeros(900), jfog.topology.ring(n)
win = jfog.win_create(zeros, ring)
put = jax.jit(jfog.win_put).lower(win, zeros).compile()
processes = jfog.allgather(jnp.array([os.getpid()], jnp.int32))
late, lost = int(processes[1]), int(processes[3])
def send(process, number):
  try:
    os.kill(process, number)
  except ProcessLookupError:  # on a loaded machine it may have ended before
    pass
def befall():
  time.sleep({delay})
  send(late, signal.SIGSTOP)
  send(lost, signal.SIGKILL)
  time.sleep(0.3)
  send(late, signal.SIGCONT)
thread = threading.Thread(target=befall, daemon=True)
if world.rank == 0:
  thread.start()
for average in averages:
  x = average(x)
if world.rank == 3:
  time.sleep(1000)  # until it is killed
win = jax.block_until_ready(put(win, zeros + 1))
x, win = jfog.win_update(win, zeros, self_weight=0.0, src_weights=1.0)
if world.rank == 0:
  thread.join()
print("LEFT", world.rank, flush=True)
"""


@needs_mpi
@pytest.mark.parametrize(
  "delay", [0.001, pytest.param(0.002, marks=pytest.mark.soak)]
)
def test_a_rank_that_is_late_to_learn_of_a_failure_is_heard(delay):
  """Its collective, which the others do not take part in, took its messages along."""
  code, out, err = launched(LATE.replace("{delay}", str(delay)), 4)
  assert code == 0, (out, err)
  lines = [f"LEFT {rank}" for rank in range(3)]
  assert sorted(out.splitlines()) == lines


MESSAGES = """
import os, signal
import jax, jax.numpy as jnp, jfog
world = jfog.init(local_size=1, on_missing="reweight", timeout=100.0)
graph = jfog.topology.exponential(world.size)
average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
x = jnp.full({length}, float(world.rank))
for step in range(300):
  if (step, world.rank) in ((5, 3), (9, 0)):
    os.kill(os.getpid(), signal.SIGKILL)
  x = jax.block_until_ready(average(x))
print("LEFT", world.rank, jfog.missing_ranks(), flush=True)
"""


@needs_mpi
@pytest.mark.parametrize("length", [300, 60_000])
def test_messages_to_lost_ranks_take_nothing_from_the_others(length):
  """Some 200 messages to a lost rank stopped those to all others."""
  code, out, err = launched(MESSAGES.format(length=length), 5)
  assert code == 0, (out, err)
  lines = [f"LEFT {rank} (0, 3)" for rank in (1, 2, 4)]
  assert sorted(out.splitlines()) == lines
