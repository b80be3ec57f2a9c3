"""Windows on a mesh and in simulation: slots inside of the program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog.primitives import _ffi_attributes, _mesh, _weighted_sum
from jfog.primitives.windows import _delay, _slots
from jfog.primitives.windows._delay import Pending
from jfog.primitives.windows._window import EdgeWeights, Spec
from jfog.runtime import Axis, Presence, presence, refuse_with_attackers
from jfog.topology._edge_coloring import permutations


class State(NamedTuple):
  """The arrays of a window; slot k belongs to the k-th in-neighbor.

  All ranks have as many slots as the largest in-degree. An associated p lies in
  one array with a leaf, see `_slots.pack`.
  """

  exposed: list[jax.Array]
  slots: list[jax.Array]  # shape=(slots, ...), one for each leaf
  versions: jax.Array  # shape=(slots,), dtype=int32
  pending: Pending | None  # None without delays


def create(spec: Spec, leaves: list[jax.Array]) -> State:
  """The state of a window that exposes `leaves`."""
  exposed = [jnp.asarray(x, x.dtype) for x in leaves]  # no longer weakly typed
  # p starts as 1 on every rank, as in push-sum.
  exposed = _slots.pack(spec, exposed, jnp.ones([], spec.p_dtype))
  count = len(_slots.sources_of(spec.topology))
  # Without zero_init a slot holds this rank's own value until its in-neighbor
  # writes: an update before that is an average with itself.
  starts = [jnp.zeros_like(x) if spec.zero_init else x for x in exposed]
  slots = [jnp.broadcast_to(x, (count, *x.shape)) for x in starts]
  pending = None
  if spec.delay is not None:
    # The queue is as long as the longest delay on an edge; entry 0 arrives now.
    ahead = 1 + int(
      (_slots.edges_of(spec.topology) * np.array(spec.delay)).max()
    )
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
  name = "win_accumulate" if accumulate else "win_put"
  refuse_with_attackers(name)
  edges = _slots.edges_of(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen[:, None]
  values = _slots.pack(spec, leaves, associated_p(spec, state))
  # A summand is rounded with the sum, and what overwrites before it travels.
  dtypes = [
    _weighted_sum.sum_dtype(x) if accumulate else x.dtype for x in values
  ]
  messages = _fetch(spec, edges, values, dtypes, weights.values)
  return _arrive(spec, state, messages, edges, accumulate)


def get(spec: Spec, state: State, weights: EdgeWeights) -> State:
  """Copies what the in-neighbors expose into their slots."""
  refuse_with_attackers("win_get")
  edges = _slots.edges_of(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen
  # The weights of a get belong to the receiver, so they apply after the
  # exchange; those of a put to the sender, before it.
  row = weights.values[_slots.own_sources(spec)]
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
  rank, sources = spec.comm.rank, _slots.own_sources(spec)
  edges = _slots.edges_of(spec.topology)
  if weights.chosen is not None:
    edges &= weights.chosen
  # Unused slots have this rank as their source, and no edge to itself: they are
  # neither read nor reset.
  reads = jnp.asarray(edges)[rank, sources]
  row = weights.values[sources]
  difference: Any = False
  if defaults:
    difference = jnp.asarray(_ffi_attributes.difference_rows(spec.topology))[
      rank
    ]
  if (gone := missing(spec)) is not None:
    # Slots of missing ranks are dropped. Their weights go to the own value; in a
    # collect, where slots hold sums, they add nothing, which the difference form
    # would count as the own value.
    dropped = reads & gone[sources]
    reads &= ~dropped
    if reset:
      difference &= ~dropped.any()
    else:
      self_weight = self_weight + jnp.where(dropped, row, 0).sum()
  values = [_mesh.varying(x, spec.comm) for x in leaves]
  values = _slots.pack(spec, values, associated_p(spec, state))
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
  # An update is one step of time: it reads the slots before what is due at the
  # next one arrives.
  if state.pending is not None and edges.any():
    state = _deliver(state, _delay.advance(state.pending, len(spec.delay)))
  return _slots.unpack(spec, results)[0], state


def versions(spec: Spec, state: State) -> jax.Array:
  """How often each slot was written since it was last read, by rank."""
  # A sum over slots instead of a scatter: unused slots, which all name this
  # rank, hold no writes and add nothing.
  ours = _slots.own_sources(spec)[:, None] == jnp.arange(spec.comm.size)
  return jnp.where(ours, state.versions[:, None], 0).sum(axis=0)


def missing(spec: Spec) -> jax.Array | None:
  """The ranks without which this one goes on; None if there are none.

  A rank that is missing itself goes on without all others.
  """
  if (present := _presence(spec)) is None:
    return None
  own = spec.comm.rank == jnp.arange(spec.comm.size)
  return ~(present.ranks & present.ranks[spec.comm.rank]) & ~own


def associated_p(spec: Spec, state: State) -> Any:
  """The p of what this rank exposes; None if there is none."""
  return _slots.unpack(spec, state.exposed)[1]


def _presence(spec: Spec) -> Presence | None:
  """Ranks and edges that take part; None if none is missing."""
  comm = spec.comm
  if not isinstance(comm, Axis):
    return None
  return presence(comm.axes, comm.size, "operations on windows")


def _fetch(
  spec: Spec,
  edges: np.ndarray,
  leaves: list[jax.Array],
  dtypes: list[Any],
  row: jax.Array | None = None,
) -> list[jax.Array]:
  """The values of the sources of all slots, stacked, in these dtypes.

  With a `row` of weights for its destinations each source sends its weight times
  its leaves. Where there is no edge it is unspecified.
  """
  topology, comm = spec.topology, spec.comm
  axes = comm.axes if isinstance(comm, Axis) else ()

  def scaled(weight: Any, leaves: list[jax.Array]) -> list[jax.Array]:
    if row is None:
      return leaves
    return [
      _weighted_sum.times(weight, x).astype(dtype)
      for x, dtype in zip(leaves, dtypes, strict=True)
    ]

  if _mesh.are_virtual(axes):
    sources = _slots.own_sources(spec)
    # Column of this rank: the weight that each source gives to it.
    weights = None if row is None else _mesh.gather(row, axes)[:, comm.rank]
    fetched = [_mesh.gather(x, axes)[sources] for x in leaves]
    return scaled(weights if weights is None else weights[sources], fetched)
  count = len(_slots.sources_of(topology))
  fetched = [  # the last slot discards what a rank without a source receives
    _mesh.varying(jnp.zeros((count + 1, *x.shape), dtype), comm)
    for x, dtype in zip(leaves, dtypes, strict=True)
  ]
  # One color of the edge coloring: each rank sends to at most one rank and
  # receives from at most one, as ppermute requires.
  for group in permutations(topology):
    group = [(src, dst) for src, dst in group if edges[dst, src]]
    if not group:
      continue
    # By rank: the receiver of its message, and the slot of its own source. Both
    # are constants, of which a rank selects its entry.
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


def _arrive(
  spec: Spec,
  state: State,
  messages: list[jax.Array],
  edges: np.ndarray,
  accumulate: bool,
) -> State:
  """Delivers one message over each of the `edges`, now or after its delay."""
  rank, sources = spec.comm.rank, _slots.own_sources(spec)
  sent = jnp.asarray(edges)[rank, sources]
  if (present := _presence(spec)) is not None:
    sent &= present.edges[rank, sources]
  pending = state.pending
  if pending is None:
    return state._replace(
      slots=[
        _slots.write(slot, message, sent, accumulate)
        for slot, message in zip(state.slots, messages, strict=True)
      ],
      versions=state.versions + sent,
    )
  delays = jnp.asarray(np.array(spec.delay, np.int32))
  # One edge keeps the order in which it was sent.
  ahead = jnp.maximum(delays[pending.time, rank, sources], pending.latest)
  # shape=(ahead, slots): the one entry of the queue for each edge.
  there = sent & (jnp.arange(len(pending.counts))[:, None] == ahead)
  pending = Pending(
    messages=[
      _slots.write(old, new, there, accumulate & (pending.counts > 0))
      for old, new in zip(pending.messages, messages, strict=True)
    ],
    # A put hides what was queued before it in its entry, and accumulates behind
    # it add to it: the entry stays a put.
    puts=pending.puts if accumulate else pending.puts | there,
    counts=pending.counts + there,
    latest=jnp.where(sent, ahead, pending.latest),
    time=pending.time,
  )
  return _deliver(state, pending)


def _deliver(state: State, pending: Pending) -> State:
  """Writes what has arrived into the slots."""
  # An entry without a put is a sum of accumulates, which adds to the slot.
  counts, puts = pending.counts[0], pending.puts[0]
  return state._replace(
    slots=[
      _slots.write(slot, messages[0], counts > 0, ~puts)
      for slot, messages in zip(state.slots, pending.messages, strict=True)
    ],
    versions=state.versions + counts,
    pending=pending._replace(
      puts=pending.puts.at[0].set(False), counts=pending.counts.at[0].set(0)
    ),
  )
