"""Neighbor collectives: weighted averages over each rank's in-neighbors."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from jfog import _compat, _dtypes
from jfog.primitives import (
  _dense,
  _ffi_attributes,
  _mesh,
  _operation,
  _primitive,
  _pytree,
  _weighted_sum,
)
from jfog.primitives._neighbor_allgather import neighbor_allgather
from jfog.primitives._operation import Operation
from jfog.primitives._peers import PackedPeers, Peers, pack, peers_call
from jfog.primitives._weighted_sum import Weighting
from jfog.primitives.nccl._neighbor_allreduce import NeighborAllreduce
from jfog.runtime import (
  Axis,
  Communicator,
  has_attackers,
  is_simulated,
  presence,
  resolve,
  sent,
)
from jfog.topology import Schedule, Topology
from jfog.topology._edge_coloring import permutations
from jfog.topology._neighbor_table import neighbor_table


@functools.partial(_operation.operation, pack={Peers: pack})
def neighbor_allreduce(
  x: Any,
  graph: Topology | Schedule | Peers,
  step: Any = None,
  *,
  weights: Any = None,
  comm: Communicator | None = None,
) -> Any:
  """Averages `x` over this rank and its in-neighbors.

  Computes `y[i] = sum_j W[i, j] x[j]`, where `W[dst, src]` is the mixing matrix
  of the graph. Where a row sums to 1 and keeps a part of its own value, that is
  evaluated as `x[i] + sum_j W[i, j] (x[j] - x[i])`, which does not drift and
  returns equal values bit for bit.

  Each rank sends all its leaves in one message to each out-neighbor and
  receives one from each in-neighbor, and waits for those alone. A rank without
  in-neighbors returns `W[i, i] x[i]` in a new buffer.

  The operation is linear in `x`; its transpose is the same operation on the
  transposed graph. It is differentiable in `weights` too: between processes that
  derivative gathers the in-neighbors' values once more.

  Args:
    x: a pytree of float or complex arrays, of equal shapes and dtypes on all
      ranks.
    graph: a `Topology` or a `Schedule`, equal on all ranks, of the
      communicator's size; or between processes `Peers`, the decision of each
      rank alone.
    step: the index into a `Schedule`, taken modulo its period; an int or a
      traced integer scalar, equal on all ranks. Another step of one schedule is
      neither traced nor compiled again. Not needed for a `Topology`.
    weights: an array of shape `(size, size)` that takes the place of the
      graph's mixing matrix; traced or not. Each rank reads its own row, and
      entries outside the graph's edges are not used.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A pytree like `x`, in shapes and dtypes. Floats of at most 32 bits are summed
    in float32, wider ones and complex ones in their own precision; the sum goes
    over this rank first and then the in-neighbors in a fixed order.

  Raises:
    ValueError: if the graph and the communicator have different sizes, a
      schedule comes without a step, or `weights` has another shape.
    TypeError: for integer or bool leaves, for a graph that is neither a topology
      nor a schedule, or a step that is not an integer.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, if a neighbor runs another operation or
      passes other shapes, dtypes or another graph (`FAILED_PRECONDITION`), has
      ended (`ABORTED`), or does not answer in time (`DEADLINE_EXCEEDED`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(4, "right")
    >>> average = lambda x: jfog.neighbor_allreduce(x, graph)
    >>> jfog.simulate(average, 4)(jnp.array([0.0, 2.0, 4.0, 6.0]))
    Array([3., 1., 3., 5.], dtype=float32)

  Source: `neighbor_allreduce` of BlueFog; Sayed, "Adaptation, Learning, and
  Optimization over Networks", 2014.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, "neighbor_allreduce")
  _pytree.require_inexact(leaves, names, "neighbor_allreduce")
  if isinstance(graph, (Peers, PackedPeers)):
    if weights is not None:
      raise ValueError(
        "neighbor_allreduce: Peers hold their own weights; leave weights= out."
      )
    return peers_call(leaves, names, structure, graph, comm)
  graph = _ffi_attributes.check_graph(graph, comm.size, "neighbor_allreduce")
  index = _ffi_attributes.step_index(graph, step, "neighbor_allreduce")
  row = None if weights is None else _row(weights, comm)
  weighting = Weighting.GRAPH if row is None else Weighting.DESTINATION
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: _on_mesh(leaves, graph, index, row, comm),
    primitive=neighbor_allreduce_p,
    fixed=(index,) if row is None else (index, row),
    operands=lambda: _pytree.to_native(leaves, names, "neighbor_allreduce"),
    params={"graph": graph, "weighting": weighting, "comm": comm},
  )


