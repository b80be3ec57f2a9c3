"""Averages over peers that each rank chooses, possibly at run time."""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from jfog import _dtypes
from jfog.primitives import _primitive, _pytree, nccl
from jfog.primitives._operation import Operation
from jfog.primitives._weighted_sum import Row
from jfog.runtime import Communicator

_TOLERANCE = 1e-9  # of the sum of weights, for the difference form


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class Peers:
  """Sources and destinations of one rank in one average, with their weights.

  `jfog.neighbor_allreduce(x, Peers(...))` computes on rank i

      y[i] = self_weight[i] x[i] + sum_j src_weights[i][j] dst_weights[j][i] x[j]

  over the ranks j that i names as sources. Every rank that i sends to must name
  i as a source, and the other way round. Weights are used as given: nothing
  makes them sum to 1. A rank may name no source, no destination, or neither.
  Works between processes only, for on a mesh all ranks run one program.

  A pytree: the ranks are static, the weights may be traced.

  Peers that this rank has not used before are checked first: it exchanges one
  control message with each of them, which the peer answers in its own call of the
  operation, and sends the payload once all have answered. Where two ranks differ,
  both raise an error that names them, and the other ranks raise one at the latest
  in their next operation. Peers that this rank has used before are checked again
  only if no message arrives from them for long.

  Args:
    self_weight: the weight of this rank's own value.
    src_weights: from each rank to receive from to the weight it gets here.
    dst_weights: from each rank to send to to the weight to scale with before;
      or the ranks alone, for weights of 1.
    check: whether to check new peers; static.

  Raises:
    TypeError: for a rank that is not an int.
    ValueError: for a negative or a duplicate rank.

  Example:
    >>> import jfog
    >>> peers = jfog.Peers(0.5, {1: 0.5}, [1])
    >>> peers.src_weights
    {1: 0.5}

  Source: the `self_weight`, `src_weights` and `dst_weights` of BlueFog's
  `neighbor_allreduce`.
  """

  self_weight: Any
  src_weights: dict[int, Any]
  dst_weights: dict[int, Any]
  check: bool = True

  def __init__(
    self,
    self_weight: Any,
    src_weights: Mapping[int, Any],
    dst_weights: Mapping[int, Any] | Iterable[int],
    *,
    check: bool = True,
  ):
    object.__setattr__(self, "self_weight", self_weight)
    object.__setattr__(
      self, "src_weights", _checked_ranks(src_weights, "src_weights")
    )
    object.__setattr__(
      self, "dst_weights", _checked_ranks(dst_weights, "dst_weights")
    )
    object.__setattr__(self, "check", bool(check))

  def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The weights and the ranks, for JAX."""
    weights = (
      self.self_weight,
      tuple(self.src_weights.values()),
      tuple(self.dst_weights.values()),
    )
    # Ranks are part of the structure: they are needed while tracing, weights
    # may be traced.
    static = tuple(self.src_weights), tuple(self.dst_weights), self.check
    return weights, static

  @classmethod
  def tree_unflatten(
    cls, static: tuple[Any, ...], weights: tuple[Any, ...]
  ) -> "Peers":
    """Peers of those ranks and weights, for JAX."""
    *ranks, check = static
    # Without the checks: JAX unflattens with placeholders of any type.
    peers = object.__new__(cls)
    object.__setattr__(peers, "check", check)
    for name, value in zip(
      ("self_weight", "src_weights", "dst_weights"),
      (
        weights[0],
        dict(zip(ranks[0], weights[1], strict=True)),
        dict(zip(ranks[1], weights[2], strict=True)),
      ),
      strict=True,
    ):
      object.__setattr__(peers, name, value)
    return peers


def _checked_ranks(
  weights: Mapping[int, Any] | Iterable[int], name: str
) -> dict[int, Any]:
  """Weights by rank, the ranks checked."""
  pairs = (
    list(weights.items())
    if isinstance(weights, Mapping)
    else [(rank, 1.0) for rank in weights]
  )
  checked: dict[int, Any] = {}
  for rank, weight in pairs:
    if isinstance(rank, (bool, np.bool_)):
      raise TypeError(f"Peers: rank keys of {name} must be ints, got {rank!r}.")
    try:
      rank = operator.index(rank)
    except TypeError as error:
      raise TypeError(
        f"Peers: rank keys of {name} must be ints and not traced, got "
        f"{rank!r} of type {type(rank).__name__}."
      ) from error
    if rank < 0:
      raise ValueError(
        f"Peers: {name} has the negative rank {rank}; ranks start at 0."
      )
    if rank in checked:
      raise ValueError(f"Peers: {name} has the rank {rank} twice.")
    checked[rank] = weight
  return checked


def check_ranks(peers: Peers, comm: Communicator, operation: str) -> None:
  """Checks that peers are other ranks of a communicator of processes."""
  if comm.backend == "mesh":
    raise ValueError(
      f"{operation}: Peers describe one rank, and on a mesh all ranks run one "
      f"program; pass a Topology or a Schedule."
    )
  for name in ("src_weights", "dst_weights"):
    for rank in getattr(peers, name):
      if comm.size == 1:
        raise ValueError(
          f"{operation}: {name} has the rank {rank} on rank 0 of 1; use other ranks, "
          f"which a world of one lacks: start them by `jfog run -np N`."
        )
      if rank >= comm.size or rank == comm.rank:
        raise ValueError(
          f"{operation}: {name} has the rank {rank} on rank {comm.rank} of "
          f"{comm.size}; use other ranks from 0 to {comm.size - 1}, and "
          f"self_weight for this rank."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPeers:
  """`Peers` as operands: other ranks and weights run the same program.

  Attributes:
    ranks: the sources and then the destinations, each ascending; int32.
    weights: of this rank, the sources and the destinations.
    sources: the number of sources.
    scales: whether a destination has another weight than 1.
    difference: whether the sum is evaluated in the difference form.
    check: whether to check new peers.
  """

  ranks: Any
  weights: Any
  sources: int = dataclasses.field(metadata={"static": True})
  scales: bool = dataclasses.field(metadata={"static": True})
  difference: bool = dataclasses.field(metadata={"static": True})
  check: bool = dataclasses.field(metadata={"static": True})


def pack(
  peers: Peers, comm: Communicator, operation: str = "neighbor_allreduce"
) -> PackedPeers:
  """Peers as operands, checked."""
  check_ranks(peers, comm, operation)
  # Ascending, as in a graph: the sum has one order and the same bits.
  sources = dict(sorted(peers.src_weights.items()))
  destinations = dict(sorted(peers.dst_weights.items()))
  weights = [peers.self_weight, *sources.values()]
  return PackedPeers(
    np.array([*sources, *destinations], np.int32),
    as_weights([*weights, *destinations.values()], "the weights of Peers"),
    sources=len(sources),
    # Weights of 1 at the sender need no copy of the leaves for each destination.
    scales=any(not is_static(w) or w != 1 for w in destinations.values()),
    difference=sum_to_one(weights),
    check=peers.check,
  )


def peers_call(
  leaves: Sequence[jax.Array],
  names: Sequence[str],
  structure: Any,
  peers: Peers | PackedPeers,
  comm: Communicator,
) -> Operation:
  """The operation of `neighbor_allreduce` with `Peers`."""
  if isinstance(peers, Peers):
    peers = pack(peers, comm)
  if not leaves or comm.backend == "single":
    own = peers.weights[0]
    return Operation(leaves, structure, [scaled(own, x) for x in leaves])
  return Operation(
    leaves,
    structure,
    primitive=peer_allreduce_p,
    fixed=(peers.ranks, peers.weights),
    operands=_pytree.to_native(leaves, names, "neighbor_allreduce"),
    params={
      "sources": peers.sources,
      "scales": peers.scales,
      "difference": peers.difference,
      "pair": False,
      "check": peers.check,
      "comm": comm,
    },
  )


def is_static(weight: Any) -> bool:
  """Whether the value of a weight is known while tracing."""
  return isinstance(weight, (int, float, np.number, np.ndarray))


def sum_to_one(weights: list[Any]) -> bool:
  """Whether known weights, the own first, allow the difference form."""
  # The form of the sum is a part of the program, so traced values cannot choose
  # it.
  if not all(is_static(weight) for weight in weights):
    return False
  return bool(abs(sum(weights) - 1) <= _TOLERANCE and weights[0] != 0)


def as_weights(weights: list[Any], name: str) -> Any:
  """Weights as one vector, in the widest float dtype that JAX has enabled."""
  for weight in weights:
    if type(weight) in (int, float):
      continue
    if jnp.shape(weight) != ():
      raise ValueError(
        f"{name} has shape {jnp.shape(weight)}; pass a scalar for every weight."
      )
    if not jnp.isrealobj(weight):
      raise TypeError(f"{name} is complex; pass real weights.")
  # float32 without 64-bit types.
  dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
  if all(is_static(weight) for weight in weights):
    return np.array(weights, dtype)
  return jnp.stack([jnp.asarray(weight, dtype) for weight in weights])


def scaled(weight: jax.Array, x: jax.Array) -> jax.Array:
  """`weight * x`, multiplied in the accumulation dtype."""
  wide = x.astype(_dtypes.accumulation(x.dtype))
  scaled = weight.astype(jnp.finfo(wide.dtype).dtype) * wide
  return scaled.astype(x.dtype)


# Native rendition: rules of the primitive. Its scalar operands are the ranks of
# the sources and the destinations, and the weights of self, sources, destinations.


def _tangents(
  primitive: Any,
  primals: Sequence[Any],
  results: Sequence[Any],
  tangents: Sequence[Any],
  **params: Any,
) -> list[Any]:
  # Operand 1 holds the weights. The cotangent of a sender's weight would take
  # the cotangents of its receivers, one more exchange.
  if type(tangents[1]) is not ad.Zero:
    raise TypeError(
      "neighbor_allreduce with Peers, and pair_gossip, have no derivative with "
      "respect to weights between processes; use jax.lax.stop_gradient on them, "
      "or a graph with weights=."
    )
  return _primitive.linear_tangents(
    primitive, primals, results, tangents, **params
  )


def _transpose(
  cotangents: Sequence[Any],
  ranks: Any,
  weights: Any,
  *,
  sources: int,
  scales: bool,
  **params: Any,
) -> Any:
  # y_i = s_i x_i + sum_j r_ij d_ji x_j, so ct_x_j = s_j ct_y_j + sum_i d_ji r_ij
  # ct_y_i: sources and destinations change places, and so do the weights of the
  # two ends of an edge.
  del scales
  own, received, sent = jnp.split(weights, [1, 1 + sources])
  return peer_allreduce_p.bind(
    # [sources, destinations] becomes [destinations, sources].
    jnp.roll(ranks, -sources),
    jnp.concatenate([own, sent, received]),
    *cotangents,
    sources=len(ranks) - sources,
    scales=True,
    **{**params, "difference": False},
  )


def _attributes(
  *leaves: Any,
  sources: int,
  scales: bool,
  difference: bool,
  pair: bool,
  check: bool,
  comm: Any,
) -> dict[str, Any]:
  del leaves
  return {
    "context": np.int64(comm.context),
    "pair": np.int64(pair),
    "check": np.int64(check),
    "sources": np.int64(sources),
    "scales": np.int64(scales),
    "difference": np.int64(difference),
  }


class _OnGpus(nccl.Rendition):
  """One exchange into slots, and their weighted sum."""

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Any,
    *,
    sources: int,
    scales: bool,
    pair: bool,
    comm: Any,
    **params: Any,
  ) -> nccl.Send:
    """The exchange; `scales` weights the copy for each destination."""
    del params
    ranks, weights = scalars
    packed = nccl.Packing.of(leaves).pack(leaves)
    if scales:
      packed = nccl.scaled(packed, weights[1 + sources :])
    return nccl.exchange(
      "peer_allreduce",
      mode,
      comm,
      ranks,
      packed,
      # The ranks are an operand, read when the program runs: -1 holds their
      # places.
      [([-1] * sources, [-1] * (len(ranks) - sources))],
      variant="peers",
      like=leaves,
      operation="pair_gossip" if pair else "neighbor_allreduce",
      sources=sources,
      apart=scales,
    )

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Avals of the slots: one buffer of the packing for each source."""
    return nccl.Packing.of(results).avals(static)

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The weighted sum over the slots."""
    return nccl.average(own, weights, received, static)

  def weights(
    self,
    scalars: Sequence[Any],
    *,
    sources: int,
    difference: bool,
    **params: Any,
  ) -> Row:
    """The weights of the sum: every slot holds the value of one source."""
    del params
    weights = jnp.asarray(scalars[1])
    return Row(
      weights[0],
      weights[1 : 1 + sources],
      np.ones(sources, np.bool_),
      np.bool_(difference),
    )

  def static(self, *, sources: int, **params: Any) -> int:
    """The number of slots."""
    del params
    return sources


peer_allreduce_p = _primitive.define(
  "peer_allreduce",
  attributes=_attributes,
  tangents=_tangents,
  transpose=_transpose,
  in_place=True,
  on_gpus=_OnGpus(),
)
