"""Neighbor collectives: weighted averages over each rank's in-neighbors."""

import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from jfog import _compat, _dtypes
from jfog.primitives import (
  _ffi_attributes,
  _mesh,
  _nccl,
  _operation,
  _primitive,
  _pytree,
)
from jfog.primitives._operation import Call
from jfog.primitives._peers import Peers, peers_call
from jfog.runtime import Communicator, resolve
from jfog.topology import Schedule, Topology
from jfog.topology._edge_coloring import permutations

# A virtual rank's sum over more in-neighbors than this is a loop in the program.
_UNROLLED = 16


@_operation.operation
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
  graph with every edge turned around. It is differentiable in `weights` too.

  Args:
    x: a pytree of float or complex arrays, of equal shapes and dtypes on all
      ranks.
    graph: a `Topology` or a `Schedule`, equal on all ranks, of the
      communicator's size; or between processes `Peers`, which each rank makes
      for itself.
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
    TypeError: for integer or bool leaves, which hold no fractions, for a graph
      that is neither a topology nor a schedule, or a step that is no integer.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, if a neighbor runs another operation,
      brings other shapes, dtypes or another graph (`FAILED_PRECONDITION`), has
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
  if isinstance(graph, Peers):
    if weights is not None:
      raise ValueError(
        "neighbor_allreduce: Peers hold their own weights; leave weights= out."
      )
    return peers_call(leaves, names, structure, graph, comm)
  graph = _ffi_attributes.check_graph(graph, comm.size, "neighbor_allreduce")
  index = _ffi_attributes.step_index(graph, step, "neighbor_allreduce")
  row = None if weights is None else _row(weights, comm)
  if not leaves or comm.backend in ("mesh", "single"):
    mixed = _on_mesh(leaves, graph, index, row, comm) if leaves else []
    return Call(leaves, structure, mixed)
  index = np.int32(index) if isinstance(index, int) else index
  weighting = Weighting.GRAPH if row is None else Weighting.DESTINATION
  return Call(
    leaves,
    structure,
    primitive=neighbor_allreduce_p,
    fixed=(index,) if row is None else (index, row),
    operands=_pytree.to_native(leaves, names, "neighbor_allreduce"),
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
      "or jfog.Peers for what this rank alone decides."
    )
  weights = jnp.asarray(weights)
  if weights.shape != (comm.size, comm.size):
    raise ValueError(
      f"neighbor_allreduce: weights has shape {weights.shape}, a matrix of "
      f"{(comm.size, comm.size)} is wanted: weights[dst, src]."
    )
  if jnp.issubdtype(weights.dtype, jnp.complexfloating):
    raise TypeError(
      "neighbor_allreduce: weights is complex; pass real weights."
    )
  if weights.dtype != jnp.float64:
    weights = weights.astype(jnp.float32)
  return weights[comm.rank]


# The mesh: permutations of lax and plain arithmetic, which differentiate and
# batch by themselves.


def _on_mesh(leaves, graph, index, row, comm) -> list[jax.Array]:
  rounds = graph.rounds
  axes = comm.axes if comm.backend == "mesh" else ()
  if axes:
    leaves = [_compat.varying(leaf, axes) for leaf in leaves]

  def mix(topology, leaves, row):
    return mix_on_mesh(leaves, topology, row, axes, comm.rank)

  if not isinstance(index, jax.Array):
    return mix(rounds[index], leaves, row)
  branches = [functools.partial(mix, topology) for topology in rounds]
  return lax.switch(_mesh.uniform(index, comm), branches, leaves, row)


def mix_on_mesh(leaves, topology, row, axes, rank) -> list[jax.Array]:
  """One round on a mesh; without axes, on a world of one."""
  mix_leaf = _mix_gathered if _mesh.are_virtual(axes) else _mix_permuted
  return [mix_leaf(x, topology, row, axes, rank) for x in leaves]


