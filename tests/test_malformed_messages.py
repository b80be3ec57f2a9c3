"""Messages that arrive damaged end in an error, never in a wrong number or a hang.

A library that takes the place of MPI_Isend damages one message for each trial:
a bit of a header, a control message, a request or a reply, or the length of any
message. Payloads have no checksum, so their bytes stay as they are.
"""

import collections
import json
import pathlib
import textwrap

import pytest
from support import emulated, jobs, mpi_headers

from jfog import runtime

pytestmark = pytest.mark.skipif(
  not runtime.build().MPI_FAMILY, reason="jfog was installed without MPI"
)
SOURCE = pathlib.Path(__file__).parent / "damage" / "damage.cc"
TRIALS, TRIALS_OF_SOAK = 26, 780
SECONDS_PER_TRIAL = 20.0  # at most: its timeout of 2 s, on a busy machine

PROGRAM = """
import ctypes, json, os, pathlib, random, sys, time
shim = ctypes.CDLL(os.environ["DAMAGE"], ctypes.RTLD_GLOBAL)
import jax, jax.numpy as jnp, numpy as np, jfog
from jfog import topology

folder = pathlib.Path(os.environ["FOLDER"])
trials, seed = int(os.environ["TRIALS"]), int(os.environ["SEED"])
world = jfog.init()
rank, size = world.rank, world.size
jfog.shutdown()
ring, full = topology.ring(size, "right"), topology.fully_connected(size)
left = (rank - 1) % size
short, long = 100, 100_000
all_of = lambda n: np.arange(size)[:, None] + np.arange(n) % 7.0
own = lambda n: jnp.asarray(all_of(n)[rank], jnp.float32)

def averages(n):
  y = jfog.neighbor_allreduce(jfog.neighbor_allreduce(own(n), ring), full)
  return y, np.broadcast_to(all_of(n).mean(0), (size, n))[rank]

def gathers(n):
  return jfog.neighbor_allgather(own(n), ring), all_of(n)[left]

def machines(n):
  return (
    jfog.hierarchical_neighbor_allreduce(
      own(n), topology.fully_connected(jfog.machine_size())
    ),
    all_of(n).mean(0),
  )

def rounds(n):
  return jfog.finite_time_average(own(n), topology.ceca(size)), all_of(n).mean(0)

def peers(n):
  there = jfog.Peers(1.0, {left: 1.0}, [(rank + 1) % size])
  return jfog.neighbor_allreduce(own(n), there), all_of(n)[[rank, left]].sum(0)

def late(n):
  jfog.neighbor_allreduce(own(n), full).block_until_ready()
  if rank == 0:
    time.sleep(0.5)  # the others announce what they wait in
  return averages(n)

def windows(n):
  win = jfog.win_create(own(n), ring)
  win = jfog.win_put(win, 2 * own(n))
  win = jfog.win_accumulate(win, own(n))
  jfog.barrier()
  y, win = jfog.win_update(win, own(n), self_weight=1.0, src_weights=1.0)
  jfog.barrier()
  win = jfog.win_get(win)
  jfog.barrier()  # the next update exposes another value
  z, win = jfog.win_update(win, own(n), self_weight=0.0, src_weights=1.0)
  jfog.barrier()
  with jfog.win_mutex(win):
    pass
  jfog.win_free(win)
  exposed = lambda r: all_of(n)[r] + 3 * all_of(n)[(r - 1) % size]
  return (y, z), (exposed(rank), exposed(left))

KINDS = [(f, n) for f in (averages, gathers, machines, rounds, peers, windows)
         for n in (short, long)] + [(late, short)]
outcomes = []
for trial in range(trials):
  choice = random.Random(1000 * seed + trial)
  run, n = KINDS[trial % len(KINDS)]
  victim, what = choice.randrange(size), choice.randrange(2)
  after = choice.randrange(choice.choice([2, 8, 40]))
  local_size = choice.choice([1, None])
  jfog.init(timeout=2.0, local_size=local_size)
  jfog.barrier()
  if rank == victim:
    shim.damage_arm(what, after, ctypes.c_uint64(choice.getrandbits(63)))
  text = ""
  try:
    got, wanted = jax.block_until_ready(run(n))
    jax.effects_barrier()
    for y, truth in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
      np.testing.assert_allclose(np.asarray(y), truth, rtol=1e-5, atol=1e-5)
  except AssertionError as error:
    text = f"WRONG {error}"
  except Exception as error:
    text = f"{type(error).__name__} {error}"
  count = shim.damage_done()
  shim.damage_arm(0, -1, ctypes.c_uint64(0))
  outcomes.append([trial, run.__name__, n, local_size, what, count, text])
  # The others may still wait for a message: meet before the next world is made.
  (folder / f"{trial}-{rank}").touch()
  while not all((folder / f"{trial}-{r}").exists() for r in range(size)):
    time.sleep(0.01)
  jfog.shutdown()
(folder / f"outcomes-{rank}").write_text(json.dumps(outcomes))
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)  # worlds have failed: MPI_Finalize could wait
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """The library that damages messages."""
  if not emulated.compiler():
    pytest.skip("there is no C++ compiler")
  if not (includes := mpi_headers.folders()):
    pytest.skip("there is no mpi.h")
  made = tmp_path_factory.mktemp("damage") / "libdamage.so"
  emulated.compile_shared(made, [SOURCE], includes)
  return made


@pytest.mark.parametrize(
  ("ranks", "memory"),
  [
    (2, "messages"),
    (3, "shared memory"),
    pytest.param(2, "shared memory", marks=pytest.mark.soak),
    pytest.param(3, "messages", marks=pytest.mark.soak),
  ],
)
def test_damaged_messages_are_errors(library, tmp_path, soak, ranks, memory):
  trials = TRIALS_OF_SOAK if soak else TRIALS
  _, out, err = jobs.run_program(
    textwrap.dedent(PROGRAM),
    ranks,
    deadline=60 + SECONDS_PER_TRIAL * trials,
    environment={
      "DAMAGE": str(library),
      "FOLDER": str(tmp_path),
      "TRIALS": str(trials),
      "SEED": str(ranks),
      "JFOG_SHARED_MEMORY": str(int(memory == "shared memory")),
    },
  )
  reports = sorted(tmp_path.glob("outcomes-*"))
  assert len(reports) == ranks, out + err
  texts = collections.Counter()
  for rank, report in enumerate(reports):
    for *trial, count, text in json.loads(report.read_text()):
      assert not text.startswith("WRONG"), (rank, trial, count, text)
      assert not text or "jfog:" in text, (rank, trial, count, text)
      texts["errors"] += bool(text)
      texts["damaged"] += count
      texts["malformed"] += "got a malformed message from rank" in text
  assert texts["damaged"] > trials / 8, texts
  assert texts["errors"] >= texts["malformed"] > 0, texts
