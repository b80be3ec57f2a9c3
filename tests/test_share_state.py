"""Ranks that join a job that runs: spares in the place of lost ranks, and their state."""

import json
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import check
from support import jobs

import jfog
from jfog import launch, runtime, topology
from jfog.primitives import _share_state
from jfog.runtime._role import Role, next_roles

needs_mpi = pytest.mark.skipif(
  "Open MPI v5" not in runtime.build().MPI_LIBRARY,
  reason="a job outlives its ranks with Open MPI 5",
)


def test_spares_take_the_lowest_free_places():
  left = [Role(k, k, k // 2, True, 4) for k in (1, 3)]
  spares = [Role(k, -1, 7, False) for k in (4, 5, 6)]
  made = next_roles([*left, *spares], 0)
  assert [role.place for role in made] == [1, 3, 0, 2, -1]
  assert [role.has_state for role in made] == [True] * 2 + [False] * 3
  assert [role.machine for role in made] == [0, 1, 7, 7, 7]
  # Pretended machines are those of the places.
  assert [role.machine for role in next_roles([*left, *spares], 2)][2:4] == [
    0,
    1,
  ]
  # The largest size counts, and no rank loses its place.
  grown = [left[0], Role(3, 3, 1, True, 1), *spares]
  assert [role.place for role in next_roles(grown, 0)] == [1, 3, 0, 2, -1]
  small = [Role(k, k, 0, True, 1) for k in range(3)]
  assert next_roles([*small, spares[0]], 0) == [*small, spares[0]]
  # Spares alone have no state to go on from.
  assert next_roles(spares, 0) == spares


def test_the_source_is_a_neighbor_that_has_the_state():
  ring = topology.ring(5)
  assert _share_state._sources(5, (2,), ring) == {2: 1}
  assert _share_state._sources(5, (1, 2), ring) == {1: 0, 2: 3}
  assert _share_state._sources(5, (0,), None) == {0: 4}
  assert _share_state._sources(5, (1, 2, 3), ring) == {1: 0, 2: 0, 3: 4}
  one_peer = topology.one_peer_exponential(4)
  assert _share_state._sources(4, (0, 3), one_peer)[0] in (1, 2)
  with pytest.raises(RuntimeError, match="no rank is left that has the state"):
    _share_state._sources(2, (0, 1), None)


def leaves(seed):
  """Leaves of each kind, with bits that a conversion would change."""
  random = np.random.RandomState(seed)
  bits = random.randint(0, 2**31, 6).astype(np.uint32)
  bits[0] = 0x7FC12345  # a NaN with a payload
  return [
    jnp.asarray(bits.view(np.float32)),
    jnp.asarray(random.randn(3), jnp.bfloat16),
    jnp.asarray(seed, jnp.int8),
    jnp.zeros((0, 2)),
    jnp.asarray([True, seed > 1]),
    jnp.asarray(-0.0 if seed else 0.0, jnp.complex64),
    jax.random.key(seed),
    random.randn(2, 2),  # float64, which JAX would narrow
    np.float64(seed),
    seed,
    f"epoch {seed}",
    ("a", seed),
  ]


def test_leaves_travel_bit_for_bit():
  theirs, own = leaves(1), leaves(2)
  names = [str(k) for k in range(len(own))]
  taken = _share_state._from_bytes(_share_state._to_bytes(names, theirs), own)
  for got, expected in zip(taken, theirs, strict=True):
    assert type(got) is type(expected)
    if isinstance(got, jax.Array) and jnp.issubdtype(
      got.dtype, jax.dtypes.prng_key
    ):
      assert got.dtype == expected.dtype
      got, expected = map(jax.random.key_data, (got, expected))
    if hasattr(got, "dtype"):
      assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
      got, expected = np.asarray(got).tobytes(), np.asarray(expected).tobytes()
    assert got == expected


def test_bad_leaves_and_sizes_name_the_values():
  with pytest.raises(
    TypeError, match=r"tree\['f'\] of type .* cannot be pickled"
  ):
    _share_state._to_bytes(["tree['f']"], [lambda x: x])
  with pytest.raises(ValueError, match="size=0 must be at least 1"):
    jfog.recover(size=0)


# A job in which ranks die as planned and others take their places. `kills` has for
# each death a place, and the step before which it dies, or "recovery" or "joining" and
# seconds after the begin of that.
PROGRAM = """
import hashlib, json, os, pickle, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, jfog

PLAN = json.loads(PLAN_TEXT)
STEPS = PLAN["steps"]

def die(delay=0.0):
  def later():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
  if delay: threading.Thread(target=later, daemon=True).start()
  else: later()

def kills(when):
  return [k for k in PLAN["kills"] if k["place"] == place and k["when"] == when]

def say(kind, **what):
  os.write(1, (kind + " " + json.dumps(what) + "\\n").encode())

def digest(tree):
  named = [[jax.tree_util.keystr(path), str(np.asarray(leaf).dtype),
            np.asarray(leaf).tobytes().hex()]
           for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  return hashlib.sha256(json.dumps(named).encode()).hexdigest()

seed = int(os.environ["OMPI_COMM_WORLD_RANK"])
state = {
  "step": 0,
  "x": jnp.asarray(np.random.RandomState(seed).randn(4), jnp.float32),
  "momentum": jnp.full((2, 3), float("nan"), jnp.bfloat16),
  "random": np.random.RandomState(seed).randn(5),
  "name": f"rank {seed}",
}
say("STARTED", pid=os.getpid())
world = jfog.init(timeout=100, on_missing=PLAN.get("on_missing"))
changed, recovering, asked = True, [], seed >= PLAN.get("ranks")
while True:
  ranks = list(world.launched_ranks or range(world.size))
  place = ranks[world.rank]
  try:
    if changed:
      for kill in kills("joining"):
        if world.joined_ranks and seed < PLAN["ranks"] + PLAN["spares"]:
          die(kill["delay"])
      graph = jfog.topology.ring(world.size)
      average = jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))
      passed = digest(state)
      state = jfog.share_state(state, graph)
      say("STATE", rank=world.rank, ranks=ranks, joined=list(world.joined_ranks),
          passed=passed, got=digest(state))
      step = int(jfog.allreduce(jnp.int32(state["step"]), "max"))
      state, changed = {**state, "step": step}, False
    if state["step"] == STEPS:
      break
    for kill in kills(state["step"]):
      if seed == kill.get("seed", seed):
        die()
    if PLAN.get("grow") == state["step"] and not asked:
      asked = True
      world, changed = jfog.recover(size=world.size + 1), True
      continue
    before = state["x"]
    after = average(before).block_until_ready()
    say("STEP", rank=world.rank, ranks=ranks, step=state["step"],
        before=np.asarray(before).tolist(), after=np.asarray(after).tolist())
    state = {**state, "x": after, "step": state["step"] + 1}
  except jax.errors.JaxRuntimeError as error:
    if not jfog.is_rank_failure(error):
      raise
    say("LOST", place=place, error=str(error)[:60])
    for kill in kills("recovery"):
      if not recovering and seed < PLAN["ranks"]:
        die(kill["delay"])
    recovering.append(1)
    world, changed = jfog.recover(), True
say("DONE", place=place, size=world.size, x=np.asarray(state["x"]).tolist(),
    joined=seed >= PLAN["ranks"])
"""


def run(plan, program=PROGRAM, options=()):
  """Runs a plan; returns its exit code, what ranks have said by kind, and stderr."""
  command = launch.command_line(
    [
      *options,
      *("--no-tag-output", "--fault-tolerant", "-np", str(plan["ranks"])),
      *("--spares", str(plan["spares"])),
    ]
  )
  text = f"PLAN_TEXT = {json.dumps(plan)!r}\n{textwrap.dedent(program)}"
  code, out, err = jobs.run_program(
    text, plan["ranks"], deadline=check.DEADLINE, command=command
  )
  said = {}
  for kind, line in re.findall(r"^([A-Z]+) (\{.*\})$", out, re.M):
    said.setdefault(kind, []).append(json.loads(line))
  pids = "\n".join(f"STARTED {each['pid']}" for each in said.get("STARTED", []))
  check.nothing_is_left(pids)
  return code, said, err


def check_steps(said):
  """Compares each average with the dense product over the ranks of its world."""
  worlds = {}
  for each in said["STEP"]:
    worlds.setdefault((tuple(each["ranks"]), each["step"]), []).append(each)
  whole = 0
  for (ranks, _), steps in worlds.items():
    if len(steps) < len(ranks):
      continue  # a rank died before its record
    whole += 1
    matrix = topology.ring(len(ranks)).mixing_matrix
    steps.sort(key=lambda each: each["rank"])
    before = np.array([each["before"] for each in steps])
    after = np.array([each["after"] for each in steps])
    np.testing.assert_allclose(after, matrix @ before, rtol=1e-5, atol=1e-6)
  return whole


def check_states(said):
  """Requires the state of a source, bit for bit, on each rank that has joined."""
  worlds = {}
  for each in said["STATE"]:
    worlds.setdefault((*each["ranks"], -1, *each["joined"]), []).append(each)
  joined = 0
  for states in worlds.values():
    # Where a rank dies in it, a join may be repeated in a world of the same ranks.
    passed = {}
    for each in states:
      passed.setdefault(each["rank"], []).append(each["passed"])
    size, newcomers = len(states[0]["ranks"]), states[0]["joined"]
    if not newcomers:
      sources = {}
    else:
      sources = _share_state._sources(
        size, tuple(newcomers), topology.ring(size)
      )
    for each in states:
      if each["rank"] not in newcomers:
        assert each["got"] == each["passed"]
      elif sources[each["rank"]] in passed:
        joined += 1
        assert each["got"] in passed[sources[each["rank"]]]
        assert each["got"] != each["passed"]
  return joined


@needs_mpi
def test_each_world_has_its_timeline(tmp_path):
  kills = [{"place": 1, "when": 3, "seed": 1}]
  plan = {"ranks": 3, "spares": 1, "steps": 6, "kills": kills}
  code, said, err = run(plan, options=("--timeline", str(tmp_path)))
  assert code == 0 and len(said["DONE"]) == 3, err
  first, second = (
    json.loads((tmp_path / name).read_text())
    for name in ("timeline.json", "timeline-2.json")
  )
  assert first["jfog"]["incomplete_ranks"] == [1]
  whole = second["jfog"]
  assert (whole["ranks"], whole["missing_ranks"]) == (3, [])
  assert not whole["incomplete_ranks"] and not whole["lost_events"]
  # The ring's three edges in both directions, in each step.
  averages = [
    (event["pid"], event["args"]["sequence"])
    for event in second["traceEvents"]
    if event["ph"] == "X" and event["name"].startswith("neighbor_allreduce #")
  ]
  steps = len({sequence for _, sequence in averages})
  assert steps >= 3 and len(averages) == 3 * steps
  assert {rank for rank, _ in averages} == {1, 2, 3}
  flows = [event for event in second["traceEvents"] if event["ph"] == "f"]
  assert len(flows) == whole["messages"] >= 6 * steps
  assert whole["messages_with_one_end"] == 0


@needs_mpi
def test_a_killed_rank_is_replaced_and_then_rank_0():
  kills = [{"place": 1, "when": 3}, {"place": 0, "when": 6}]
  plan = {"ranks": 3, "spares": 2, "steps": 9, "kills": kills}
  for kill in kills:
    kill["seed"] = kill["place"]  # not the rank that takes the place
  code, said, err = run(plan)
  assert code == 0, err
  assert check_steps(said) == 9
  assert check_states(said) == 2
  done = sorted(said["DONE"], key=lambda each: each["place"])
  assert [each["place"] for each in done] == [0, 1, 2]
  assert [each["joined"] for each in done] == [True, True, False]
  assert "rank 0 was killed by SIGKILL; the others go on" in err


# Rank 2 dies while the others take in a replacement of rank 1, or the replacement does.
LATER = [
  {"place": 2, "when": "recovery", "delay": 0.01},
  {"place": 2, "when": "recovery", "delay": 0.4},
  {"place": 1, "when": "joining", "delay": 0.02},
]


@needs_mpi
@pytest.mark.parametrize("later", LATER)
def test_a_join_while_another_rank_dies(later):
  first = {"place": 1, "when": 3, "seed": 1}
  plan = {"ranks": 4, "spares": 2, "steps": 8, "kills": [first, later]}
  code, said, err = run(plan)
  assert code == 0, (said, err)
  check_steps(said)
  check_states(said)
  # A kill may come after the end of the job.
  places = [each["place"] for each in said["DONE"]]
  assert {0, 3} <= set(places) <= set(range(4)), (said, err)
  values = np.array([each["x"] for each in said["DONE"]])
  assert np.isfinite(values).all()


@needs_mpi
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_many_random_joins(seed):
  random = np.random.RandomState(seed)
  ranks, spares = random.randint(2, 5), random.randint(1, 4)
  kills = []
  for place in random.choice(ranks, random.randint(1, ranks), replace=False):
    when = ["recovery", "joining", int(random.randint(1, 8))]
    when = when[random.randint(3)] if kills else int(random.randint(1, 8))
    kills.append(
      {"place": int(place), "when": when, "delay": float(random.rand())}
    )
    if isinstance(when, int):
      kills[-1]["seed"] = int(place)
  plan = {"ranks": int(ranks), "spares": int(spares), "steps": 8}
  code, said, err = run({**plan, "kills": kills})
  check_states(said)
  check_steps(said)
  # The job cannot go on without a rank that has the state.
  if code:
    assert "no rank is left that has the state" in err, (kills, said, err)
  else:
    assert said["DONE"], (kills, said, err)


@needs_mpi
def test_a_world_grows_and_needs_no_spare_any_more():
  plan = {"ranks": 2, "spares": 2, "steps": 6, "kills": [], "grow": 3}
  code, said, err = run(plan)
  assert code == 0, err
  assert check_steps(said) == 6
  assert check_states(said) == 1
  assert sorted(each["place"] for each in said["DONE"]) == [0, 1, 2]


@needs_mpi
def test_averages_go_on_until_a_spare_is_wanted():
  kills = [{"place": 1, "when": 2, "seed": 1}]
  plan = {"ranks": 3, "spares": 1, "steps": 6, "kills": kills, "grow": 4}
  code, said, err = run({**plan, "on_missing": "reweight"})
  assert code == 0, err
  # The spare takes the free place.
  assert sorted(each["place"] for each in said["DONE"]) == [0, 1, 2]
  assert check_states(said) == 1
  assert check_steps(said) == 4


@needs_mpi
def test_a_joined_rank_with_another_tree_fails_alone():
  program = PROGRAM.replace(
    'say("STARTED"',
    'if seed == 2: state["momentum"] = jnp.zeros((2, 4))\nsay("STARTED"',
  )
  kills = [{"place": 1, "when": 2, "seed": 1}]
  plan = {"ranks": 2, "spares": 1, "steps": 5, "kills": kills}
  code, said, err = run(plan, program)
  assert code == 0, err
  assert [each["place"] for each in said["DONE"]] == [0]
  assert "this rank has tree['momentum']: float32[2, 4], and rank 0" in err, err


@needs_mpi
def test_idle_spares_end_with_a_job_that_fails():
  program = (
    "import jfog\nr = jfog.init().rank\njfog.barrier()\nraise ValueError(r)"
  )
  code, _, err = run({"ranks": 2, "spares": 2, "kills": []}, program)
  assert code == 1, err
  assert "failed first (exit code 1)" in err
