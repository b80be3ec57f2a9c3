"""Windows of which a rank has failed: its slot is dropped, what it held is freed."""

import json
import re

import numpy as np
import pytest
from faults import check
from support import jobs

from jfog import launch, runtime

needs_mpi = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
LENGTHS = (3, 40_000)  # floats: a short request, and one in pieces

BEGIN = """
import json, os, pathlib, signal, time
import jax, jax.numpy as jnp, numpy as np, optax, jfog
LOST = 1
world = jfog.init(on_missing={on_missing!r}, timeout=100)
me, n = world.rank, world.size
graph = jfog.topology.ring(n)
start = jnp.linspace(0.0, 1.0, {length})
folder = pathlib.Path({folder!r})
left = [r for r in range(n) if r != LOST]

def wait_for_the_end():
  while jfog.missing_ranks() != (LOST,):
    time.sleep(0.005)

def meet(name):
  # All that are left have come here. No operation of jfog may wait for all.
  (folder / (name + str(me))).touch()
  while not all((folder / (name + str(r))).exists() for r in left):
    time.sleep(0.005)

def end():
  os.kill(os.getpid(), signal.SIGKILL)
"""

# Rank 1 ends with the mutex of rank 0; then each operation goes on without it.
REWEIGHT = (
  BEGIN
  + """
x = start + me
win = jfog.win_create(x, graph)
mass = jfog.win_create(x, graph, zero_init=True)
push = jfog.optimizers.window_push_sum(optax.sgd(1.0), graph)
state = push.init(x)
step = jax.jit(push.update)
_, state = step(0 * x, state, x)
win = jfog.win_put(win, x)
jfog.barrier()
if me == LOST:
  with jfog.win_mutex(win, [0]):
    end()
wait_for_the_end()
jfog.diagnostics.reset_counters()
begin = time.monotonic()
with jfog.win_mutex(win):
  pass
matrix = jfog.topology.without(graph, [LOST]).mixing_matrix
truth = start + np.sum(matrix[me] * np.arange(n))
win = jfog.win_put(win, x)
meet("put")
y, win = jfog.win_update(win, x)
np.testing.assert_allclose(y, truth, rtol=1e-6)
# The exposed value is got: the result above, of those that are left.
meet("update")
y, win = jfog.win_update(jfog.win_get(win), x, expose=False)
others = {r: matrix[me, r] for r in graph.in_neighbors(me) if r != LOST}
truth = start * matrix[me].sum() + matrix[me, me] * me + sum(
  w * (matrix[r] @ np.arange(n)) for r, w in others.items())
np.testing.assert_allclose(y, truth, rtol=1e-6)
np.testing.assert_array_equal(
  jfog.win_missing(win), [r == LOST for r in range(n)])
# A collect adds nothing for it.
mass = jfog.win_accumulate(mass, x)
meet("accumulate")
present = [r for r in graph.in_neighbors(me) if r != LOST]
y, mass = jfog.win_update_then_collect(mass, x)
truth = (1 + len(present)) * start + me + sum(present)
np.testing.assert_allclose(y, truth, rtol=1e-6)
counted = jfog.diagnostics.counters()["missing"]
# Push-sum goes on, and its weights do not sink.
params = x
for _ in range(300):
  updates, state = step(0 * x, state, params)
  params = optax.apply_updates(params, updates)
  time.sleep(0.002)
weight = float(jfog.win_associated_p(state.window))
spread = float(np.ptp(np.asarray(params - start)))
print("DONE", json.dumps([me, counted, float(params[0]), weight, spread,
                          time.monotonic() - begin]), flush=True)
"""
)

