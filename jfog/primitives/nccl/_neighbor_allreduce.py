"""`neighbor_allreduce` on GPUs: one exchange into slots, and their weighted sum."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jfog.primitives import _ffi_attributes
from jfog.primitives._weighted_sum import Row, Weighting
from jfog.primitives.nccl import _exchange
from jfog.primitives.nccl._lowering import Mode, Rendition, Send
from jfog.primitives.nccl._packing import Packing
from jfog.topology import Schedule, Topology


class WeightedExchange(Rendition):
  """Packed leaves received into slots, and their weighted sum.

  `static` is the number of slots, `weights` a `Row`.
  """

  def received(self, results: Sequence[Any], static: int) -> Sequence[Any]:
    """One buffer of all slots for each buffer of the packing."""
    return Packing.of(results).avals(static)

  def decode(
    self, own: Any, weights: Row, received: Any, static: int
  ) -> Sequence[Any]:
    """The weighted sum of the packed leaves."""
    return _exchange.average(own, weights, received, static)


class NeighborAllreduce(WeightedExchange):
  """`neighbor_allreduce` with a graph."""

  def encode(
    self,
    mode: Mode,
    scalars: Sequence[Any],
    leaves: Sequence[jax.Array],
    *,
    graph: Topology | Schedule,
    weighting: Weighting,
    comm: Any,
  ) -> Send:
    """The exchange; a rank that weights what it sends scales before."""
    rounds = _exchange.rounds_of(graph, comm.rank)
    packed = Packing.of(leaves).pack(leaves)
    scales = weighting is Weighting.SOURCE
    if scales:
      step, row = scalars
      slots = max(len(destinations) for _, destinations in rounds)
      # The rank behind each send slot, by round; row[table[step]] are its
      # weights.
      table = np.zeros((len(rounds), slots), np.int32)
      for t, (_, destinations) in enumerate(rounds):
        table[t, : len(destinations)] = destinations
      packed = _exchange.scaled(packed, row[_exchange.at_step(table, step)])
    return _exchange.exchange(
      "neighbor_allreduce",
      mode,
      comm,
      scalars[0],
      packed,
      rounds,
      variant=(_ffi_attributes.fingerprint(graph), int(weighting)),
      like=leaves,
      # Scaled copies differ, one for each destination.
      apart=scales,
    )

  def weights(
    self,
    scalars: Sequence[Any],
    *,
    graph: Topology | Schedule,
    weighting: Weighting,
    comm: Any,
  ) -> Row:
    """The row of this rank: the graph's, or that of runtime weights."""
    given = None
    if weighting is not Weighting.GRAPH:
      row = scalars[1]
      # Entry j of the row belongs to rank j: the own weight is that of this
      # rank.
      given = (row[comm.rank], row, weighting is Weighting.SOURCE)
    return _exchange.row_of_graph(graph, comm.rank, scalars[0], given)

  def static(
    self, *, graph: Topology | Schedule, comm: Any, **params: Any
  ) -> int:
    """The number of slots."""
    del params
    return _exchange.slots_of(_exchange.rounds_of(graph, comm.rank))
