"""Windows under fire: races, ranks at different paces, stalls, leaks, ends.

Each test is a job of its own, with a deadline, and looks at several things, for
a job takes seconds to start. `TRANSPORTS` are the ways by which windows are
reached: memory that ranks share, also where MPI's own messages go over TCP, and
messages alone, over shared memory and over TCP.
"""

import re

import pytest
from support import jobs

from jfog import runtime

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
DEADLINE = 600.0  # seconds; each of these takes ten when all is quiet
TCP = {"OMPI_MCA_btl": "self,tcp", "OMPI_MCA_pml": "ob1"}
MESSAGES = {"JFOG_SHARED_MEMORY": "0"}
TRANSPORTS = {
  "shared memory": {},
  "shared memory beside TCP": TCP,
  "messages": MESSAGES,
  "messages over TCP": {**MESSAGES, **TCP},
}

HEAD = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np, jfog
from jax.errors import JaxRuntimeError
world = jfog.init(timeout=60)
rank, size = world.rank, world.size
def fails(code, call):
  try:
    jax.block_until_ready(jax.tree.leaves(call()))
  except JaxRuntimeError as error:
    assert code in str(error), error
    return str(error)
  raise AssertionError("no error")
"""


def run(program, ranks, transport="shared memory", **environment):
  """Runs a program on ranks; returns code, stdout and stderr."""
  return jobs.run_program(
    HEAD + program,
    ranks,
    deadline=DEADLINE,
    environment={**TRANSPORTS[transport], **environment},
  )


def succeeds(program, ranks, transport="shared memory", **environment):
  """Runs a program that ends well; returns its stdout."""
  code, out, err = run(program, ranks, transport, **environment)
  assert code == 0, f"exit status {code}\n{out}\n{err}"
  return out


RACES = """
graph = jfog.topology.fully_connected(size)
n = 1_000_000
win = jfog.win_create(jnp.full(n, -1.0), graph)
put = jax.jit(lambda win, k: jfog.win_put(win, jnp.full(n, k)))
def look(win):
  seen = []
  for j in graph.in_neighbors(rank):
    y, win = jfog.win_update(
      win, jnp.zeros(n), self_weight=0, src_weights={j: 1}, expose=False)
    seen.append(jnp.stack([y.min(), y.max()]))
  return jnp.stack(seen), win
def show(win, k):
  return jfog.win_update(win, jnp.full(n, k), self_weight=1, src_weights={})[1]
get, look, show = jax.jit(jfog.win_get), jax.jit(look), jax.jit(show)
looks, values, k, end = 0, set(), 0, None
while end is None or time.time() < end:
  k += 1
  win = put(win, float(k))
  if k % 2:
    win = get(win)
  seen, win = look(win)
  win = show(win, float(k))
  seen = np.asarray(seen)
  assert (seen[:, 0] == seen[:, 1]).all(), seen
  looks += len(seen)
  values.update(seen[:, 0])
  if end is None:  # all is compiled
    jfog.barrier()
    end = time.time() + float(os.environ["SECONDS"])
assert len(values) > 1
print("LOOKS", looks, flush=True)
jfog.barrier()
jfog.win_free(win)
"""

BUSY = """
x = jnp.arange(1_000_000.0)
win = jfog.win_create(x, jfog.topology.ring(size), zero_init=True)
@jax.jit
def write(win, x):
  win = jfog.win_put(win, x)
  win = jfog.win_accumulate(win, x)
  return jfog.win_get(win)
write(win, x)
jfog.barrier()
_, win = jfog.win_update(win, x, self_weight=1, src_weights=0, reset=True)
a = jnp.eye(500)
@jax.jit
def work(a, rounds):
  return jax.lax.fori_loop(0, rounds, lambda i, a: a @ a, a)
work(a, 1).block_until_ready()
jfog.barrier()
rounds, took = 10, 0.0
while rank == 1 and took < 1.5:  # alone, for the others wait
  rounds *= 2
  begun = time.time()
  work(a, rounds).block_until_ready()
  took = time.time() - begun
