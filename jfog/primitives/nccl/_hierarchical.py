"""`hierarchical_neighbor_allreduce` on GPUs: exchanges inside and across machines."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _dtypes
from jfog.primitives import _ffi_attributes, _weighted_sum
from jfog.primitives._weighted_sum import Row
from jfog.primitives.nccl import _exchange
from jfog.primitives.nccl._lowering import Mode, Rendition, Send
from jfog.primitives.nccl._packing import Packing
from jfog.topology import Schedule, Topology

_NAME = "hierarchical_neighbor_allreduce"


class HierarchicalNeighborAllreduce(Rendition):
  """The steps of the mesh, on the communicators inside and across machines.

  The split form cannot run XLA code between its NCCL calls, so NCCL takes the
  mean inside the machine, in 32 bits or more, and every rank of a machine gets
  all buffers that the machine has received. `decode` averages them on each rank.
  """

  def blocking(
    self,
    call: Callable[..., list[Any]],
    results: Sequence[Any],
    scalars: Sequence[Any],
    leaves: Sequence[Any],
    **params: Any,
  ) -> Sequence[Any]:
    """A reduce-scatter inside, an exchange across, an allgather inside."""
    del results
    return _steps(call, scalars, leaves, **params)

  def encode(
    self,
    mode: Mode,
    scalars: Sequence[Any],
    leaves: Sequence[jax.Array],
    **params: Any,
  ) -> Send:
    """The call of the split form."""
    return _encode_start(mode, scalars, leaves, **params)

  def received(
    self, results: Sequence[Any], static: tuple[int, int]
  ) -> Sequence[Any]:
    """Parts of all ranks of the machine: the mean, and a slot per source."""
    size, slots = static
    split = jax.eval_shape(lambda *x: _wide_split(x, size), *results)
    return [
      jax.ShapeDtypeStruct((size, 1 + slots, x.shape[1]), x.dtype)
      for x in split
    ]

  def decode(
    self, own: Any, weights: Row, received: Any, static: tuple[int, int]
  ) -> Sequence[Any]:
    """The average of the machines, in the dtypes of the leaves."""
    del static
    return _average_parts(own, weights, received)

  def weights(
    self, scalars: Sequence[Any], *, graph: Topology | Schedule, comm: Any
  ) -> Row:
    """The row of this rank's machine."""
    return _exchange.row_of_graph(graph, comm.machine_rank, scalars[0])

  def static(self, *, graph: Topology | Schedule, comm: Any) -> tuple[int, int]:
    """The ranks of a machine, and the slots of a machine."""
    rounds = _exchange.rounds_of(graph, comm.machine_rank)
    return comm.local_size, _exchange.slots_of(rounds)


def _steps(
  call: Callable[..., list[Any]],
  scalars: Sequence[Any],
  leaves: Sequence[jax.Array],
  *,
  graph: Topology | Schedule,
  comm: Any,
) -> list[jax.Array]:
  packing = Packing.of(leaves)
  vectors = packing.pack(leaves)
  # Each rank is responsible for one part of the vector: links between machines
  # carry every element once for each machine, not once for each rank.
  size, place = comm.local_size, comm.local_rank
  parts = vectors
  split: list[jax.Array] = []  # of each vector, a row for each rank
  if size > 1:
    # Reduce-scatter inside the machine: this rank averages its own part.
    split = [_split(x, size) for x in vectors]
    # Row r of the split goes to rank r; what comes back are the others'
    # versions of this rank's row.
    others = [r for r in range(size) if r != place]
    theirs = np.array(others, np.int32)
    send = _exchange_parts(
      comm.local,
      0,
      [x[theirs] for x in split],
      [(others, others)],
      graph,
      like=leaves,
      apart=True,
    )
    received = call(send, _avals(split, size - 1))
    parts = [
      # In the order of ranks: the same sum, bit for bit, as on a mesh.
      _weighted_sum.mean(jnp.insert(got, place, x[place], axis=0))
      for x, got in zip(split, received, strict=True)
    ]
  if comm.machine_size > 1:
    # The part goes to the ranks of the same local rank on neighbor machines.
    rounds = _exchange.rounds_of(graph, comm.machine_rank)
    slots = _exchange.slots_of(rounds)
    send = _exchange_parts(
      comm.machines, scalars[0], parts, rounds, graph, like=leaves
    )
    row = _exchange.row_of_graph(graph, comm.machine_rank, scalars[0])
    received = call(
      send, [jax.ShapeDtypeStruct((slots, *x.shape), x.dtype) for x in parts]
    )
    parts = _exchange.average(parts, row, received, slots)
  else:
    # One machine: no exchange, but its self weight still applies.
    row = _exchange.row_of_graph(graph, 0, scalars[0])
    parts = _exchange.average(parts, row, [x[None][:0] for x in parts], 0)
  if size > 1:
    # Allgather of the parts inside the machine.
    attributes = _exchange.common_attributes(
      Mode.WHOLE,
      comm.local,
      _NAME,
      _ffi_attributes.fingerprint(graph),
      leaves,
    )
    received = call(Send("allgather", attributes, parts), _avals(split, size))
    parts = [
      y.reshape(-1)[: len(x)] for x, y in zip(vectors, received, strict=True)
    ]
  return packing.unpack(parts)


