"""Neighbor gathers: the values of each rank's in-neighbors, one by one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _compat
from jfog.primitives import (
  _ffi_attributes,
  _mesh,
  _operation,
  _primitive,
  _pytree,
)
from jfog.primitives._operation import Operation
from jfog.primitives._peers import Peers, check_ranks
from jfog.primitives.nccl._neighbor_allgather import (
  NeighborAllgather,
  NeighborAllgatherTranspose,
)
from jfog.runtime import Axis, Communicator, is_simulated, resolve, sent
from jfog.topology import Schedule, Topology
from jfog.topology._edge_coloring import permutations
from jfog.topology._neighbor_table import csr_attributes, neighbor_table

_NAME = "neighbor_allgather"


@_operation.operation
def neighbor_allgather(
  x: Any,
  graph: Topology | Schedule | Peers,
  step: Any = None,
  *,
  axis_sizes: Sequence[int] | None = None,
  pad: bool = False,
  comm: Communicator | None = None,
) -> Any:
  """Concatenates the values of this rank's in-neighbors along axis 0.

  Computes `y[i] = concatenate([x[j] for j in sources of i])`, the sources being
  the in-neighbors in ascending order, or the keys of `Peers.src_weights` in
  their order. The own value is not part of it, and weights are not used. A
  scalar leaf counts as one of shape (1,).

  Each rank sends all its leaves in one message to each out-neighbor and receives
  one from each in-neighbor, and waits for those alone. The transpose sends the
  cotangents back: every rank gets the sum over its out-neighbors of those of
  its own part.

  Args:
    x: a pytree of arrays, of equal dtypes on all ranks and equal shapes except
      for the lengths in `axis_sizes`.
    graph: a `Topology` or a `Schedule`, equal on all ranks, of the
      communicator's size; or between processes `Peers`.
    step: the index into a `Schedule`, as in `neighbor_allreduce`.
    axis_sizes: the length of axis 0 on every rank of the communicator, one int
      for each, where they differ; the same for all leaves. On a mesh all ranks
      have one shape, so there they must be equal. They are static: new lengths
      compile the program again (some 20 ms). Where lengths change from call to
      call, pad the leaves to one length and gather the length as one more leaf.
    pad: whether the result has the length of the longest one of any rank (and,
      for a traced step, of any round), with zeros behind the last part. Needed
      where ranks have different numbers of in-neighbors on a mesh, and where
      the rounds of a traced step give one rank different lengths, because a
      shape is known when a program is compiled.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A pytree like `x` whose leaves have the sources' total length along axis 0;
    a length of 0 where there is no source.

  Raises:
    ValueError: if the graph and the communicator have different sizes, a
      schedule comes without a step, lengths differ where they may not, or
      `axis_sizes` has another number of entries than ranks or does not give
      this rank's own length.
    TypeError: for a `graph` of another type, or a step that is not an integer.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(4)
    >>> gather = lambda x: jfog.neighbor_allgather(x, graph)
    >>> jfog.simulate(gather, 4)(jnp.array([[0], [1], [2], [3]]))
    Array([[1, 3],
           [0, 2],
           [1, 3],
           [0, 2]], dtype=int32)

  Source: `neighbor_allgather` of BlueFog.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, _NAME)
  leaves = [jnp.atleast_1d(leaf) for leaf in leaves]
  sizes = tuple(
    _pytree.axis_sizes(leaf, name, axis_sizes, comm, _NAME)
    for leaf, name in zip(leaves, names, strict=True)
  )
  if isinstance(graph, Peers):
    check_ranks(graph, comm, _NAME)
    rounds = ((tuple(graph.src_weights), tuple(graph.dst_weights)),)
    # Peers have one round and no graph: nothing to agree on beyond the edges.
    index, first, fingerprint, table = 0, 0, 0, None
  else:
    graph = _ffi_attributes.check_graph(graph, comm.size, _NAME)
    index = _ffi_attributes.step_index(graph, step, _NAME)
    fingerprint = _ffi_attributes.fingerprint(graph)
    # A known step needs its own round only.
    traced = isinstance(index, jax.Array)
    first = 0 if traced else index
    table = graph.rounds if traced else (graph.rounds[index],)
    index = index if traced else 0
    _check_lengths(table, axis_sizes, pad, comm)
    # On a mesh the rank is traced; without `pad` all ranks have equally many
    # in-neighbors, so those of rank 0 give the length.
    rank = 0 if comm.backend == "mesh" else comm.rank
    rounds = tuple((t.in_neighbors(rank), t.out_neighbors(rank)) for t in table)
  totals = tuple(_total(table, rounds, own, pad) for own in sizes)
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: _on_mesh(leaves, table, index, comm),
    primitive=neighbor_allgather_p,
    fixed=(index,),
    operands=lambda: _pytree.to_native(leaves, names, _NAME),
    params={
      "rounds": rounds,
      "first": first,
      "fingerprint": fingerprint,
      "axis_sizes": sizes,
      "totals": totals,
      "check": isinstance(graph, Peers) and graph.check,
      "comm": comm,
    },
  )