for kind in ("computing", "sleeping"):
  jfog.barrier()
  if rank == 1:
    print(kind, "BEGINS", time.time(), flush=True)
    if kind == "computing":
      work(a, rounds).block_until_ready()
    else:
      time.sleep(2)
    print(kind, "ENDS", time.time(), flush=True)
  elif rank == 0:
    time.sleep(0.3)
    jax.block_until_ready(write(win, x)._state)
    print(kind, "WRITTEN", time.time(), flush=True)
  jfog.barrier()
  y, win = jfog.win_update(win, x, self_weight=0, src_weights=1, reset=True)
  if rank == 1:
    np.testing.assert_array_equal(y, 2 * x)
jfog.barrier()
jfog.win_free(win)
"""

PUSH_SUM = """
import networkx as nx
edges = [(r, (r + 1) % size) for r in range(size)] + [(0, 2), (2, 0)]
graph = jfog.topology.Topology.from_networkx(nx.DiGraph(edges), "uniform_out")
weight = 1 / (len(graph.out_neighbors(rank)) + 1)
values = np.random.RandomState(0).randn(size, 1000) * 10
with jax.enable_x64(True):
  x = jnp.asarray(values[rank])
  win = jfog.win_create(x, graph, zero_init=True, associated_p=True)
  @jax.jit
  def step(win, x):
    win = jfog.win_accumulate(win, x, dst_weights=weight)
    return jfog.win_update(win, x, self_weight=weight, src_weights=1, reset=True)
  random = np.random.RandomState(rank)
  x, win = step(win, x)
  jfog.barrier()  # all is compiled
  end = time.time() + 2.5
  while time.time() < end:
    x, win = step(win, x)
    if random.rand() < 0.2:
      time.sleep(random.rand() * 0.01 * (1 + rank))
  jfog.barrier()  # what is in the slots is mass, too
  x, win = jfog.win_update_then_collect(win, x)
  p = jfog.win_associated_p(win)
  total = jfog.allreduce({"x": x, "p": p}, "sum")
  np.testing.assert_allclose(total["p"], size, rtol=0, atol=1e-12)
  np.testing.assert_allclose(total["x"], values.sum(0), atol=1e-9)
  np.testing.assert_allclose(x / p, values.mean(0), rtol=0, atol=1e-6)
  jfog.barrier()
  jfog.win_free(win)
"""

MUTEX = """
win = jfog.win_create(jnp.ones(3), jfog.topology.ring(size))
path = os.environ["COUNTER"]
if rank == 0:
  open(path, "w").write("0")
jfog.barrier()
for k in range(20):
  with jfog.win_mutex(win, None if k % 2 else [1, size - 1]):
    count = int(open(path).read())
    time.sleep(0.0005)
    open(path, "w").write(str(count + 1))
  try:
    with jfog.win_mutex(win, [1]):
      raise KeyError
  except KeyError:
    pass
jfog.barrier()
assert int(open(path).read()) == 20 * size
jfog.win_free(win)
"""

LEAKS = """
graph = jfog.topology.ring(size)
x = {"w": jnp.ones(5000), "b": jnp.ones(3)}
def cycle():
  win = jfog.win_create(x, graph, associated_p=True)
  win = jfog.win_put(win, x)
  y, win = jfog.win_update(win, x)
  jfog.barrier()
  jfog.win_free(win)
def used():
  with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
