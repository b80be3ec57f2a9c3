"""Worlds one after the other: they share what MPI has few of, and no messages."""

import json
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from support import jobs

import jfog
from jfog import runtime, topology

CYCLES, CYCLES_OF_SOAK = 40, 20_000
HEAP_PER_CYCLE = 4000  # bytes; a leaked communicator takes 40 kB

on_mpi = [
  pytest.mark.places("mpi"),
  pytest.mark.mpi(2, 3),
  pytest.mark.host("communicators of MPI"),
]

CYCLE = """
import ctypes, gc, json, os, sys
import jax.numpy as jnp, numpy as np, jfog
from jfog import topology

class Heap(ctypes.Structure):
  _fields_ = [(name, ctypes.c_size_t) for name in (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
    "uordblks", "fordblks", "keepcost")]

def heap():
  gc.collect()
  read = ctypes.CDLL(None).mallinfo2
  read.restype = Heap
  return read().uordblks

def communicators():
  '''The index of a new one, the lowest that is free; 0 on another MPI.'''
  try:
    mpi = ctypes.CDLL("libmpi.so.40")
  except OSError:
    return 0
  world = ctypes.addressof(ctypes.c_char.in_dll(mpi, "ompi_mpi_comm_world"))
  made = ctypes.c_void_p()
  mpi.MPI_Comm_dup(ctypes.c_void_p(world), ctypes.byref(made))
  index = mpi.MPI_Comm_c2f(made)
  mpi.MPI_Comm_free(ctypes.byref(made))
  return index

def cycle(k, works=False):
  # Machines of one rank each, and one machine, have other parts.
  world = jfog.init(timeout=60, local_size=(None, 1)[k % 2])
  if works:
    ring = topology.ring(world.size)
    x = jnp.full(3, float(world.rank + k))
    y = jfog.neighbor_allreduce(x, ring)
    np.testing.assert_allclose(
      y, (ring.mixing_matrix @ np.arange(world.size))[world.rank] + k, rtol=1e-6)
    part = world.machines if k % 2 else world.local
    np.testing.assert_allclose(
      jfog.allreduce(x, comm=part), (world.size - 1) / 2 + k, rtol=1e-6)
    jfog.win_free(jfog.win_create(x, ring))
  rank = world.rank
  jfog.shutdown()
  return rank

cycles = int(sys.argv[-1])
for k in range(4):
  rank = cycle(k, works=True)
before = communicators(), heap()
for k in range(cycles):
  cycle(k)
after = communicators(), heap()  # without programs, of which JAX keeps some
for k in range(cycles, cycles + 2):
  cycle(k, works=True)
if rank == 0:
  print("GREW", json.dumps([after[0] - before[0], after[1] - before[1]]))
"""


@pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
@pytest.mark.full
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_cycles_of_init_and_shutdown_leave_nothing(ranks, soak):
  cycles = CYCLES_OF_SOAK if soak else CYCLES
  program = textwrap.dedent(CYCLE).replace("sys.argv[-1]", str(cycles))
  code, out, err = jobs.run_program(program, ranks, deadline=200 + 2.0 * cycles)
  assert code == 0, out + err
  communicators, heap = json.loads(out.split("GREW")[1].splitlines()[0])
  assert communicators == 0
  assert heap < HEAP_PER_CYCLE * cycles


class TestNextWorld:
  """Messages, operations and failures of a world do not reach the next one."""

  pytestmark = on_mpi

  @pytest.fixture(autouse=True)
  def machines_of_one(self, place, in_job):
    """Messages of MPI and no mailboxes, which each world makes anew."""
    if not in_job:
      yield
      return
    jfog.shutdown()
    jfog.init(timeout=30, local_size=1)
    yield
    jfog.shutdown()
    jfog.init(timeout=60)

  def next_world(self):
    jfog.shutdown()
    return jfog.init(timeout=30, local_size=1)

  def pair(self, value):
    """Rank 0 sends to rank 1; the others do nothing."""
    rank = jfog.rank()
    sources, destinations = {0: 1.0} if rank == 1 else {}, [1][: rank == 0]
    peers = jfog.Peers(0.0, sources, destinations, check=False)
    return jfog.neighbor_allreduce(jnp.full(3, value), peers)

  def test_a_message_that_no_rank_received(self, place):
    if jfog.rank() == 0:
      self.pair(np.nan).block_until_ready()
    self.next_world()
    for k in range(3):
      y = self.pair(float(k))
      np.testing.assert_array_equal(y, float(k) if jfog.rank() == 1 else 0)

  def test_an_operation_that_was_not_waited_for(self, place):
    n = place.size
    full = topology.fully_connected(n)
    with pytest.warns(ResourceWarning, match="never waited on"):
      for k in range(3):
        jfog.neighbor_allreduce_start(jnp.full(20_000, -1.0 - k), full)
      world = self.next_world()
    for k in range(3):
      y = jfog.neighbor_allreduce(jnp.full(20_000, float(world.rank + k)), full)
      np.testing.assert_allclose(y, (n - 1) / 2 + k, rtol=1e-6)

  def test_a_failed_world(self, place):
    shape = 3 if jfog.rank() == 0 else 4
    full = topology.fully_connected(place.size)
    with pytest.raises(Exception, match="does not match rank"):
      jfog.neighbor_allreduce(jnp.ones(shape), full).block_until_ready()
    world = self.next_world()
    y = jfog.neighbor_allreduce(jnp.full(4, float(world.rank)), full)
    np.testing.assert_allclose(y, (place.size - 1) / 2, rtol=1e-6)

  def test_parts_in_turn(self, place):
    """The parts of machines of one rank and of one machine have other ranks."""
    n = place.size
    for k in range(6):
      jfog.shutdown()
      world = jfog.init(timeout=30, local_size=(1, None)[k % 2])
      part = world.local if k % 2 else world.machines
      x = jnp.full(3, float(world.rank + k))
      for comm in (part, world):
        np.testing.assert_allclose(
          jfog.allreduce(x, comm=comm), (n - 1) / 2 + k, rtol=1e-6
        )
      y = jfog.neighbor_allreduce(x, topology.ring(n), comm=part)
      truth = topology.ring(n).mixing_matrix @ np.arange(n) + k
      np.testing.assert_allclose(y, truth[world.rank], rtol=1e-6)
