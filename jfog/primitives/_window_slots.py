"""Windows on a mesh and in simulation: slots inside of the program."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog.primitives import _ffi_attributes, _mesh, _weighted_sum
from jfog.runtime import Communicator
from jfog.topology import Topology
from jfog.topology._edge_coloring import permutations


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is fixed about a window; hashable."""

  structure: Any
  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[np.dtype, ...]
  topology: Topology
  comm: Communicator
  zero_init: bool
  associated_p: bool
  delay: Any  # hashable; None without delays

  @property
  def p_dtype(self) -> np.dtype:
    """The dtype of the associated p: the widest leaf's, at least float32."""
    dtype = jnp.dtype(jnp.float32)
    for leaf in self.dtypes:
      if jnp.issubdtype(leaf, jnp.inexact):
        dtype = jnp.promote_types(dtype, jnp.finfo(leaf).dtype)
    return dtype

  def describe(self) -> str:
    """What values it holds, for people."""
    leaves = len(self.shapes)
    return f"{leaves} {'leaf' if leaves == 1 else 'leaves'}"


class EdgeWeights(NamedTuple):
  """Weights of this rank's edges, by the rank at their other end."""

  values: jax.Array  # shape=(size,), int32 or a float dtype
  chosen: np.ndarray | None  # shape=(size,), bool: which ranks; None: all


class Pending(NamedTuple):
  """Messages on their way, by the number of updates until they arrive.

  What arrives in one slot at one time is merged, in the order in which it was
  sent. Nothing stays at place 0, where a message arrives.
  """

  messages: list[jax.Array]  # shape=(ahead, slots, ...), one for each leaf
  puts: jax.Array  # shape=(ahead, slots), dtype=bool: else they are summands
  counts: jax.Array  # shape=(ahead, slots), dtype=int32: how many were merged
  latest: jax.Array  # shape=(slots,), dtype=int32: where the last one is
  time: jax.Array  # shape=(), dtype=int32: the updates so far, in the period


class State(NamedTuple):
  """The arrays of a window; slot k belongs to the k-th in-neighbor.

  All ranks have as many slots as the largest in-degree. An associated p lies in
  one array with a leaf, see `_pack`.
  """

  exposed: list[jax.Array]
  slots: list[jax.Array]  # shape=(slots, ...), one for each leaf
  versions: jax.Array  # shape=(slots,), dtype=int32
  pending: Pending | None  # None without delays


def check_delay(delay: Any, comm: Communicator) -> Any:
  """A delay as tuples `[t][dst][src]`; None if there is none.

  Raises:
    TypeError: if it is no integer.
    ValueError: if it is negative, of another shape, or meant for processes.
  """
  if delay is None:
    return None
  if comm.backend in ("mpi", "nccl"):
    raise ValueError(
      "win_create: delay is for a mesh and for simulation; between processes a "
      "message takes the time that it takes, so leave it out."
    )
  if isinstance(delay, jax.core.Tracer):
    raise TypeError(
      "win_create: delay is traced; pass an int or a NumPy array of them."
    )
  table, size = np.asarray(delay), comm.size
  if not np.issubdtype(table.dtype, np.integer):
    raise TypeError(
      f"win_create: delay has dtype {table.dtype}; it counts updates, so pass "
      f"integers."
    )
  if table.ndim == 0:
    table = np.full((size, size), table)
  if table.ndim == 2:
    table = table[None]
  if table.shape[1:] != (size, size) or len(table) == 0:
    raise ValueError(
      f"win_create: delay has shape {np.shape(delay)}; pass an int, or an array "
      f"delay[dst, src] or delay[t, dst, src] of {size} ranks."
    )
  if table.min() < 0:
    raise ValueError(
      f"win_create: delay has an entry {table.min()}; what is sent arrives 0 or "
      f"more updates later."
    )
  if not table.any():
    return None
  return tuple(tuple(map(tuple, matrix)) for matrix in table.tolist())


def create(spec: Spec, leaves: list[jax.Array]) -> State:
  """The state of a window that exposes `leaves`."""
  exposed = [jnp.asarray(x, x.dtype) for x in leaves]  # no longer weakly typed
  exposed = _pack(spec, exposed, jnp.ones([], spec.p_dtype))
  count = len(_sources(spec.topology))
  starts = [jnp.zeros_like(x) if spec.zero_init else x for x in exposed]
  slots = [jnp.broadcast_to(x, (count, *x.shape)) for x in starts]
  pending = None
  if spec.delay is not None:
    ahead = 1 + int((_edges(spec.topology) * np.array(spec.delay)).max())
    pending = Pending(
      messages=[jnp.zeros((ahead, *x.shape), x.dtype) for x in slots],
      puts=jnp.zeros((ahead, count), bool),
      counts=jnp.zeros((ahead, count), jnp.int32),
      latest=jnp.zeros(count, jnp.int32),
      time=jnp.zeros([], jnp.int32),
    )
  state = State(exposed, slots, jnp.zeros(count, jnp.int32), pending)
  return jax.tree.map(lambda x: _mesh.varying(x, spec.comm), state)