neighbor_allgather_start = _operation.start_of(
  neighbor_allgather,
  """>>> graph = jfog.topology.ring(2)
    >>> gather = lambda x: jfog.wait(jfog.neighbor_allgather_start(x, graph))
    >>> jfog.simulate(gather, 2)(jnp.array([[0], [1]]))
    Array([[1],
           [0]], dtype=int32)""",
)


def _check_lengths(
  table: Sequence[Topology],
  axis_sizes: Sequence[Any] | None,
  pad: bool,
  comm: Any,
) -> None:
  """Refuses results whose shape is not known when a program is compiled."""
  if pad:
    return
  if comm.backend == "mesh":
    degrees = [
      len(t.in_neighbors(rank)) for t in table for rank in range(t.size)
    ]
    if len(set(degrees)) > 1:
      raise ValueError(
        f"{_NAME}: the ranks have from {min(degrees)} to {max(degrees)} "
        f"in-neighbors, and on a mesh all results have one shape; pass "
        f"pad=True for results of the longest, with zeros behind."
      )
    return
  # Without axis_sizes all parts have one length, and counts compare as lengths
  # do.
  ones = (1,) * comm.size if axis_sizes is None else tuple(axis_sizes)
  lengths = {sum(ones[j] for j in t.in_neighbors(comm.rank)) for t in table}
  if len(lengths) > 1:
    raise ValueError(
      f"{_NAME}: with a traced step the rounds give rank {comm.rank} results of "
      f"different lengths; pass a known step, or pad=True for results of the "
      f"longest, with zeros behind."
    )


def _total(
  table: Sequence[Topology] | None,
  rounds: Sequence[Any],
  sizes: Sequence[int],
  pad: bool,
) -> int:
  """The length of the result's axis 0."""
  if pad and table is not None:
    return max(
      sum(sizes[j] for j in t.in_neighbors(rank))
      for t in table
      for rank in range(t.size)
    )
  return sum(sizes[j] for j in rounds[0][0])


# The mesh: permutations of lax on devices, a gather on virtual ranks.


def _on_mesh(
  leaves: Sequence[jax.Array],
  table: Sequence[Topology] | None,
  index: Any,
  comm: Communicator,
) -> list[jax.Array]:
  if not isinstance(comm, Axis):
    return [leaf[:0] for leaf in leaves]  # a world of one has no neighbors
  assert table is not None  # check_ranks refuses Peers on a mesh
  leaves = [_compat.varying(leaf, comm.axes) for leaf in leaves]
  # All rounds and ranks have results of one shape, that of the most in-neighbors.
  slots = max(len(t.in_neighbors(i)) for t in table for i in range(t.size))
  are_virtual = _mesh.are_virtual(comm.axes)

  def gather(
    topology: Topology, leaves: Sequence[jax.Array]
  ) -> list[jax.Array]:
    results = []
    for k, x in enumerate(leaves):
      if slots == 0:
        results.append(x[:0])
        continue
      if are_virtual:
        parts = _picked(x, topology, slots, comm, k)
      else:
        parts = _permuted(x, topology, slots, comm)
      results.append(parts.reshape(slots * len(x), *x.shape[1:]))
    return results

  if not isinstance(index, jax.Array):
    return gather(table[0], leaves)
  branches = [functools.partial(gather, topology) for topology in table]
  return lax.switch(_mesh.uniform(index, comm), branches, leaves)