neighbor_allreduce_start = _operation.start_of(
  neighbor_allreduce,
  """>>> graph = jfog.topology.ring(4, "right")
    >>> average = lambda x: jfog.wait(jfog.neighbor_allreduce_start(x, graph))
    >>> jfog.simulate(average, 4)(jnp.array([0.0, 2.0, 4.0, 6.0]))
    Array([3., 1., 3., 5.], dtype=float32)""",
)


def _row(weights: Any, comm: Communicator) -> jax.Array:
  """This rank's row of a matrix of runtime weights."""
  if isinstance(weights, Mapping):
    raise TypeError(
      "neighbor_allreduce: weights is a dict; pass a matrix weights[dst, src], "
      "or jfog.Peers for a decision of this rank alone."
    )
  weights = jnp.asarray(weights)
  if weights.shape != (comm.size, comm.size):
    raise ValueError(
      f"neighbor_allreduce: weights has shape {weights.shape}; pass a matrix "
      f"weights[dst, src] of shape {(comm.size, comm.size)}."
    )
  if jnp.issubdtype(weights.dtype, jnp.complexfloating):
    raise TypeError(
      "neighbor_allreduce: weights is complex; pass real weights."
    )
  # The handler reads float32 and float64; integers and half floats are widened.
  if weights.dtype != jnp.float64:
    weights = weights.astype(jnp.float32)
  return weights[comm.rank]


# The mesh: permutations of lax and plain arithmetic, which differentiate and
# batch by themselves.


def _on_mesh(
  leaves: Sequence[jax.Array],
  graph: Topology | Schedule,
  index: Any,
  row: jax.Array | None,
  comm: Communicator,
) -> list[jax.Array]:
  axes = comm.axes if isinstance(comm, Axis) else ()
  if axes:
    leaves = [_compat.varying(leaf, axes) for leaf in leaves]

  def mix(
    topology: Topology, leaves: Sequence[jax.Array], row: jax.Array | None
  ) -> list[jax.Array]:
    return mix_on_mesh(leaves, topology, row, axes, comm.rank)

  # A known step compiles its own round, a traced one all of them: branches have
  # equal shapes, and every device takes the same.
  if not isinstance(index, jax.Array):
    return mix(graph.rounds[index], leaves, row)
  index = _mesh.uniform(index, comm)
  if _mesh.are_virtual(axes) and _has_equal_degrees(graph):
    return [
      _mix_gathered(x, graph, row, axes, comm.rank, k, index)
      for k, x in enumerate(leaves)
    ]
  branches = [functools.partial(mix, topology) for topology in graph.rounds]
  return lax.switch(index, branches, leaves, row)


def _has_equal_degrees(graph: Topology | Schedule) -> bool:
  """Whether all rounds have one number of slots, so that the step can index them.

  XLA copies the result of a branch, and does not fuse over it.
  """
  degrees = neighbor_table(graph).present.sum(axis=2).max(axis=1)
  return bool(degrees.min() == degrees.max() <= _weighted_sum.UNROLLED)


def mix_on_mesh(
  leaves: Sequence[jax.Array],
  topology: Topology,
  row: jax.Array | None,
  axes: tuple[str, ...],
  rank: Any,
) -> list[jax.Array]:
  """One round on a mesh; without axes, on a world of one.

  Args:
    leaves: the leaves of this rank.
    topology: the graph of the round.
    row: runtime weights of all ranks for this one, in place of the graph's.
    axes: the axes of the mesh.
    rank: this rank, traced on a mesh.
  """
  if _mesh.are_virtual(axes):
    return [
      _mix_gathered(x, topology, row, axes, rank, k)
      for k, x in enumerate(leaves)
    ]
  return [_mix_permuted(x, topology, row, axes, rank) for x in leaves]


def _begin(
  own: jax.Array,
  graph: Topology | Schedule,
  row: jax.Array | None,
  rank: Any,
  index: Any = 0,
) -> tuple[jax.Array, jax.Array | None]:
  """First summand, and the value to subtract from all received ones."""
  if row is not None:
    # No test for zero: the derivative in a weight of zero is the own value.
    return _weighted_sum.times(row[rank], own), None
  table = neighbor_table(graph)
  self_weights = table.self_weights.astype(_dtypes.real(own.dtype))
  return _weighted_sum.begin(
    own, _at(self_weights, index, rank), _at(table.difference, index, rank)
  )


