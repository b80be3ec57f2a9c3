"""Operations on GPUs: calls of NCCL between two pieces of XLA's arithmetic."""

import dataclasses
import enum
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jfog import _compat
from jfog.primitives import _ffi_attributes, _weighted_sum

# Leaves of fewer bytes travel together, in one buffer for each dtype. Not
# measured: to be chosen anew on a GPU.
_PACKED = 1 << 20


class Mode(enum.IntEnum):
  """What a handler does with its operation; numbered as in its C++ twins."""

  WHOLE = 0
  START = 1


class Reduction(enum.IntEnum):
  """Numbered as in NCCL."""

  SUM = 0
  PROD = 1
  MAX = 2
  MIN = 3


class Send(NamedTuple):
  """What a handler of `jfog._nccl` is told, and what it sends."""

  target: str  # without the prefix
  attributes: dict[str, Any]
  operands: Sequence[Any]


def _nothing(*args, **params):
  del args, params
  return ()


@dataclasses.dataclass(frozen=True)
class OnGpus:
  """How an operation runs on GPUs: XLA, one call of NCCL, XLA.

  A started operation sends in one program and finishes in another, so what
  `finish` needs goes with the handle: arrays from `weigh`, and what is `static`.

  Attributes:
    send: `(mode, fixed operands, leaves, **params)` to the call.
    received: `(avals of the results, static)` to those of what comes in.
    finish: `(own, weights, received, static)` to the results. `own` are the
      leaves, or in a started operation whose results have other shapes than
      the leaves are, arrays like the results.
    weigh: `(fixed operands, **params)` to an array.
    static: `(**params)` to what is known before the program runs; hashable.
    whole: `(call, fixed operands, leaves, **params)` to the results, for an
      operation of several calls, which `call(Send, avals)` makes. In place of
      all the others while nothing is started.
    in_place: whether what comes in may share the buffers of what is sent.
  """

  send: Callable[..., Send]
  received: Callable[..., Sequence[Any]] = lambda results, static: results
  finish: Callable[..., Sequence[Any]] = lambda own, weights, received, static: (
    received
  )
  weigh: Callable[..., Any] = lambda fixed, **params: np.zeros(0, np.float32)
  static: Callable[..., Any] = _nothing
  whole: Callable[..., Sequence[Any]] | None = None
  in_place: bool = False


# The call of a handler, which only the lowerings below put into programs.

call_p = Primitive("nccl")
call_p.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Attributes:
  """Attributes of a call, as a parameter of a primitive."""

  values: dict[str, Any]


@call_p.def_effectful_abstract_eval
def _call_abstract_eval(*operands, received, **params):
  del operands, params
  results = [jax.core.ShapedArray(x.shape, x.dtype) for x in received]
  return results, {_compat.communication_effect()}


def _lower_call(ctx, *operands, target, attributes, received, aliases):
  del received
  rule = _compat.ordered_ffi_lowering(f"jfog_nccl_{target}", dict(aliases))
  return rule(ctx, *operands, **attributes.values)


mlir.register_lowering(call_p, _lower_call)


def call(
  send: Send, received: Sequence[Any], aliases: dict[int, int] | None = None
) -> list[Any]:
  """Puts the call of a handler into the program; returns what comes in."""
  return call_p.bind(
    *send.operands,
    target=send.target,
    attributes=_Attributes(send.attributes),
    received=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in received),
    aliases=tuple((aliases or {}).items()),
  )


def _run(send: Send, received: Sequence[Any], in_place: bool = False):
  """One whole operation."""
  shift = len(send.operands) - len(received)
  aliases = {
    i + shift: i
    for i, y in enumerate(received)
    if in_place and jnp.shape(send.operands[i + shift]) == y.shape
  }
  return call(send, received, aliases)


def whole(rendition: OnGpus, results, fixed, leaves, params) -> Sequence[Any]:
  """The results of a whole operation; `results` are their avals."""
  if rendition.whole is not None:
    return rendition.whole(_run, fixed, leaves, **params)
  static = rendition.static(**params)
  send = rendition.send(Mode.WHOLE, fixed, leaves, **params)
  received = _run(send, rendition.received(results, static), rendition.in_place)
  weights = rendition.weigh(fixed, **params)
  return rendition.finish(leaves, weights, received, static)