# Operations on windows alone: each rank that is left gets an error, and recovers.
ERROR = (
  BEGIN
  + """
def program(win, x):
  win = jfog.win_put(win, x)
  return jfog.win_update(jfog.win_get(win), x)

win = jfog.win_create(start, graph)
run = jax.jit(program)
run(win, start)
jfog.barrier()
begin = None
try:
  for k in range(100_000):
    if (me, k) == (LOST, 20):
      end()
    jax.block_until_ready(run(win, start))
    if begin is None and jfog.missing_ranks():
      begin = time.monotonic()
  print("NO ERROR", flush=True)
except jax.errors.JaxRuntimeError as error:
  took = time.monotonic() - (begin or time.monotonic())
  assert jfog.is_rank_failure(error), error
  assert took < 60, took
world = jfog.recover()
win = jfog.win_create(start + world.rank, jfog.topology.ring(world.size))
y, win = jfog.win_update(jfog.win_get(win), start + world.rank)
jfog.barrier()
jfog.win_free(win)
print("DONE", json.dumps([me, world.size, float(y[0])]), flush=True)
"""
)

# A rank fails while all make windows, at any point of that.
CREATE = (
  BEGIN
  + """
import threading
jfog.win_free(jfog.win_create(start, graph))
jfog.barrier()
if me == LOST:
  threading.Timer(0.2 + 0.01 * len(start) / 40_000, end).start()
try:
  for _ in range(100_000):
    jfog.win_free(jfog.win_create(start, graph))
  print("NO ERROR", flush=True)
except jax.errors.JaxRuntimeError as error:
  assert jfog.is_rank_failure(error), error
world = jfog.recover()
win = jfog.win_create(start + world.rank, jfog.topology.ring(world.size))
win = jfog.win_get(win)
jfog.barrier()  # the update exposes another value
y, win = jfog.win_update(win, start + world.rank)
jfog.barrier()
jfog.win_free(win)
print("DONE", json.dumps([me, world.size, float(y[0])]), flush=True)
"""
)


def launched(program, ranks, local_size, folder, **values):
  """Runs a program on ranks of a fault-tolerant job; returns what they say."""
  program = program.replace(BEGIN, BEGIN.format(folder=str(folder), **values))
  command = launch.command_line(
    ["--no-tag-output", "--fault-tolerant", "-np", str(ranks)]
  )
  code, out, err = jobs.run_program(
    program,
    ranks,
    deadline=check.DEADLINE,
    command=command,
    environment={"JFOG_LOCAL_SIZE": local_size},
  )
  assert code == 0, err
  assert "NO ERROR" not in out, out
  return [json.loads(text) for text in re.findall("DONE (.*)", out)]


@needs_mpi
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("local_size", ["", "1"], ids=["shared", "messages"])
def test_windows_go_on_without_a_rank(local_size, length, tmp_path):
  ended = launched(
    REWEIGHT, 4, local_size, tmp_path, length=length, on_missing="reweight"
  )
  assert sorted(each[0] for each in ended) == [0, 2, 3], ended
  for me, counted, *_, took in ended:
    # The mutexes of all; a put, two updates, a get, an accumulate and a collect.
    times = 1 if me == 3 else 7
    assert counted == {"1": times}, ended
    assert took < 60, ended
  weights = [each[3] for each in ended]
  # All but the part that was lost with rank 1.
  assert min(weights) > 0.05, ended
  assert sum(weights) < 4, ended
  assert max(each[4] for each in ended) < 1e-3, ended
  values = [each[2] for each in ended]
  assert max(values) - min(values) < 0.05, ended


@needs_mpi
@pytest.mark.parametrize("local_size", ["", "1"], ids=["shared", "messages"])
def test_each_rank_learns_by_windows_alone(local_size, tmp_path):
  ended = launched(ERROR, 5, local_size, tmp_path, length=3, on_missing="error")
  assert sorted(each[0] for each in ended) == [0, 2, 3, 4], ended
  assert all(each[1] == 4 for each in ended), ended


@needs_mpi
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("local_size", ["", "1"], ids=["shared", "messages"])
def test_a_rank_that_fails_in_win_create_is_an_error(
  local_size, length, tmp_path
):
  """Its making takes no communicator, which Open MPI would leave half made."""
  rows = launched(
    CREATE, 4, local_size, tmp_path, length=length, on_missing="error"
  )
  assert sorted(row[0] for row in rows) == [0, 2, 3]
  assert {row[1] for row in rows} == {3}
  np.testing.assert_allclose(
    sorted(row[2] for row in rows), [1, 1, 1], rtol=1e-6
  )