def _base(own, topology, row, rank):
  """`(first summand, what is subtracted from every received value)`."""
  if row is not None:
    return row[rank].astype(_dtypes.real(own.dtype)) * own, None
  difference = _ffi_attributes.difference_rows(topology)
  if difference.all():
    return own, own
  self_weights = topology.mixing_matrix.diagonal()
  weight = _at(self_weights, rank, own.dtype)
  # A rank that keeps nothing of its own value returns no trace of it.
  kept = jnp.where(weight == 0, _mesh.nothing(own), weight * own)
  if not difference.any():
    return (None if (self_weights == 0).all() else kept), None
  here = jnp.asarray(difference)[rank]
  return jnp.where(here, own, kept), jnp.where(here, own, jnp.zeros_like(own))


def _mix_permuted(x, topology, row, axes, rank):
  """On devices: one `ppermute` for each group of edges that fits in one."""
  own = x.astype(_dtypes.accumulation(x.dtype))
  total, minus = _base(own, topology, row, rank)
  for group in permutations(topology):
    sources = np.full(topology.size, -1)
    for src, dst in group:
      sources[dst] = src
    value = lax.ppermute(x, axes, group).astype(own.dtype)
    weight, receives = _weights(topology, sources, row, rank, own.dtype)
    term = weight * (value if minus is None else value - minus)
    if (sources < 0).any():
      term = jnp.where(receives, term, _mesh.nothing(term))
    total = term if total is None else total + term
  assert total is not None  # who keeps nothing of its own receives
  return total.astype(x.dtype)


def _mix_gathered(x, topology, row, axes, rank):
  """On virtual ranks: each picks its in-neighbors, in ascending order."""
  own = x.astype(_dtypes.accumulation(x.dtype))
  total, minus = _base(own, topology, row, rank)
  if total is None:
    total = _mesh.nothing(own)
  slots = max(len(topology.in_neighbors(i)) for i in range(topology.size))
  sources = np.full((slots, topology.size), -1)
  for i in range(topology.size):
    neighbors = topology.in_neighbors(i)
    sources[: len(neighbors), i] = neighbors
  gathered = _mesh.gather(x, axes)

  def add(total, slot):
    source, weight, receives = slot
    value = gathered[source].astype(own.dtype)
    term = weight * (value if minus is None else value - minus)
    return total + jnp.where(receives, term, _mesh.nothing(term)), None

  weights, receives = _weights(topology, sources, row, rank, own.dtype)
  picked = jnp.asarray(np.maximum(sources, 0))[:, rank]
  total, _ = lax.scan(
    add,
    total,
    (picked, weights, receives),
    unroll=max(1, min(slots, _UNROLLED)),
  )
  return total.astype(x.dtype)


def _weights(topology, sources, row, rank, dtype):
  """Weights of what this rank gets from `sources[..., rank]`; -1 is nobody.

  Returns:
    The weights, and whether there is a source, both of shape
    `sources.shape[:-1]`.
  """
  receives = jnp.asarray(sources >= 0)[..., rank]
  if row is not None:
    picked = jnp.asarray(np.maximum(sources, 0))[..., rank]
    return row.astype(_dtypes.real(dtype))[picked], receives
  table = topology.mixing_matrix[np.arange(topology.size), sources]
  return _at(np.where(sources >= 0, table, 0.0), rank, dtype), receives


def _at(table: np.ndarray, rank: Any, dtype: Any) -> jax.Array:
  """This rank's entry of a table, rounded once to the accumulation dtype."""
  return jnp.asarray(table.astype(_dtypes.real(dtype)))[..., rank]


# Between processes: the rules of the primitive.


class Weighting(enum.IntEnum):
  """Where the weights of a call come from; numbered as in neighbor.cc."""

  GRAPH = 0  # the graph's table
  DESTINATION = 1  # y[i] = sum_j row_i[j] x[j]: receivers weight
  SOURCE = 2  # y[i] = sum_j row_j[i] x[j]: senders weight, the transpose