def _exchange_parts(
  comm: Any,
  step: Any,
  parts: Sequence[jax.Array],
  rounds: Sequence[Any],
  graph: Topology | Schedule,
  **kwargs: Any,
) -> Send:
  # Distinguishes it from a neighbor_allreduce on the same graph.
  variant = (_ffi_attributes.fingerprint(graph), "hierarchical")
  return _exchange.exchange(
    _NAME,
    Mode.WHOLE,
    comm,
    step,
    parts,
    rounds,
    variant=variant,
    **kwargs,
  )


def _split(x: jax.Array, size: int) -> jax.Array:
  """One row for each rank of the machine, the last one with zeros behind."""
  return jnp.pad(x, (0, -len(x) % size)).reshape(size, -1)


def _avals(split: Sequence[Any], rows: Any) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype) for x in split]


def _encode_start(
  mode: Mode,
  scalars: Sequence[Any],
  leaves: Sequence[jax.Array],
  *,
  graph: Topology | Schedule,
  comm: Any,
) -> Send:
  rounds = _exchange.rounds_of(graph, comm.machine_rank)
  # A part of one rank has no communicator of its own: -1 stands for none.
  inside = getattr(comm.local, "context", -1)
  across = getattr(comm.machines, "context", -1)
  if comm.machine_size == 1:
    # As many rounds as the graph has, all empty: the step still selects one.
    across, rounds = -1, [([], [])] * len(rounds)
  send = _exchange.exchange(
    "hierarchical_start",
    mode,
    comm,
    scalars[0],
    [x.reshape(-1) for x in _wide_split(leaves, comm.local_size)],
    rounds,
    variant=_ffi_attributes.fingerprint(graph),
    like=leaves,
    operation=_NAME,
  )
  send.attributes["local_context"] = np.int64(
    inside if comm.local_size > 1 else -1
  )
  send.attributes["machines_context"] = np.int64(across)
  return send


def _wide_split(leaves: Sequence[jax.Array], size: int) -> list[jax.Array]:
  """The packed leaves in rows, complex ones as pairs, of 32 bits or more."""
  vectors = []
  for x in Packing.of(leaves).pack(leaves):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      # The handler sums on the GPU by NCCL, which has no complex dtypes.
      x = jnp.stack([x.real, x.imag], axis=1).reshape(-1)
    wide = x.astype(_dtypes.accumulation(x.dtype))
    vectors.append(_split(wide, size))
  return vectors


def _average_parts(
  own: Sequence[jax.Array], row: Any, received: Sequence[jax.Array]
) -> list[jax.Array]:
  packing = Packing.of(own)
  mixed = _weighted_sum.combine(
    [x[:, 0] for x in received],
    [jnp.moveaxis(x[:, 1:], 1, 0) for x in received],
    *row,
  )
  vectors = []
  for x, size, dtype in zip(mixed, packing.sizes, packing.dtypes, strict=True):
    x = x.reshape(-1)
    if jnp.issubdtype(dtype, jnp.complexfloating):
      pairs = x[: 2 * size].reshape(size, 2)
      x = lax.complex(pairs[:, 0], pairs[:, 1])
    vectors.append(x[:size].astype(dtype))
  return packing.unpack(vectors)
