"""The exact average in finitely many rounds, each an exchange with few peers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _compat, _dtypes, _validation
from jfog.primitives import (
  _allreduce,
  _ffi_attributes,
  _mesh,
  _neighbor_allreduce,
  _operation,
  _primitive,
  _pytree,
  nccl,
)
from jfog.primitives._operation import Operation
from jfog.runtime import Communicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology
from jfog.topology._neighbor_table import (
  csr_attributes,
  digest,
  neighbor_table,
)

_NAME = "finite_time_average"


@_operation.operation
def finite_time_average(
  x: Any,
  graph: Topology | Schedule | ExactAverage,
  *,
  comm: Communicator | None = None,
) -> Any:
  """Averages `x` over all ranks, in rounds of exchanges with neighbors.

  Computes `y[i] = (x[0] + ... + x[n-1]) / n` as `W_{r-1} ... W_0 x`, with the
  first r rounds of a schedule whose product is the exact average; or by the
  protocol of `jfog.topology.ceca`. In each round every rank exchanges one
  message with each of its neighbors of that round and waits for those only. On MPI all rounds are one operation.

  Linear in `x`, and its own transpose.

  Args:
    x: a pytree of float or complex arrays, of equal shapes and dtypes on all
      ranks.
    graph: a graph that reaches the exact average, equal on all ranks:
      `hyper_hypercube`, `base_k`, `simple_base`, `ceca`, `fully_connected`, and
      `one_peer_exponential` for a power of 2.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A pytree like `x`, in shapes and dtypes, equal on all ranks up to rounding.
    Floats of at most 32 bits are averaged, and travel, in float32.

  Raises:
    ValueError: if the graph does not reach the exact average, or has another
      size than the communicator.
    TypeError: for integer or bool leaves, or a graph of another type.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ceca(3)
    >>> average = lambda x: jfog.finite_time_average(x, graph)
    >>> jfog.simulate(average, 3)(jnp.array([0.0, 2.0, 7.0]))
    Array([3., 3., 3.], dtype=float32)

  Source: Takezawa et al., "Beyond Exponential Graph", 2023, arXiv 2305.11420;
  Ding et al., "DSGD-CECA", 2023, arXiv 2306.00256.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, _NAME)
  _pytree.require_inexact(leaves, names, _NAME)
  rounds = _rounds(graph, comm)

  def operands() -> list[jax.Array]:
    # Once for all rounds: leaves of 16 bits would be rounded in each of them.
    wide = [x.astype(_dtypes.accumulation(x.dtype)) for x in leaves]
    return _pytree.to_native(wide, names, _NAME)

  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: [_on_mesh(x, graph, rounds, comm) for x in leaves],
    primitive=finite_time_average_p,
    operands=operands,
    params={"graph": graph, "comm": comm},
  )


finite_time_average_start = _operation.start_of(
  finite_time_average,
  """>>> graph = jfog.topology.ceca(3)
    >>> average = lambda x: jfog.wait(jfog.finite_time_average_start(x, graph))
    >>> jfog.simulate(average, 3)(jnp.array([0.0, 2.0, 7.0]))
    Array([3., 3., 3.], dtype=float32)""",
)


def _rounds(graph: Any, comm: Communicator) -> int:
  """The number of rounds until the exact average."""
  if not isinstance(graph, ExactAverage):
    _ffi_attributes.check_graph(graph, comm.size, _NAME)
    rounds = graph.rounds_to_exact_average()
    if rounds is None:
      raise ValueError(
        f"{_NAME}: {graph!r} does not reach the exact average in its period; "
        f"take jfog.topology.ceca(size), base_k(size, k) or "
        f"hyper_hypercube(size), or average with neighbor_allreduce."
      )
    return rounds
  if graph.size != comm.size:
    raise ValueError(_validation.other_size(graph.size, comm.size, _NAME))
  return len(graph)


# The mesh: round by round.


def _on_mesh(
  x: jax.Array,
  graph: Topology | Schedule | ExactAverage,
  rounds: int,
  comm: Any,
) -> jax.Array:
  axes = comm.axes if comm.backend == "mesh" else ()
  wide = x.astype(_dtypes.accumulation(x.dtype))
  if axes:
    wide = _compat.varying(wide, axes)
  if not isinstance(graph, ExactAverage):
    for topology in graph.rounds[:rounds]:
      (wide,) = _neighbor_allreduce.mix_on_mesh(
        [wide], topology, None, axes, comm.rank
      )
    return wide.astype(x.dtype)
  # `inclusive` is the sum over a range of ranks with this one, `exclusive` the
  # sum without it; every hop extends both by a received range.
  inclusive, exclusive = wide, jnp.zeros_like(wide)
  for hop in graph.rounds:
    sent = inclusive if hop.send_inclusive else exclusive
    received = _shifted(sent, hop.shift, axes, comm)
    inclusive, exclusive = inclusive + received, exclusive + received
  return (inclusive / graph.size).astype(x.dtype)


def _shifted(
  x: jax.Array, shift: int, axes: tuple[str, ...], comm: Any
) -> jax.Array:
  """The value of rank `rank - shift`, modulo the size."""
  if _mesh.are_virtual(axes):
    return _mesh.gather(x, axes)[(comm.rank - shift) % comm.size]
  return lax.ppermute(
    x, axes, [(i, (i + shift) % comm.size) for i in range(comm.size)]
  )