_TURNED = {
  Weighting.GRAPH: Weighting.GRAPH,
  Weighting.DESTINATION: Weighting.SOURCE,
  Weighting.SOURCE: Weighting.DESTINATION,
}


def _abstract_eval(*operands, fixed, graph, weighting, comm):
  del graph, weighting, comm
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in operands[fixed:]]


def _tangents(
  primitive, primals, results, tangents, *, fixed, weighting, **params
):
  """Linear in the leaves, and linear in the row of weights.

  y = sum_j row[j] x[j], so dy = sum_j row[j] dx[j] + sum_j drow[j] x[j]. The
  second sum needs the neighbors' leaves one by one, for its transpose
  drow[j] = <dy, x[j]>: each is fetched by a row that selects it.
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
  step, row, *leaves = primals
  for j in range(params["comm"].size):
    select = jnp.zeros_like(row).at[j].set(1)
    fetched = primitive.bind(
      step, select, *leaves, fixed=fixed, weighting=weighting, **params
    )
    for i, x in enumerate(fetched):
      term = drow[j].astype(_dtypes.real(x.dtype)) * x
      out[i] = ad.add_tangents(out[i], term.astype(x.dtype))
  return out


def _transpose(cotangents, *operands, fixed, graph, weighting, comm):
  # The adjoint of x -> W x is ct -> W.T ct: every edge turns around, and with
  # runtime weights the rank that weighted what it got weights what it sends.
  return neighbor_allreduce_p.bind(
    *operands,
    *cotangents,
    fixed=fixed,
    graph=turned(graph),
    weighting=_TURNED[weighting],
    comm=comm,
  )


@functools.lru_cache(maxsize=1024)
def turned(graph):
  """The graph with every edge turned around."""
  return graph.transpose()


def _attributes(mode, *leaves, graph, weighting, comm):
  del leaves
  return _ffi_attributes.numbered(
    "neighbor_allreduce",
    mode,
    {
      "context": np.int64(comm.context),
      "graph": np.int64(_ffi_attributes.fingerprint(graph)),
      "weighting": np.int64(weighting),
      **_ffi_attributes.table(graph, comm.rank),
    },
  )


# On GPUs: one exchange into slots, and their weighted sum.


def _send(mode, fixed, leaves, *, graph, weighting, comm):
  rounds = _nccl.rounds_of(graph, comm.rank)
  packed = _nccl.Packing(leaves).pack(leaves)
  scales = weighting is Weighting.SOURCE
  if scales:
    step, row = fixed
    slots = max(len(destinations) for _, destinations in rounds)
    table = np.zeros((len(rounds), slots), np.int32)
    for t, (_, destinations) in enumerate(rounds):
      table[t, : len(destinations)] = destinations
    packed = _nccl.scaled(packed, row[_nccl.at_step(table, step)])
  return _nccl.exchange(
    "neighbor_allreduce",
    mode,
    comm,
    fixed[0],
    packed,
    rounds,
    variant=(_ffi_attributes.fingerprint(graph), int(weighting)),
    like=leaves,
    apart=scales,
  )


def _weigh(fixed, *, graph, weighting, comm):
  given = None
  if weighting is not Weighting.GRAPH:
    row = fixed[1]
    given = (row[comm.rank], row, weighting is Weighting.SOURCE)
  slots = _slots(graph=graph, comm=comm)
  return _nccl.row_of_graph(graph, comm.rank, fixed[0], slots, given)


def _slots(*, graph, comm, **params):
  del params
  return _nccl.slots_of(_nccl.rounds_of(graph, comm.rank))


neighbor_allreduce_p = _primitive.define(
  "neighbor_allreduce",
  abstract_eval=_abstract_eval,
  attributes=_attributes,
  tangents=_tangents,
  transpose=_transpose,
  in_place=True,
  on_gpus=_nccl.OnGpus(
    send=_send,
    received=lambda results, slots: _nccl.Packing(results).avals(slots),
    finish=_nccl.average,
    weigh=_weigh,
    static=_slots,
  ),
)