def start(rendition: OnGpus, results, fixed, leaves, params) -> Sequence[Any]:
  """The number, the weights and the room of a started operation."""
  static = rendition.static(**params)
  send = rendition.send(Mode.START, fixed, leaves, **params)
  sizes = [
    x.size * x.dtype.itemsize for x in rendition.received(results, static)
  ]
  # An attribute may not be empty: one more element, which is never read.
  send.attributes["received_bytes"] = np.array([*sizes, -1], np.int64)
  (number,) = call(send, [jax.ShapeDtypeStruct((), jnp.uint32)])
  weights = jnp.asarray(rendition.weigh(fixed, **params))
  if all(
    x.shape == y.shape and x.dtype == y.dtype
    for x, y in zip(leaves, results, strict=True)
  ):
    room = leaves
  else:
    room = [jnp.zeros(y.shape, y.dtype) for y in results]
  return [number, weights, *room]


def wait(rendition: OnGpus, number, weights, room, static) -> Sequence[Any]:
  """The results of an operation that was started."""
  received = call(Send("wait", {}, [number]), rendition.received(room, static))
  return rendition.finish(room, weights, received, static)


# Several leaves in few messages.


class Packing:
  """Which leaves travel together: all small ones of one dtype.

  Which are small is the same on all ranks, for they have leaves of the same
  shapes.
  """

  def __init__(self, leaves: Sequence[Any]):
    self._shapes = [x.shape for x in leaves]
    self._groups: list[list[int]] = []
    shared: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
      if x.size * x.dtype.itemsize >= _PACKED:
        self._groups.append([i])
      elif x.dtype in shared:
        shared[x.dtype].append(i)
      else:
        shared[x.dtype] = [i]
        self._groups.append(shared[x.dtype])
    self.dtypes = [leaves[group[0]].dtype for group in self._groups]
    self.sizes = [
      sum(math.prod(self._shapes[i]) for i in group) for group in self._groups
    ]

  def pack(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """One vector for each group."""
    flat = [x.reshape(-1) for x in leaves]
    return [
      jnp.concatenate([flat[i] for i in group]) if group[1:] else flat[group[0]]
      for group in self._groups
    ]

  def unpack(self, packed: Sequence[jax.Array]) -> list[jax.Array]:
    """The leaves of the vectors."""
    leaves: list[Any] = [None] * len(self._shapes)
    for group, x in zip(self._groups, packed, strict=True):
      begin = 0
      for i in group:
        end = begin + math.prod(self._shapes[i])
        leaves[i] = x[begin:end].reshape(self._shapes[i])
        begin = end
    return leaves

  def avals(self, *axes: int) -> list[jax.ShapeDtypeStruct]:
    """Those of the vectors, with more axes before."""
    return [
      jax.ShapeDtypeStruct((*axes, size), dtype)
      for size, dtype in zip(self.sizes, self.dtypes, strict=True)
    ]


# Exchanges with neighbors.

# For every round the ranks to receive from and the ranks to send to.
Rounds = Sequence[tuple[Sequence[int], Sequence[int]]]


def rounds_of(
  graph: Any, rank: int, peer: Callable[[int], int] = int
) -> list[tuple[list[int], list[int]]]:
  """One rank's part of a graph; see `_ffi_attributes.table`."""
  return [
    (
      [peer(s) for s in topology.in_neighbors(rank)],
      [peer(d) for d in topology.out_neighbors(rank)],
    )
    for topology in graph.rounds
  ]


def slots_of(rounds: Rounds) -> int:
  """The number of slots that all that comes in in one round fits in."""
  return max(len(sources) for sources, _ in rounds)


def exchange(
  target: str,
  mode: Mode,
  comm: Any,
  selector: Any,
  leaves: Sequence[Any],
  rounds: Rounds,
  *,
  variant: Any,
  like: Sequence[Any],
  operation: str | None = None,
  slots: int | None = None,
  sources: int | None = None,
  apart: bool = False,
  send_counts: Any = None,
  receive_counts: Any = None,
) -> Send:
  """Sends leaves to destinations and receives those of sources into slots.

  Args:
    target: the handler.
    mode: whether it is waited for.
    comm: the communicator.
    selector: the step, which chooses the round; or with `sources` the ranks.
    leaves: what is sent; where it is `apart`, the k-th slice along axis 0 goes
      to the k-th destination.
    rounds: who exchanges with whom.
    variant: what all ranks agree on.
    like: the leaves as the user has them, of the same shapes on all ranks, or
      with the axes left out in which they may differ.
    operation: what the user has called; by default the target.
    slots: those of what is received; by default as many as one round fills.
    sources: the number of sources that the selector names before it names
      destinations; `rounds` has one round of as many.
    apart: whether each destination gets something else.
    send_counts: for each leaf and rank the elements that are sent to it; by
      default equal slices.
    receive_counts: likewise, of what comes in.
  """
  begin, out_begin = [0], [0]
  inward, outward = [], []
  for source, destination in rounds:
    inward.extend(source)
    outward.extend(destination)
    begin.append(len(inward))
    out_begin.append(len(outward))
  out_slots = max(len(destination) for _, destination in rounds)
  equal = [-1]
  attributes = {
    **told(mode, comm, operation or target, variant, like),
    "source_begin": np.array(begin, np.int32),
    "sources": np.array([*inward, -1], np.int32),
    "destination_begin": np.array(out_begin, np.int32),
    "destinations": np.array([*outward, -1], np.int32),
    "slots": np.int64(slots_of(rounds) if slots is None else slots),
    "send_slots": np.int64(out_slots),
    "selects": np.int64(sources is not None),
    "source_count": np.int64(sources or 0),
    "apart": np.int64(apart),
    "send_counts": np.array(
      equal if send_counts is None else send_counts, np.int64
    ),
    "receive_counts": np.array(
      equal if receive_counts is None else receive_counts, np.int64
    ),
  }
  selector = jnp.atleast_1d(jnp.asarray(selector, jnp.int32))
  return Send(target, attributes, [selector, *leaves])


def told(
  mode: Mode, comm: Any, operation: str, variant: Any, leaves: Sequence[Any]
) -> dict[str, Any]:
  """The attributes that all calls have; see `exchange`."""
  return {
    "context": np.int64(comm.context),
    "mode": np.int64(mode),
    "operation": operation,
    "variant": np.int64(fingerprint(variant)),
    "signature": np.int64(signature(leaves)),
  }


def fingerprint(variant: Any) -> int:
  """A number that tells variants of an operation apart."""
  digest = hashlib.blake2b(repr(variant).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little", signed=True)


def signature(leaves: Sequence[Any]) -> int:
  """A number that tells trees of other leaves apart."""
  return fingerprint([(x.dtype.name, math.prod(x.shape)) for x in leaves])


class Row(NamedTuple):
  """The weights of one rank's sum over slots.

  As one array it is `[self_weight, difference, *weights, *reads]`.
  """

  self_weight: Any
  difference: Any
  weights: Any
  reads: Any

  @classmethod
  def of(cls, row: Any) -> "Row":
    """The row of that array."""
    slots = (len(row) - 2) // 2
    reads = row[2 + slots :] != 0
    return cls(row[0], row[1] != 0, row[2 : 2 + slots], reads)


def row_of_graph(
  graph: Any, rank: int, step: Any, slots: int, weights: Any = None
) -> Any:
  """The array of a `Row`, of the round that `step` chooses.

  Args:
    graph: the graph.
    rank: whose row it is.
    step: the round, not read where there is one only.
    slots: how many there are.
    weights: a runtime row, or those of ones if it is `True`, in place of the
      graph's.
  """
  table = np.zeros((len(graph.rounds), 2 + 2 * slots))
  sources = np.zeros((len(graph.rounds), slots), np.int32)
  for t, topology in enumerate(graph.rounds):
    neighbors = topology.src_weights(rank)
    count = len(neighbors)
    table[t, 0] = topology.self_weight(rank)
    table[t, 1] = _ffi_attributes.difference_rows(topology)[rank]
    table[t, 2 : 2 + count] = list(neighbors.values())
    table[t, 2 + slots : 2 + slots + count] = 1
    sources[t, :count] = list(neighbors)
  row, sources = at_step(table, step), at_step(sources, step)
  if weights is None:
    return row
  own, runtime, senders = weights
  given = jnp.ones(slots) if senders else runtime[sources]
  return jnp.concatenate(
    [
      jnp.stack([own, jnp.zeros_like(own)]),
      given.astype(own.dtype),
      jnp.asarray(row[2 + slots :], own.dtype),
    ]
  )


def at_step(table: np.ndarray, step: Any) -> Any:
  """The entry of the round; NumPy's where there is one round only."""
  if table.dtype == np.float64:
    table = table.astype(jax.dtypes.canonicalize_dtype(np.float64))
  return table[0] if len(table) == 1 else jnp.asarray(table)[step]


def average(own, row, received, slots) -> list[jax.Array]:
  """Finishes an average of packed leaves."""
  del slots
  packing = Packing(own)
  self_weight, difference, weights, reads = Row.of(row)
  mixed = _weighted_sum.combine(
    packing.pack(own), received, self_weight, weights, reads, difference
  )
  return packing.unpack(mixed)


def scaled(leaves: Sequence[jax.Array], weights: Any) -> list[jax.Array]:
  """Vectors times each of the weights, stacked, as they travel."""
  return [
    _weighted_sum.times(
      weights, jnp.broadcast_to(x, (len(weights), *x.shape))
    ).astype(x.dtype)
    for x in leaves
  ]