def send(
  spec: Spec,
  state: State,
  leaves: list[jax.Array],
  weights: EdgeWeights,
  accumulate: bool,
) -> State:
  """Puts or accumulates `leaves` into this rank's slots at its out-neighbors."""
  edges = _edges(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen[:, None]
  values = _pack(spec, leaves, associated_p(spec, state))
  # A summand is rounded with the sum, and what overwrites before it travels.
  dtypes = [
    _weighted_sum.sum_dtype(x) if accumulate else x.dtype for x in values
  ]
  messages = _fetch(spec, edges, values, dtypes, weights.values)
  return _arrive(spec, state, messages, edges, accumulate)


def get(spec: Spec, state: State, weights: EdgeWeights) -> State:
  """Copies what the in-neighbors expose into their slots."""
  edges = _edges(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen
  row = weights.values[_own_sources(spec)]
  fetched = _fetch(spec, edges, state.exposed, [x.dtype for x in state.exposed])
  messages = [_weighted_sum.times(row, x).astype(x.dtype) for x in fetched]
  return _arrive(spec, state, messages, edges, accumulate=False)


def update(
  spec: Spec,
  state: State,
  leaves: list[jax.Array],
  self_weight: jax.Array,
  weights: EdgeWeights,
  *,
  defaults: bool,
  reset: bool,
  expose: bool,
) -> tuple[list[jax.Array], State]:
  """Combines `leaves` with the slots; with `expose` others see the result.

  With `defaults` both weights are the topology's.
  """
  rank, sources = spec.comm.rank, _own_sources(spec)
  edges = _edges(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen
  reads = jnp.asarray(edges)[rank, sources]
  row = weights.values[sources]
  difference = False
  if defaults:
    difference = jnp.asarray(_ffi_attributes.difference_rows(spec.topology))[
      rank
    ]
  values = [_mesh.varying(x, spec.comm) for x in leaves]
  values = _pack(spec, values, associated_p(spec, state))
  results = _weighted_sum.combine(
    values, state.slots, self_weight, row, reads, difference
  )
  slots = state.slots
  if reset:
    slots = [
      jnp.where(_weighted_sum.along(reads, x), jnp.zeros_like(x), x)
      for x in slots
    ]
  versions = jnp.where(reads, 0, state.versions)
  exposed = results if expose else state.exposed
  state = State(exposed, slots, versions, state.pending)
  if state.pending is not None and edges.any():
    state = _deliver(state, _advance(state.pending, len(spec.delay)))
  return _unpack(spec, results)[0], state


def versions(spec: Spec, state: State) -> jax.Array:
  """How often each slot was written since it was last read, by rank."""
  ours = _own_sources(spec)[:, None] == jnp.arange(spec.comm.size)
  return jnp.where(ours, state.versions[:, None], 0).sum(axis=0)


def associated_p(spec: Spec, state: State) -> Any:
  """The p of what this rank exposes; None if there is none."""
  return _unpack(spec, state.exposed)[1]


# An associated p undergoes the arithmetic of the data bit for bit where both are
# elements of one array: XLA fuses a product and a sum in some loops, and not in
# others, which rounds once or twice.


def _host(spec: Spec) -> int | None:
  """The leaf that p lies behind, in one array; None if there is none like it."""
  return (
    spec.dtypes.index(spec.p_dtype) if spec.p_dtype in spec.dtypes else None
  )


def _pack(spec: Spec, leaves: list[jax.Array], p: Any) -> list[jax.Array]:
  """The leaves as arrays, and p in its place."""
  if not spec.associated_p:
    return list(leaves)
  host = _host(spec)
  if host is None:
    return [*leaves, p]
  return [
    jnp.append(x.ravel(), p) if i == host else x for i, x in enumerate(leaves)
  ]


def _unpack(spec: Spec, arrays: list[jax.Array]) -> tuple[list[jax.Array], Any]:
  """The leaves and p that `_pack` has put together."""
  if not spec.associated_p:
    return list(arrays), None
  host = _host(spec)
  if host is None:
    return list(arrays[:-1]), arrays[-1]
  leaves = [
    x[:-1].reshape(spec.shapes[i]) if i == host else x
    for i, x in enumerate(arrays)
  ]
  return leaves, arrays[host][-1]


# Edges and slots.


def _edges(topology: Topology) -> np.ndarray:
  """Which `[dst, src]` are neighbors."""
  edges = topology.mixing_matrix != 0
  np.fill_diagonal(edges, False)
  return edges


def _sources(topology: Topology) -> np.ndarray:
  """The rank that writes slot k of rank i, at `[k, i]`; i itself if nobody."""
  neighbors = [topology.in_neighbors(i) for i in range(topology.size)]
  sources = np.tile(np.arange(topology.size), (max(map(len, neighbors)), 1))
  for i, ranks in enumerate(neighbors):
    sources[: len(ranks), i] = ranks
  return sources


def _own_sources(spec: Spec) -> jax.Array:
  """The ranks that write this rank's slots."""
  return jnp.asarray(_sources(spec.topology))[:, spec.comm.rank]


# The movement of data, and its arithmetic.


def _fetch(spec, edges, leaves, dtypes, row=None) -> list[jax.Array]:
  """What the source of each slot has for this rank, stacked, in these dtypes.

  With a `row` of weights for its destinations each source sends its weight times
  its leaves. Where there is no edge it is unspecified.
  """
  topology, comm = spec.topology, spec.comm
  axes = comm.axes if comm.backend == "mesh" else ()

  def scaled(weight, leaves):
    if row is None:
      return leaves
    return [
      _weighted_sum.times(weight, x).astype(dtype)
      for x, dtype in zip(leaves, dtypes, strict=True)
    ]

  if _mesh.are_virtual(axes):
    sources = _own_sources(spec)
    weights = None if row is None else _mesh.gather(row, axes)[:, comm.rank]
    fetched = [_mesh.gather(x, axes)[sources] for x in leaves]
    return scaled(weights if weights is None else weights[sources], fetched)
  count = len(_sources(topology))
  fetched = [  # with one more place, for what a rank without a source gets
    _mesh.varying(jnp.zeros((count + 1, *x.shape), dtype), comm)
    for x, dtype in zip(leaves, dtypes, strict=True)
  ]
  for group in permutations(topology):
    group = [(src, dst) for src, dst in group if edges[dst, src]]
    if not group:
      continue
    destinations = np.zeros(topology.size, np.int32)
    slots = np.full(topology.size, count, np.int32)
    for src, dst in group:
      destinations[src] = dst
      slots[dst] = topology.in_neighbors(dst).index(src)
    weight = None
    if row is not None:
      weight = row[jnp.asarray(destinations)[comm.rank]]
    slot = jnp.asarray(slots)[comm.rank]
    for i, x in enumerate(scaled(weight, leaves)):
      received = lax.ppermute(_mesh.varying(x, comm), axes, group)
      fetched[i] = lax.dynamic_update_index_in_dim(
        fetched[i], received, slot, 0
      )
  return [x[:count] for x in fetched]


def _arrive(spec, state, messages, edges, accumulate) -> State:
  """Lets one message for each of the `edges` arrive, now or later."""
  rank, sources = spec.comm.rank, _own_sources(spec)
  sent = jnp.asarray(edges)[rank, sources]
  pending = state.pending
  if pending is None:
    return state._replace(
      slots=[
        _write(slot, message, sent, accumulate)
        for slot, message in zip(state.slots, messages, strict=True)
      ],
      versions=state.versions + sent,
    )
  delays = jnp.asarray(np.array(spec.delay, np.int32))
  # One edge keeps the order in which it was sent.
  ahead = jnp.maximum(delays[pending.time, rank, sources], pending.latest)
  there = sent & (jnp.arange(len(pending.counts))[:, None] == ahead)
  pending = Pending(
    messages=[
      _write(old, new, there, accumulate & (pending.counts > 0))
      for old, new in zip(pending.messages, messages, strict=True)
    ],
    puts=pending.puts if accumulate else pending.puts | there,
    counts=pending.counts + there,
    latest=jnp.where(sent, ahead, pending.latest),
    time=pending.time,
  )
  return _deliver(state, pending)


def _deliver(state: State, pending: Pending) -> State:
  """Writes what has arrived into the slots."""
  counts, puts = pending.counts[0], pending.puts[0]
  return state._replace(
    slots=[
      _write(slot, messages[0], counts > 0, ~puts)
      for slot, messages in zip(state.slots, pending.messages, strict=True)
    ],
    versions=state.versions + counts,
    pending=pending._replace(
      puts=pending.puts.at[0].set(False), counts=pending.counts.at[0].set(0)
    ),
  )


def _advance(pending: Pending, period: int) -> Pending:
  """Brings all messages one update nearer."""

  def shifted(x):
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

  return Pending(
    messages=[shifted(x) for x in pending.messages],
    puts=shifted(pending.puts),
    counts=shifted(pending.counts),
    latest=jnp.maximum(pending.latest - 1, 0),
    time=(pending.time + 1) % period,
  )


def _write(old, message, there, adds) -> jax.Array:
  """`old` with the message written, or where it `adds` added, `there`."""
  total = old.astype(message.dtype) + message
  new = jnp.where(_weighted_sum.along(adds, total), total, message).astype(
    old.dtype
  )
  return jnp.where(_weighted_sum.along(there, new), new, old)
