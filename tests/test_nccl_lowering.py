"""Programs for GPUs, as text: what every operation becomes there; needs no GPU."""

import ast
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog
from jfog import topology
from jfog.runtime import ProcessCommunicator

RANKS, RANK = 6, 4
STEP = jnp.int32(1)
TREE = {
  "a": jnp.ones((3, 2)),
  "b": jnp.ones(5, jnp.bfloat16),
  "c": jnp.ones(()),
  "d": jnp.ones((0, 4)),
  "e": jnp.ones(3, jnp.complex64),
}
PACKED = ["7xf32", "5xbf16", "3xcomplex<f32>"]  # one message for each dtype


def world(local_size=1):
  """A rank's communicators, in name only: nothing runs here."""
  if local_size == 1:
    return ProcessCommunicator(7, RANKS, RANK, carrier="nccl")
  machines = RANKS // local_size
  machine, place = divmod(RANK, local_size)
  return ProcessCommunicator(
    7,
    RANKS,
    RANK,
    tuple(rank // local_size for rank in range(RANKS)),
    ProcessCommunicator(8, local_size, place),
    ProcessCommunicator(9, machines, machine, tuple(range(machines))),
    "nccl",
  )


@dataclasses.dataclass
class Call:
  """A custom call of a program, its token left out."""

  target: str
  operands: list[str]
  results: list[str]
  aliases: dict[int, int]
  attributes: dict


def calls(fun, *args):
  """The custom calls of a program that is lowered for CUDA, in its order."""
  lowered = jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",))
  return [
    _read(line)
    for line in lowered.as_text().splitlines()
    if "custom_call @jf" in line
  ]


def _find(pattern, text):
  found = re.search(pattern, text)
  assert found, text
  return found


def _read(line):
  types = _find(r" : \((.*)\) -> (.*)$", line)
  operands, results = (
    [t.removeprefix("tensor<").removesuffix(">") for t in text.split(", ")]
    for text in (types[1], types[2].strip("()"))
  )
  assert operands[0] == results[0] == "!stablehlo.token", line
  pairs = re.findall(
    r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", line
  )
  config = _find(r"mhlo.backend_config = \{(.*?)\}", line)
  attributes = {}
  for name, value in re.findall(
    r"(\w+) = (\".*?\"|-?\d+ : i64|dense<.*?> : tensor<.*?>)", config[1]
  ):
    if value.startswith("dense<"):
      literal = value[len("dense<") : value.index("> : ")]
      values = np.atleast_1d(ast.literal_eval(literal))
      count = int(_find(r"tensor<(\d+)x", value)[1])
      attributes[name] = np.broadcast_to(values, count).tolist()
    else:
      attributes[name] = ast.literal_eval(value.removesuffix(" : i64"))
  return Call(
    _find(r"@jfog_nccl_(\w+)", line)[1],
    operands[1:],
    results[1:],
    {int(operand) - 1: int(result) - 1 for result, operand in pairs},
    attributes,
  )


def rounds(call):
  """The sources and destinations of every round of an exchange."""
  return [
    tuple(
      call.attributes[f"{end}s"][begin[t] : begin[t + 1]]
      for end in ("source", "destination")
      for begin in [call.attributes[f"{end}_begin"]]
    )
    for t in range(len(call.attributes["source_begin"]) - 1)
  ]


def neighbors(graph, rank=RANK):
  """The same from the mixing matrices."""
  found = []
  for round in graph.rounds:
    edges = round.mixing_matrix != 0
    np.fill_diagonal(edges, False)
    sources, destinations = edges[rank].nonzero(), edges[:, rank].nonzero()
    found.append((sources[0].tolist(), destinations[0].tolist()))
  return found


def slots(count, types=PACKED):
  """The types of what that many ranks send."""
  return [f"{count}x{each}" for each in types]


@pytest.mark.parametrize(
  "graph",
  [
    topology.ring(RANKS),
    topology.star(RANKS),
    topology.ring(RANKS, "right"),
    topology.one_peer_exponential(RANKS),
    topology.Schedule([topology.fully_connected(RANKS), topology.ring(RANKS)]),
  ],
  ids=str,
)
def test_neighbor_allreduce_is_one_exchange(graph):
  """One call for the whole tree, one message for each dtype."""
  (call,) = calls(
    lambda x, step: jfog.neighbor_allreduce(x, graph, step, comm=world()),
    TREE,
    STEP,
  )
  expected = neighbors(graph)
  width = max(len(sources) for sources, _ in expected)
  assert call.target == "neighbor_allreduce"
  assert call.operands == ["1xi32", *PACKED]
  assert call.results == slots(width)
  assert call.aliases == {}
  assert rounds(call) == expected
  attributes = call.attributes
  assert (attributes["context"], attributes["mode"], attributes["slots"]) == (
    7,
    0,
    width,
  )
  assert (attributes["selects"], attributes["apart"]) == (0, 0)
  assert attributes["operation"] == "neighbor_allreduce"


def test_large_leaves_travel_alone():
  large = (
    jnp.ones((512, 512)),
    jnp.ones(3),
    jnp.ones((2, 512, 256)),
    jnp.ones(4),
  )
  (call,) = calls(
    lambda x: jfog.neighbor_allreduce(x, topology.ring(RANKS), comm=world()),
    large,
  )
  assert sorted(call.operands[1:]) == ["262144xf32", "262144xf32", "7xf32"]


def test_graphs_have_variants_of_their_own():
  """By these, ranks with different graphs find out."""

  def variant(graph, **kwargs):
    (call,) = calls(
      lambda x: jfog.neighbor_allreduce(x, graph, comm=world(), **kwargs), TREE
    )
    return call.attributes["variant"]

  ring, star = topology.ring(RANKS), topology.star(RANKS)
  assert variant(ring) == variant(topology.ring(RANKS))
  weights = jnp.ones((RANKS, RANKS))
  assert (
    len({variant(ring), variant(star), variant(ring, weights=weights)}) == 3
  )


def test_the_transpose_goes_the_other_way():
  graph = topology.ring(RANKS, "right")

  def loss(x, weights=None):
    y = jfog.neighbor_allreduce(x, graph, weights=weights, comm=world())
    return jnp.sum(y**2)

  x, weights = jnp.ones((3, 2)), jnp.ones((RANKS, RANKS))
  forward, backward = calls(jax.grad(loss), x)
  assert rounds(forward) == [([3], [5])]
  assert rounds(backward) == [([5], [3])]
  # With runtime weights the senders scale: every destination gets its own.
  forward, backward = calls(jax.grad(loss), x, weights)
  assert forward.attributes["apart"] == 0
  assert backward.attributes["apart"] == 1
  assert backward.operands[1:] == ["1x6xf32"]


def test_peers_are_read_from_the_device():
  peers = jfog.Peers(0.5, {0: 0.25, 2: 0.25}, {1: 0.5, 3: 0.5, 5: 1.0})
  (call,) = calls(
    lambda x: jfog.neighbor_allreduce(x, peers, comm=world()), TREE
  )
  assert call.target == "peer_allreduce"
  assert call.operands == ["5xi32", *slots(3)]
  assert call.results == slots(2)
  attributes = call.attributes
  assert (
    attributes["selects"],
    attributes["source_count"],
    attributes["apart"],
  ) == (1, 2, 1)
  (call,) = calls(
    lambda x, peer: jfog.pair_gossip(x, peer, comm=world()), TREE, STEP
  )
  assert call.operands == ["2xi32", *PACKED]
  assert call.results == slots(1)
  assert call.attributes["operation"] == "pair_gossip"
  assert call.attributes["apart"] == 0


def test_neighbor_allgather_and_back():
  graph, lengths = topology.star(RANKS, center=RANK), [1, 2, 3, 4, 2, 5]
  leaf = jnp.ones((2, 3))
  fun = lambda x: jfog.neighbor_allgather(  # noqa: E731
    x, graph, axis_sizes=lengths, comm=world()
  )
  (call,) = calls(fun, leaf)
  assert call.target == "neighbor_allgather"
  assert call.results == ["15x3xf32"]
  assert call.attributes["receive_counts"] == [3 * n for n in lengths]
  assert rounds(call) == neighbors(graph)
  there, back = calls(jax.grad(lambda x: fun(x).sum()), leaf)
  assert back.target == "neighbor_allgather_transpose"
  assert back.operands == ["1xi32", "15x3xf32"]
  assert back.results == ["5x2x3xf32"]
  assert rounds(back) == [(d, s) for s, d in rounds(there)]
  assert back.attributes["send_counts"] == [3 * n for n in lengths]


@pytest.mark.parametrize(
  ("op", "dtype", "operands", "reductions"),
  [
    ("mean", "float32", ["4xf32"], [0]),
    ("mean", "bfloat16", ["4xf32"], [0]),
    ("sum", "float16", ["4xf32"], [0]),
    ("sum", "complex64", ["8xf32"], [0]),
    ("sum", "int8", ["4xi8"], [0]),
    ("sum", "uint16", ["4xui32"], [0]),
    ("sum", "bool", ["4xui8"], [2]),
    ("prod", "bool", ["4xui8"], [3]),
    ("prod", "int16", ["4xi32"], [1]),
    ("max", "int32", ["4xi32"], [2]),
    # NaN travels beside.
    ("max", "float32", ["4xf32", "4xui8"], [2, 2]),
    ("min", "bfloat16", ["4xui8", "4xf32"], [2, 3]),
  ],
)
def test_allreduce_takes_types_that_nccl_has(op, dtype, operands, reductions):
  x = jnp.ones((2, 2), dtype)
  (call,) = calls(lambda x: jfog.allreduce(x, op, comm=world()), x)
  assert call.target == "allreduce"
  assert (call.operands, call.attributes["reductions"]) == (
    operands,
    reductions,
  )
  assert call.results == operands
  assert call.aliases == {i: i for i in range(len(operands))}, "not in place"


def test_a_product_of_complex_numbers_is_gathered():
  x = jnp.ones(3, jnp.complex64)
  (call,) = calls(lambda x: jfog.allreduce(x, "prod", comm=world()), x)
  assert (call.target, call.results) == ("allgather", ["6x3xcomplex<f32>"])


def test_broadcast_is_in_place():
  (call,) = calls(lambda x: jfog.broadcast(x, 3, comm=world()), TREE)
  assert (call.target, call.attributes["root"]) == ("broadcast", 3)
  assert call.operands == call.results == PACKED
  assert call.aliases == {0: 0, 1: 1, 2: 2}


def test_allgather_pads():
  (call,) = calls(
    lambda x: jfog.allgather(x, axis_sizes=[1, 2, 3, 4, 2, 5], comm=world()),
    jnp.ones((2, 3)),
  )
  assert call.target == "allgather"
  assert (call.operands, call.results) == (["5x3xf32"], ["30x3xf32"])


def test_barrier():
  (call,) = calls(lambda x: (jfog.barrier(comm=world()), x)[1], jnp.ones(3))
  assert (call.target, call.operands, call.results) == ("barrier", [], [])


def test_hierarchical_is_three_calls():
  graph = topology.ring(3, "right")
  inside, between, back = calls(
    lambda x: jfog.hierarchical_neighbor_allreduce(x, graph, comm=world(2)),
    jnp.ones(7),
  )
  name = "hierarchical_neighbor_allreduce"
  assert [c.target for c in (inside, between, back)] == [
    name,
    name,
    "allgather",
  ]
  assert {c.attributes["operation"] for c in (inside, between, back)} == {name}
  assert [c.attributes["context"] for c in (inside, between, back)] == [8, 9, 8]
  # Each rank of a machine carries half of it, here of 8 with the padding.
  assert (inside.operands[1:], inside.results) == (["1x4xf32"], ["1x4xf32"])
  assert rounds(inside) == [([1], [1])]
  assert (between.operands[1:], between.results) == (["4xf32"], ["1x4xf32"])
  assert rounds(between) == neighbors(graph, rank=2)
  assert (back.operands, back.results) == (["4xf32"], ["2x4xf32"])


def test_finite_time_average_is_a_call_for_each_round():
  graph = topology.ceca(RANKS)
  found = calls(
    lambda x: jfog.finite_time_average(x, graph, comm=world()), jnp.ones(3)
  )
  assert len(found) == len(graph)
  assert {call.target for call in found} == {"finite_time_average"}


GRAPH = topology.one_peer_exponential(RANKS)
STARTED = {
  "neighbor_allreduce": lambda x, step, comm: jfog.neighbor_allreduce_start(
    x, GRAPH, step, comm=comm
  ),
  "peer_allreduce": lambda x, step, comm: jfog.pair_gossip_start(
    x, step, comm=comm
  ),
  "neighbor_allgather": lambda x, step, comm: jfog.neighbor_allgather_start(
    x, GRAPH, step, comm=comm
  ),
  "hierarchical_start": lambda x, step, comm: (
    jfog.hierarchical_neighbor_allreduce_start(
      x, topology.ring(3), step, comm=world(2)
    )
  ),
  "allreduce": lambda x, step, comm: jfog.allreduce_start(x, comm=comm),
  "broadcast": lambda x, step, comm: jfog.broadcast_start(x, comm=comm),
  "allgather": lambda x, step, comm: jfog.allgather_start(x, comm=comm),
}


@pytest.mark.parametrize("target", STARTED)
def test_what_is_started_is_finished_where_it_is_waited_for(target):
  """The start states the size of the receive buffers, which are staged."""
  leaf = jnp.ones((3, 4))
  start = STARTED[target]
  begun, waited = calls(
    lambda x, step: jfog.wait(start(x, step, world())), leaf, STEP
  )
  assert (begun.target, waited.target) == (target, "wait")
  assert begun.attributes["mode"] == 1
  assert begun.results == waited.operands == ["2xui32"]
  assert begun.aliases == {}, "what is sent stays until it is sent"
  (received,) = waited.results
  sizes = [int(n) for n in received.removesuffix("xf32").split("x")]
  assert begun.attributes["received_bytes"][:-1] == [4 * np.prod(sizes)]


def test_a_handle_may_leave_a_program():
  start = STARTED["neighbor_allreduce"]
  handle = jax.eval_shape(lambda x: start(x, STEP, world()), jnp.ones(3))
  (waited,) = calls(jfog.wait, handle)
  assert (waited.target, waited.results) == ("wait", ["1x3xf32"])
  (polled,) = calls(jfog.poll, handle)
  assert (polled.target, polled.results) == ("poll", ["i1"])


def test_windows_run_on_the_host():
  graph = topology.ring(RANKS)

  def program(x):
    win = jfog.win_create(x, graph, comm=world())
    handle = jfog.win_put_start(win, x)
    ready = jfog.poll(handle)
    win = jfog.win_get(jfog.win_accumulate(jfog.wait(handle), x))
    x, win = jfog.win_update(win, x)
    return x, jfog.win_version(win), ready

  found = calls(program, jnp.ones(3))
  assert [call.target for call in found] == [
    *("win_create", "win_put", "staged_poll", "staged_wait"),
    *("win_accumulate", "win_get", "win_update", "win_version"),
  ]
  (update,) = [call for call in found if call.target == "win_update"]
  assert update.aliases == {2: 0}


def test_a_world_on_cpus_lowers_for_gpus_too():
  """And one on GPUs for CPUs: the platform decides."""
  for backend in ("mpi", "nccl"):
    comm = dataclasses.replace(world(), carrier=backend)
    fun = jax.jit(lambda x, comm=comm: jfog.allreduce(x, comm=comm))
    for platform, target in (("cpu", "mpi"), ("cuda", "nccl")):
      lowered = fun.trace(jnp.ones(3)).lower(lowering_platforms=(platform,))
      assert f"@jfog_{target}_allreduce" in lowered.as_text()


def test_one_step_is_one_program():
  """A schedule's step is an operand: no branch, and one call in a loop."""
  graph = topology.one_peer_exponential(RANKS)

  def loop(x):
    def body(x, step):
      return jfog.neighbor_allreduce(x, graph, step, comm=world()), None

    return jax.lax.scan(body, x, jnp.arange(9))[0]

  (call,) = calls(loop, jnp.ones(3))
  assert len(rounds(call)) == len(graph)
