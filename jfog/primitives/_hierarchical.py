"""Averages inside and between machines; all ranks share the traffic between."""

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
  _neighbor_allreduce,
  _operation,
  _primitive,
  _pytree,
  _weighted_sum,
)
from jfog.primitives._allgather import allgather
from jfog.primitives._allreduce import allreduce
from jfog.primitives._operation import Operation
from jfog.primitives._peers import PackedPeers, Peers, pack
from jfog.primitives.nccl._hierarchical import HierarchicalNeighborAllreduce
from jfog.runtime import Communicator, resolve
from jfog.topology import Schedule, Topology
from jfog.topology._neighbor_table import neighbor_table

_NAME = "hierarchical_neighbor_allreduce"


def _pack(peers: Peers, comm: Communicator) -> PackedPeers:
  """Peers among the machines as operands, checked."""
  if comm.backend == "mesh":
    raise ValueError(
      f"{_NAME}: Peers describe one machine, and on a mesh all ranks run one "
      f"program; pass a Topology or a Schedule."
    )
  return pack(peers, comm.machines, f"{_NAME} between machines")


@functools.partial(_operation.operation, pack={Peers: _pack})
def hierarchical_neighbor_allreduce(
  x: Any,
  machine_graph: Topology | Schedule | Peers,
  step: Any = None,
  *,
  comm: Communicator | None = None,
) -> Any:
  """Averages `x` inside each machine, and the machines with their neighbors.

  With `m[a]` the mean of `x` over the ranks of machine a, every rank of machine
  a gets `y[a] = sum_b W[a, b] m[b]`: `neighbor_allreduce` on
  `jfog.topology.hierarchical(machine_graph, local_size)`, with less traffic
  between machines. Each of the `local_size` ranks of a machine is responsible
  for one part of the elements. It gets that part from the ranks of its machine,
  exchanges its mean with the rank of the same local rank on the neighboring
  machines, and gives the result to the ranks of its machine. So every rank sends
  `1 / local_size` of the bytes of `x` to each neighboring machine. On MPI the
  parts travel in segments, of which several are in flight in different steps, in
  one operation.

  Linear in `x`; the transpose is the same operation on the transposed machine
  graph.

  With `Peers`, whose ranks are machines, machine a chooses its neighbors by
  itself:

      y[a] = self_weight[a] m[a] + sum_b src_weights[a][b] dst_weights[b][a] m[b]

  This is three operations, one after the other: an allreduce inside the machine,
  the average of parts between machines, and an allgather inside. Every rank
  sends as much between machines as with a graph, and the `_start` form returns
  when the average is computed.

  Args:
    x: a pytree of float or complex arrays, of equal shapes and dtypes on all
      ranks; of any number of elements.
    machine_graph: a `Topology` or a `Schedule` whose ranks are the machines,
      equal on all ranks; or between processes `Peers`, equal on the ranks of a
      machine.
    step: the index into a `Schedule`, as in `neighbor_allreduce`.
    comm: the communicator; by default the one in reach, see `jfog.init`. Its
      machines are those that share memory, or pretended ones
      (`jfog.init(local_size=)`, `jfog.simulate(local_size=)`), or on a mesh the
      first of two axes.

  Returns:
    A pytree like `x`, in shapes and dtypes, equal on all ranks of a machine. The
    mean and the average are each summed in float32 for floats of at most 32
    bits, and rounded once.

  Raises:
    ValueError: if the graph has not as many ranks as there are machines, the
      machines hold different numbers of ranks, a schedule comes without a step,
      or Peers name a machine that is not there, or are used on a mesh.
    TypeError: for integer or bool leaves, or a graph of another type.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> machines = jfog.topology.ring(2)
    >>> average = lambda x: jfog.hierarchical_neighbor_allreduce(x, machines)
    >>> x = jnp.array([0.0, 2.0, 4.0, 8.0])
    >>> jfog.simulate(average, 4, local_size=2)(x)
    Array([3.5, 3.5, 3.5, 3.5], dtype=float32)

  Source: `hierarchical_neighbor_allreduce` of BlueFog, which sends all of `x`
  from one rank of each machine.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, _NAME)
  _pytree.require_inexact(leaves, names, _NAME)
  if comm.is_native:
    comm.require_equal_machines(_NAME)  # type: ignore[attr-defined]
  if isinstance(machine_graph, (Peers, PackedPeers)):
    peers = machine_graph
    peers = _pack(peers, comm) if isinstance(peers, Peers) else peers
    results = _average_of_peers(leaves, peers, comm) if leaves else []
    return Operation(leaves, structure, results)
  graph = _check_machine_graph(machine_graph, comm)
  index = _ffi_attributes.step_index(graph, step, _NAME)
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: _on_mesh(leaves, graph, index, comm),
    primitive=hierarchical_neighbor_allreduce_p,
    fixed=(index,),
    operands=lambda: _pytree.to_native(leaves, names, _NAME),
    params={"graph": graph, "comm": comm},
  )


hierarchical_neighbor_allreduce_start = _operation.start_of(
  hierarchical_neighbor_allreduce,
  """>>> machines = jfog.topology.ring(2)
    >>> average = lambda x: jfog.wait(
    ...     jfog.hierarchical_neighbor_allreduce_start(x, machines))
    >>> x = jnp.array([0.0, 2.0, 4.0, 8.0])
    >>> jfog.simulate(average, 4, local_size=2)(x)
    Array([3.5, 3.5, 3.5, 3.5], dtype=float32)""",
)


def _check_machine_graph(graph: Any, comm: Communicator) -> Topology | Schedule:
  """Checks that the ranks of the graph are the machines."""
  machines = comm.machine_size
  if isinstance(graph, (Topology, Schedule)) and graph.size != machines:
    remedy = f"make the graph with size={machines}"
    if comm.size == 1:
      remedy = (
        f"run {graph.size} machines of n ranks, by jfog.simulate(fun, "
        f"{graph.size} * n, local_size=n) or `jfog run`"
      )
    raise ValueError(
      f"{_NAME}: the machine graph has {graph.size} ranks, but there are "
      f"{machines} machines of {comm.local_size} ranks; {remedy}, or use "
      f"neighbor_allreduce for a graph of ranks."
    )
  return _ffi_attributes.check_graph(graph, machines, _NAME)


def _average_of_peers(
  leaves: Sequence[jax.Array], peers: PackedPeers, comm: Communicator
) -> list[jax.Array]:
  """The mean inside the machine, averaged part by part with peers' machines."""
  inside = comm.local
  means = allreduce(list(leaves), comm=inside)
  parts = [_padded(mean, inside.size)[inside.rank] for mean in means]
  parts = _neighbor_allreduce.neighbor_allreduce(
    parts, peers, comm=comm.machines
  )
  wholes = allgather(parts, comm=inside)
  return [
    whole[: leaf.size].reshape(leaf.shape)
    for whole, leaf in zip(wholes, leaves, strict=True)
  ]