def _mix_permuted(
  x: jax.Array,
  topology: Topology,
  row: jax.Array | None,
  axes: tuple[str, ...],
  rank: Any,
) -> jax.Array:
  """On devices: one `ppermute` for each group of edges that fits in one."""
  own = x.astype(_dtypes.accumulation(x.dtype))
  total, minus = _begin(own, topology, row, rank)
  ranks = np.arange(topology.size)
  for group in permutations(topology):
    sources = np.zeros(topology.size, np.int32)
    receives = np.zeros(topology.size, np.bool_)
    for src, dst in group:
      sources[dst], receives[dst] = src, True
    # x travels in its own dtype, and is widened where it is summed. A rank that
    # receives nothing in this group gets zeros, which `receives` leaves out.
    value = lax.ppermute(x, axes, group)
    if row is not None:
      weight = row[jnp.asarray(sources)[rank]]
    else:
      weights = topology.mixing_matrix[ranks, sources]
      weight = _at(weights.astype(_dtypes.real(own.dtype))[None], 0, rank)
    received = _at(receives[None], 0, rank)
    total = _weighted_sum.add(total, value, weight, received, minus)
  return total.astype(x.dtype)


def _mix_gathered(
  x: jax.Array,
  graph: Topology | Schedule,
  row: jax.Array | None,
  axes: tuple[str, ...],
  rank: Any,
  leaf: int,
  index: Any = 0,
) -> jax.Array:
  """On virtual ranks: as a matrix product, or each picks its in-neighbors.

  Of a schedule the round of this `index`, whose rounds have equal degrees.
  """
  gathered = _mesh.gather(x, axes)
  missing = presence(axes, graph.size, "neighbor_allreduce")
  present = None if missing is None else missing.edges
  attacked = is_simulated(axes) and has_attackers()
  if attacked:
    gathered = sent(
      gathered,
      rank,
      lambda: _weights_of(graph, row, rank, index),
      leaf,
      "neighbor_allreduce",
    )
  # The product takes its own part from the gathered values, and all differences
  # to the first of them: both may be an attacker's.
  in_slots = functools.partial(
    _mix_slots, x, gathered, graph, row, rank, index, present
  )
  if present is not None or attacked or isinstance(graph, Schedule):
    return in_slots()
  if row is None and _dense.is_dense(graph, x.dtype):
    return _dense.mix(x, gathered, graph, rank, in_slots)
  return in_slots()


def _weights_of(
  graph: Topology | Schedule, row: jax.Array | None, rank: Any, index: Any
) -> jax.Array:
  """A rank's weights by source; 0 where there is no edge."""
  matrices = np.stack([topology.mixing_matrix for topology in graph.rounds])
  matrix = jnp.asarray(matrices)[index, rank]
  return matrix if row is None else jnp.where(matrix != 0, row, 0)


def _mix_slots(
  x: jax.Array,
  gathered: jax.Array,
  graph: Topology | Schedule,
  row: jax.Array | None,
  rank: Any,
  index: Any,
  present: jax.Array | None,
) -> jax.Array:
  """The sum over in-neighbors, of `present` edges only, in ascending order."""
  own = x.astype(_dtypes.accumulation(x.dtype))
  total, minus = _begin(own, graph, row, rank, index)
  table = neighbor_table(graph)

  def slots_of(values: np.ndarray) -> jax.Array:
    # Slots first, as the scan needs them also where `rank` is batched.
    return jnp.asarray(values.transpose(0, 2, 1))[index][:, rank]

  sources, reads = slots_of(table.sources), slots_of(table.present)
  dtype = _dtypes.real(own.dtype)
  if row is not None:
    weights = row.astype(dtype)[sources]
  else:
    weights = slots_of(table.weights.astype(dtype))

  if present is not None:
    # As in xla_ops/mpi/neighbor_average.cc: the own value takes the weights of what
    # is missing. In difference form a term that is left out does so by itself.
    arrives = present[rank][sources]
    missing = jnp.sum(jnp.where(reads & ~arrives, weights, 0))
    if row is None:
      missing = jnp.where(_at(table.difference, index, rank), 0, missing)
    total = total + _weighted_sum.begin(own, missing, False)[0]
    reads = reads & arrives

  def add(total: jax.Array, slot: Any) -> tuple[jax.Array, None]:
    source, weight, read = slot
    return _weighted_sum.add(total, gathered[source], weight, read, minus), None

  slots = len(reads)
  total, _ = lax.scan(
    add,
    total,
    (sources, weights, reads),
    unroll=max(1, min(slots, _weighted_sum.UNROLLED)),
  )
  return total.astype(x.dtype)