cycles = int(os.environ["CYCLES"])
for _ in range(cycles // 4):
  cycle()
before = used()
for _ in range(cycles):
  cycle()
after = used()
print("GREW", after[0] - before[0], after[1] - before[1], flush=True)
"""


@pytest.mark.parametrize(
  "transport",
  [
    "shared memory",
    "messages over TCP",
    pytest.param("shared memory beside TCP", marks=pytest.mark.soak),
    pytest.param("messages", marks=pytest.mark.soak),
  ],
)
def test_windows_at_work(transport, soak, tmp_path):
  """No reader sees half a write; no rank waits for one that computes.

  Writers put and expose constant vectors of 4 MB without a pause, readers get
  and look at them. Push-sum on a directed graph, with ranks at different paces,
  keeps its mass and reaches the average. The mutex excludes.
  """
  ranks = 4 if soak else {"shared memory": 5}.get(transport, 3)
  out = succeeds(
    RACES + BUSY + PUSH_SUM + MUTEX,
    ranks,
    transport,
    SECONDS="60" if soak else "1",
    COUNTER=str(tmp_path / "counter"),
  )
  assert len(re.findall(r"LOOKS \d+", out)) == ranks
  for kind in ("computing", "sleeping"):
    found = re.findall(kind + r" ([A-Z]+) (\d+\.\d+)", out)
    at = {event: float(seconds) for event, seconds in found}
    assert at["BEGINS"] < at["WRITTEN"] < at["ENDS"], (kind, at)


@pytest.mark.parametrize("transport", ["shared memory", "messages"])
def test_operations_after_the_end_of_a_window(transport, soak):
  """Freed here, freed by another, and with a peer that has ended; no leaks."""
  out = succeeds(
    LEAKS
    + """
x = jnp.ones(1000)
win = jfog.win_create(x, graph, associated_p=True)
copy = lambda win: jax.tree.map(lambda number: number, win)
another = copy(win)
# Of the others, one may free its window before another does.
to_rank_0 = None if rank == 0 else {0: 1}
put = jax.jit(lambda win, x: jfog.win_put(win, x, dst_weights=to_rank_0))
jax.block_until_ready(put(win, x)._state)
jfog.barrier()
if rank == 0:
  time.sleep(1)
  jfog.win_free(win)
else:
  text = ""
  while not text:  # puts go well until rank 0 begins to free
    try:
      jax.block_until_ready(put(win, x)._state)
    except JaxRuntimeError as error:
      text = str(error)
  assert text.startswith("FAILED_PRECONDITION: jfog: win_put"), text
  assert "rank 0, which has freed the window" in text, text
  assert "rank 0" in fails(
    "FAILED_PRECONDITION", lambda: jfog.win_get(win, src_weights={0: 1}))
  fails("FAILED_PRECONDITION", lambda: jfog.win_accumulate(win, x))
  jfog.win_free(win)
try:
  jfog.win_put(win, x)
  raise AssertionError("no error")
except ValueError as error:
  assert "was freed" in str(error), error
for call in (
  lambda win: jfog.win_put(win, x),
  lambda win: jfog.win_accumulate(win, x),
  lambda win: jfog.win_get(win),
  lambda win: jfog.win_update(win, x),
  lambda win: jfog.win_version(win),
  lambda win: jfog.win_associated_p(win),
  lambda win: jfog.win_free(win),
  lambda win: jfog.wait(jfog.win_put_start(win, x)),
  lambda win: jfog.win_mutex(win).__enter__(),
):
  assert "is not open" in fails(
    "FAILED_PRECONDITION", lambda: call(copy(another)))
# Nothing of this has spoiled the communicator.
np.testing.assert_array_equal(jfog.allreduce(x), x)
win = jfog.win_create(x, graph)
jfog.barrier()
if rank > 0:
  # Rank 0 waits for the others to end, and takes no part any more. Of the two
  # others, either may end before the other puts.
  time.sleep(2)
  text = fails("ABORTED", lambda: jfog.win_put(win, x, dst_weights={0: 1}))
  assert "rank 0, which has already ended" in text, text
""",
    3,
    transport,
    CYCLES="10000" if soak else "100",
  )
  grew = re.findall(r"GREW (-?\d+) (-?\d+)", out)
  assert len(grew) == 3
  for size, files in grew:
    # A window is 60 kB; the rest is the business of Python and JAX.
    assert int(size) < (16e6 if soak else 3e6)
    assert int(files) <= 0


@pytest.mark.parametrize("transport", ["shared memory", "messages"])
def test_ranks_that_end_their_loops_at_different_times(transport):
  """One barrier after the loop: a rank that is done is reached, no mass is lost."""
  succeeds(
    """
graph = jfog.topology.ring(size)
x = jnp.full(1000, float(rank))
win = jfog.win_create(x, graph, associated_p=True, zero_init=True)
share = {j: 1 / 3 for j in graph.out_neighbors(rank)}
@jax.jit
def step(win, x):
  win = jfog.win_accumulate(win, x, dst_weights=share)
  return jfog.win_update(
    win, x, self_weight=1 / 3, src_weights=1.0, reset=True)
ended = jfog.win_create(jnp.zeros(()), jfog.topology.star(size))
def steps(win, x, count):
  for _ in range(count):
    x, win = step(win, x)
  return jax.block_until_ready(x), win
x, win = steps(win, x, 1)
seen = jfog.win_version(ended)[0] if rank else 0
jfog.barrier()
if rank == 0:
  x, win = steps(win, x, 5)
  ended = jfog.win_put(ended, jnp.zeros(()))
else:
  while jfog.win_version(ended)[0] == seen:
    x, win = steps(win, x, 5)
  x, win = steps(win, x, 200 if rank == 1 else 50)  # rank 0 has ended its loop
jfog.barrier()
x, win = jfog.win_update_then_collect(win, x)
p = jfog.win_associated_p(win)
np.testing.assert_allclose(jfog.allreduce(x, "sum"), 3.0, rtol=1e-4)
np.testing.assert_allclose(jfog.allreduce(p, "sum"), 3.0, rtol=1e-4)
jfog.barrier()
jfog.win_free(ended)
jfog.win_free(win)
""",
    3,
    transport,
  )


@pytest.mark.parametrize(
  "transport",
  ["messages", pytest.param("shared memory", marks=pytest.mark.soak)],
)
def test_a_stopped_rank_stops_nobody_who_does_not_need_it(transport):
  """SIGSTOP: others go on among themselves; who asks it gets an error."""
  _, out, err = run(
    """
jfog.shutdown()
world = jfog.init(timeout=3)
graph = jfog.topology.fully_connected(size)
x = jnp.ones(100_000)
win = jfog.win_create(x, graph)
pids = np.asarray(jfog.allgather(jnp.array([os.getpid()], jnp.int32)))
jfog.barrier()
if rank == 1:
  time.sleep(0.5)
  os.kill(os.getpid(), signal.SIGSTOP)
  time.sleep(100)
time.sleep(2)
other = 2 - rank
for _ in range(20):
  win = jfog.win_put(win, x, dst_weights={other: 1})
  y, win = jfog.win_update(win, x)
np.testing.assert_allclose(y, 1, rtol=1e-6)
if os.environ.get("JFOG_SHARED_MEMORY") != "0":
  jax.block_until_ready(jfog.win_put(win, x)._state)  # memory needs no help
else:
  text = fails("DEADLINE_EXCEEDED", lambda: jfog.win_put(win, x))
  assert "for rank 1" in text, text
print("WELL", flush=True)
time.sleep(2)
if rank == 0:
  os.kill(int(pids[1]), signal.SIGKILL)
time.sleep(100)
""",
    3,
    transport,
  )
  assert len(re.findall("WELL", out)) == 2, out + err


def test_a_slow_rank_slows_nobody_else():
  """While rank 0 makes 16 steps the others make many more, at a fifth of its nap."""
  out = succeeds(
    """
graph = jfog.topology.ring(size)
x = jnp.ones(1000)
win = jfog.win_create(x, graph)
ended = jfog.win_create(jnp.zeros(()), jfog.topology.star(size))
step = jax.jit(lambda win, x: jfog.win_update(jfog.win_put(win, x), x))
x, win = step(win, x)
seen = jfog.win_version(ended)[0]
jfog.barrier()
count = 0
while count < 16 if rank == 0 else seen == 0:
  time.sleep(0.1 if rank == 0 else 0.02)
  x, win = step(win, x)
  seen = jfog.win_version(ended)[0]
  count += 1
if rank == 0:
  ended = jfog.win_put(ended, jnp.zeros(()))
print("STEPS", rank, count, flush=True)
jfog.barrier()
jfog.win_free(win)
jfog.win_free(ended)
""",
    3,
  )
  counts = dict(re.findall(r"STEPS (\d) (\d+)", out))
  assert len(counts) == 3
  # The figures that count are those of the benchmark.
  assert all(int(counts[rank]) > 32 for rank in "12"), counts