def _padded(x: jax.Array, parts: int) -> jax.Array:
  """The elements in rows, one for each part, with zeros up to a whole row."""
  width = -(-x.size // parts)
  return jnp.pad(x.ravel(), (0, parts * width - x.size)).reshape(parts, width)


# The mesh: an all_to_all inside the machine, the average of neighbors between
# machines, an all_gather inside.


def _on_mesh(
  leaves: Sequence[jax.Array], graph: Topology | Schedule, index: Any, comm: Any
) -> list[jax.Array]:
  inside = comm.local.axes if comm.local.backend == "mesh" else ()
  across = comm.machines.axes if comm.machines.backend == "mesh" else ()
  if comm.backend == "mesh":
    leaves = [_compat.varying(leaf, comm.axes) for leaf in leaves]
  parts = [_mean_part(leaf, inside, comm) for leaf in leaves]

  def mix(topology: Topology, parts: Sequence[jax.Array]) -> list[jax.Array]:
    return _neighbor_allreduce.mix_on_mesh(
      parts, topology, None, across, comm.machines.rank
    )

  if isinstance(index, jax.Array):
    # A switch with collectives in its branches has to take the same branch on
    # all ranks, which `uniform` shows to XLA.
    branches = [functools.partial(mix, topology) for topology in graph.rounds]
    parts = lax.switch(_mesh.uniform(index, comm), branches, parts)
  else:
    parts = mix(graph.rounds[index], parts)
  return [
    _join(part, leaf, inside) for part, leaf in zip(parts, leaves, strict=True)
  ]


def _mean_part(x: jax.Array, inside: tuple[str, ...], comm: Any) -> jax.Array:
  """This local rank's part of the mean over the machine."""
  if not inside or x.size == 0:
    return x
  (axis,) = inside
  # Rank r of the machine receives the r-th part of all: a reduce-scatter whose
  # sum has the order of ranks, and so the same bits everywhere.
  parts = _padded(x, comm.local.size)  # `_join` cuts the zeros off
  return _weighted_sum.mean(lax.all_to_all(parts, axis, 0, 0))


def _join(
  part: jax.Array, like: jax.Array, inside: tuple[str, ...]
) -> jax.Array:
  if not inside or like.size == 0:
    return part
  (axis,) = inside
  return lax.all_gather(part, axis, tiled=True)[: like.size].reshape(like.shape)


# Between processes: the rules of the primitive.


def _transpose(
  cotangents: Sequence[Any],
  *operands: Any,
  fixed: int,
  graph: Topology | Schedule,
  comm: Any,
) -> Sequence[jax.Array]:
  # With J the mean inside a machine, y = (W (x) J) x. J is symmetric, so the
  # adjoint is W.T (x) J: the same operation on the transposed machine graph.
  return hierarchical_neighbor_allreduce_p.bind(
    *operands,
    *cotangents,
    fixed=fixed,
    graph=_neighbor_allreduce.transposed(graph),
    comm=comm,
  )


def _attributes(
  *leaves: Any, graph: Topology | Schedule, comm: Any
) -> dict[str, Any]:
  del leaves
  members = comm.ranks_of(comm.machine_rank)
  place = members.index(comm.rank)
  return {
    "context": np.int64(comm.context),
    "graph": np.int64(_ffi_attributes.fingerprint(graph)),
    "members": np.array(members, np.int32),
    **neighbor_table(graph).attributes(
      comm.machine_rank,
      # Between machines each rank talks to those in the same place, so that no
      # rank carries the traffic of its whole machine.
      lambda machine: comm.ranks_of(machine)[place],
    ),
  }


hierarchical_neighbor_allreduce_p = _primitive.define(
  _NAME,
  attributes=_attributes,
  transpose=_transpose,
  in_place=True,
  on_gpus=HierarchicalNeighborAllreduce(),
)