def _at(values: np.ndarray, index: Any, rank: Any) -> Any:
  """A rank's entry in a round; known if all entries are equal."""
  if (values == values[0, 0]).all():
    return values[0, 0]
  return jnp.asarray(values)[index, rank]


# Between processes: the rules of the primitive.


_TRANSPOSED = {
  Weighting.GRAPH: Weighting.GRAPH,
  Weighting.DESTINATION: Weighting.SOURCE,
  Weighting.SOURCE: Weighting.DESTINATION,
}


def _tangents(
  primitive: Primitive,
  primals: Sequence[Any],
  results: Sequence[Any],
  tangents: Sequence[Any],
  *,
  fixed: int,
  weighting: Weighting,
  **params: Any,
) -> list[Any]:
  """Linear in the leaves, and linear in the row of weights.

  y = sum_j row[j] x[j], so dy = sum_j row[j] dx[j] + sum_j drow[j] x[j]. The
  second sum needs the neighbors' leaves one by one, for its transpose
  drow[j] = <dy, x[j]>: one gather fetches them all.
  """
  out = _primitive.linear_tangents(
    primitive,
    primals,
    results,
    tangents,
    fixed=fixed,
    weighting=weighting,
    **params,
  )
  drow = tangents[1] if fixed == 2 else None
  if drow is None or type(drow) is ad.Zero:
    return out
  if weighting is Weighting.SOURCE:
    raise TypeError(
      "neighbor_allreduce: a second derivative with respect to weights is not "
      "defined; use jax.lax.stop_gradient on weights in the inner one."
    )
  step, _, *leaves = primals
  terms = _weighted_by(drow, leaves, step, **params)
  return [ad.add_tangents(*pair) for pair in zip(out, terms, strict=True)]


def _weighted_by(
  drow: jax.Array,
  leaves: Sequence[jax.Array],
  step: Any,
  *,
  graph: Topology | Schedule,
  comm: Communicator,
) -> list[jax.Array]:
  """sum_j drow[j] x[j] over this rank and its in-neighbors, for all leaves."""
  step = jnp.asarray(step)
  gathered = neighbor_allgather(
    [x[None] for x in leaves], graph, step, pad=True, comm=comm
  )
  # `pad` gives every round and rank equally many slots, as a traced step needs.
  # Slot k of a gathered leaf is the k-th in-neighbor's; empty ones are zero.
  table = neighbor_table(graph)
  step = step % len(graph)
  sources = jnp.asarray(table.sources[:, comm.rank])[step]
  present = jnp.asarray(table.present[:, comm.rank])[step]
  row = jnp.where(present, drow[sources], 0)
  terms = []
  for x, received in zip(leaves, gathered, strict=True):
    wide = _dtypes.accumulation(x.dtype)
    real = _dtypes.real(wide)
    # Sums in the accumulation dtype, as the handler computes them.
    term = drow[comm.rank].astype(real) * x.astype(wide)
    term += jnp.tensordot(row.astype(wide), received.astype(wide), axes=1)
    terms.append(term.astype(x.dtype))
  return terms


def _transpose(
  cotangents: Sequence[Any],
  *operands: Any,
  fixed: int,
  graph: Topology | Schedule,
  weighting: Weighting,
  comm: Any,
) -> Sequence[jax.Array]:
  # The adjoint of x -> W x is ct -> W.T ct: sources become destinations. Runtime
  # weights of received values become weights of sent ones, for each rank holds
  # its own row of W only.
  return neighbor_allreduce_p.bind(
    *operands,
    *cotangents,
    fixed=fixed,
    graph=transposed(graph),
    weighting=_TRANSPOSED[weighting],
    comm=comm,
  )


@functools.lru_cache(maxsize=1024)
def transposed(graph: Topology | Schedule) -> Topology | Schedule:
  """The transposed graph, made once, so that caches by graph find it again."""
  return graph.transpose()


def _attributes(
  *leaves: Any,
  graph: Topology | Schedule,
  weighting: Weighting,
  comm: Any,
) -> dict[str, Any]:
  del leaves  # their shapes are in the call frame of the handler
  return {
    "context": np.int64(comm.context),
    "graph": np.int64(_ffi_attributes.fingerprint(graph)),
    "weighting": np.int64(weighting),
    **neighbor_table(graph).attributes(comm.rank),
  }


neighbor_allreduce_p = _primitive.define(
  "neighbor_allreduce",
  attributes=_attributes,
  tangents=_tangents,
  transpose=_transpose,
  in_place=True,
  on_gpus=NeighborAllreduce(),
)