def _picked(
  x: jax.Array, topology: Topology, slots: int, comm: Axis, leaf: int
) -> jax.Array:
  """On virtual ranks: each picks its in-neighbors' values."""
  table = neighbor_table(topology)
  # The table of this round may have fewer slots than the longest round.
  behind = [(0, 0), (0, slots - table.sources.shape[2])]
  sources = jnp.asarray(np.pad(table.sources[0], behind))[comm.rank]
  present = jnp.asarray(np.pad(table.present[0], behind))[comm.rank]
  gathered = _mesh.gather(x, comm.axes)
  if is_simulated(comm.axes):
    gathered = sent(
      gathered,
      comm.rank,
      lambda: jnp.asarray(topology.mixing_matrix)[comm.rank],
      leaf,
      _NAME,
    )
  values = gathered[sources]
  is_part = present.reshape(slots, *[1] * x.ndim)
  return jnp.where(is_part, values, jnp.zeros_like(values))


def _permuted(
  x: jax.Array, topology: Topology, slots: int, comm: Any
) -> jax.Array:
  """On devices: one `ppermute` for each group of edges that fits in one."""
  # ppermute yields zeros on ranks without a source in this group: those write
  # to one more slot, which is cut off.
  parts = jnp.zeros((slots + 1, *x.shape), x.dtype)
  parts = _compat.varying(parts, comm.axes)
  for group in permutations(topology):
    slot = np.full(topology.size, slots)
    for src, dst in group:
      slot[dst] = list(topology.in_neighbors(dst)).index(src)
    value = lax.ppermute(x, comm.axes, group)
    parts = parts.at[jnp.asarray(slot)[comm.rank]].set(value)
  return parts[:slots]


# Between processes: the rules of the primitives. Parameters for each leaf:
# `axis_sizes`, its length on every rank, and `totals`, that of its result.


def _abstract_eval(
  *operands: Any, fixed: int, totals: Sequence[int], **params: Any
) -> list[jax.core.ShapedArray]:
  del params
  return [
    jax.core.ShapedArray((total, *x.shape[1:]), x.dtype)
    for x, total in zip(operands[fixed:], totals, strict=True)
  ]


def _transpose_abstract_eval(
  *operands: Any,
  fixed: int,
  axis_sizes: Sequence[Any],
  comm: Any,
  **params: Any,
) -> list[jax.core.ShapedArray]:
  del params
  return [
    jax.core.ShapedArray((sizes[comm.rank], *x.shape[1:]), x.dtype)
    for x, sizes in zip(operands[fixed:], axis_sizes, strict=True)
  ]


# Linear; leaves with a zero tangent take their lengths along out of it.
_tangents = functools.partial(
  _primitive.linear_tangents, per_leaf=("axis_sizes", "totals")
)


def _attributes(
  *leaves: Any,
  rounds: Sequence[Any],
  first: int,
  fingerprint: int,
  axis_sizes: Sequence[Any],
  totals: Sequence[int],
  check: bool,
  comm: Any,
) -> dict[str, Any]:
  # The attributes of a graph in CSR form, whose weights are not read here.
  rows = [(dict.fromkeys(sources, 1.0), to) for sources, to in rounds]
  weights, difference = [0.0] * len(rows), [False] * len(rows)
  return {
    "context": np.int64(comm.context),
    "graph": np.int64(fingerprint),
    "check": np.int64(check),
    "first": np.int64(first),
    "rows": np.array(axis_sizes, np.int64).ravel(),
    "width": np.array(
      [np.prod(x.shape[1:], dtype=np.int64) for x in leaves], np.int64
    ),
    "total": np.array(totals, np.int64),
    **csr_attributes(rows, weights, difference),
  }


def _to_transpose(
  cotangents: Sequence[Any], *operands: Any, **params: Any
) -> Sequence[jax.Array]:
  # Cotangents travel against the edges: each in-neighbor gets its own part back.
  return neighbor_allgather_transpose_p.bind(*operands, *cotangents, **params)


def _from_transpose(
  cotangents: Sequence[Any], *operands: Any, **params: Any
) -> Sequence[jax.Array]:
  return neighbor_allgather_p.bind(*operands, *cotangents, **params)


neighbor_allgather_p = _primitive.define(
  _NAME,
  abstract_eval=_abstract_eval,
  attributes=_attributes,
  tangents=_tangents,
  transpose=_to_transpose,
  batch_axis=-1,  # axis 0 is concatenated
  on_gpus=NeighborAllgather(),
)

neighbor_allgather_transpose_p = _primitive.define(
  f"{_NAME}_transpose",
  abstract_eval=_transpose_abstract_eval,
  attributes=_attributes,
  tangents=_tangents,
  transpose=_from_transpose,
  batch_axis=-1,
  on_gpus=NeighborAllgatherTranspose(),
)