# Between processes: the rules of the primitive.


def _transpose(
  cotangents: Sequence[Any],
  *,
  fixed: int,
  graph: Topology | Schedule | ExactAverage,
  comm: Any,
) -> Sequence[jax.Array]:
  # The exact average is J = 11^T / n, which is symmetric.
  return finite_time_average_p.bind(
    *cotangents, fixed=fixed, graph=graph, comm=comm
  )


def _attributes(
  *leaves: Any,
  graph: Topology | Schedule | ExactAverage,
  comm: Any,
) -> dict[str, Any]:
  del leaves
  is_exact = isinstance(graph, ExactAverage)
  if is_exact:
    # The protocol has no matrices; its repr holds the size, which determines
    # it.
    fingerprint = digest(repr(graph).encode())
    table = csr_attributes(
      [
        (
          # One source and one destination, with weight 1: rounds add, and the
          # division by the size comes last.
          {(comm.rank - hop.shift) % comm.size: 1.0},
          [(comm.rank + hop.shift) % comm.size],
        )
        for hop in graph.rounds
      ],
      [1.0] * len(graph),
      [False] * len(graph),
    )
    inclusive = [hop.send_inclusive for hop in graph.rounds]
  else:
    fingerprint = _ffi_attributes.fingerprint(graph)
    rounds = graph.rounds_to_exact_average()
    assert rounds is not None  # _rounds refuses other graphs
    # Without the rounds behind the exact average, which would change nothing.
    table = neighbor_table(Schedule(graph.rounds[:rounds])).attributes(
      comm.rank
    )
    inclusive = [True] * rounds
  return {
    "context": np.int64(comm.context),
    "graph": np.int64(fingerprint),
    "exact": np.int64(is_exact),
    # An attribute may not be empty: one more element, which is never read.
    "inclusive": np.array([*inclusive, False], np.int32),
    **table,
  }


# On GPUs: an exchange for each round, each followed by its arithmetic in XLA. The
# split form cannot run XLA code between its NCCL calls, so it is an allreduce.


def _rounds_on_gpus(
  call: Callable[..., list[Any]],
  scalars: Sequence[Any],
  leaves: Sequence[jax.Array],
  *,
  graph: Topology | Schedule | ExactAverage,
  comm: Any,
) -> list[jax.Array]:
  del scalars
  packing = nccl.Packing.of(leaves)
  own = packing.pack(leaves)

  def exchanged(
    t: int, values: Sequence[jax.Array], rounds: Sequence[Any], slots: int
  ) -> list[Any]:
    send = nccl.exchange(
      _NAME,
      nccl.Mode.WHOLE,
      comm,
      0,
      values,
      rounds,
      # The round is a part of what ranks compare: a rank in another one fails
      # here and does not mix in its sums.
      variant=(repr(graph), t),
      like=leaves,
    )
    return call(send, packing.avals(slots))

  if isinstance(graph, ExactAverage):
    inclusive, exclusive = own, [jnp.zeros_like(x) for x in own]
    for t, hop in enumerate(graph.rounds):
      source = (comm.rank - hop.shift) % comm.size
      destination = (comm.rank + hop.shift) % comm.size
      sent = inclusive if hop.send_inclusive else exclusive
      received = exchanged(t, sent, [([source], [destination])], 1)
      inclusive = [x + y[0] for x, y in zip(inclusive, received, strict=True)]
      exclusive = [x + y[0] for x, y in zip(exclusive, received, strict=True)]
    return packing.unpack([x / graph.size for x in inclusive])
  for t, topology in enumerate(graph.rounds[: _rounds(graph, comm)]):
    rounds = nccl.rounds_of(topology, comm.rank)
    slots = nccl.slots_of(rounds)
    row = nccl.row_of_graph(topology, comm.rank, 0)
    received = exchanged(t, own, rounds, slots)
    own = nccl.average(own, row, received, slots)
  return packing.unpack(own)


class _OnGpus(nccl.Rendition):
  """Rounds in the blocking form, an allreduce in the split form."""

  def blocking(
    self,
    call: Callable[..., list[Any]],
    results: Sequence[Any],
    scalars: Sequence[Any],
    leaves: Sequence[Any],
    **params: Any,
  ) -> Sequence[Any]:
    """One exchange for each round."""
    del results
    return _rounds_on_gpus(call, scalars, leaves, **params)

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Sequence[jax.Array],
    *,
    graph: Topology | Schedule | ExactAverage,
    comm: Any,
  ) -> nccl.Send:
    """The allreduce of the split form."""
    del graph
    return _allreduce.on_gpus.encode(
      mode, scalars, leaves, op="mean", comm=comm, operation=_NAME
    )

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Those of the allreduce."""
    return _allreduce.on_gpus.received(results, static)

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The results of the allreduce."""
    return _allreduce.on_gpus.decode(own, weights, received, static)

  def static(self, *, comm: Any, **params: Any) -> tuple[str, int]:
    """Operation and number of ranks of the allreduce."""
    del params
    return "mean", comm.size


finite_time_average_p = _primitive.define(
  _NAME,
  attributes=_attributes,
  transpose=_transpose,
  in_place=True,
  on_gpus=_OnGpus(),
)
