"""Exchanges with neighbors over NCCL: attributes, slots and their weighted sum."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog.primitives import _weighted_sum
from jfog.primitives._weighted_sum import Row
from jfog.primitives.nccl._lowering import Mode, Send
from jfog.primitives.nccl._packing import Packing
from jfog.topology import Schedule, Topology
from jfog.topology._neighbor_table import csr_attributes, digest, neighbor_table

# Sources and destinations of one rank in every round.
Rounds = Sequence[tuple[Sequence[int], Sequence[int]]]


def rounds_of(
  graph: Topology | Schedule, rank: int, peer: Callable[[int], int] = int
) -> list[tuple[list[int], list[int]]]:
  """Sources and destinations of one rank of a graph, in every round."""
  return [
    (
      [peer(s) for s in topology.in_neighbors(rank)],
      [peer(d) for d in topology.out_neighbors(rank)],
    )
    for topology in graph.rounds
  ]


def slots_of(rounds: Rounds) -> int:
  """The largest number of sources in a round."""
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
    mode: blocking or split.
    comm: the communicator.
    selector: the step, which selects the round; or with `sources` the ranks.
    leaves: the payload; with `apart` the k-th slice along axis 0 goes to the
      k-th destination.
    rounds: sources and destinations of this rank.
    variant: further arguments of the consistency check between ranks.
    like: the leaves of the user, of the same shapes on all ranks, or without
      the axes in which they may differ.
    operation: the name of the public operation; by default the target.
    slots: the number of slots of the received buffers; by default the largest
      number of sources in a round.
    sources: the number of sources in the selector, which names destinations
      after them; `rounds` has one round of as many.
    apart: one slice for each destination, in place of the same payload for all.
    send_counts: for each leaf and rank the elements to send to it; by default
      equal slices.
    receive_counts: likewise, of the received buffers.
  """
  equal = [-1]  # an FFI array may not be empty
  attributes = {
    **common_attributes(mode, comm, operation or target, variant, like),
    **csr_attributes([(s, d) for s, d in rounds]),
    "slots": np.int64(slots_of(rounds) if slots is None else slots),
    "send_slots": np.int64(max(len(to) for _, to in rounds)),
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
  # An operand, so that other steps run the same program: the handler reads it
  # from the device where the rounds differ.
  selector = jnp.atleast_1d(jnp.asarray(selector, jnp.int32))
  return Send(target, attributes, [selector, *leaves])


def common_attributes(
  mode: Mode, comm: Any, operation: str, variant: Any, leaves: Sequence[Any]
) -> dict[str, Any]:
  """Attributes of all calls; see `exchange`."""
  return {
    "context": np.int64(comm.context),
    "mode": np.int64(mode),
    "operation": operation,
    "variant": np.int64(fingerprint(variant)),
    "signature": np.int64(signature(leaves)),
  }


def fingerprint(variant: Any) -> int:
  """Hash of the arguments that ranks have to agree on."""
  # repr of ints, strings and tuples is the same in all processes.
  return digest(repr(variant).encode())


def signature(leaves: Sequence[Any]) -> int:
  """Hash of the dtypes and sizes of leaves."""
  return fingerprint([(x.dtype.name, x.size) for x in leaves])


def row_of_graph(
  graph: Topology | Schedule,
  rank: int,
  step: Any,
  weights: tuple[Any, Any, bool] | None = None,
) -> Row:
  """The row of a graph in the round that `step` selects.

  Args:
    graph: the graph.
    rank: the rank of the row.
    step: the round, not read where there is one only.
    weights: runtime weights in place of the graph's: the self weight, a vector
      with the weight of every rank, and whether senders have weighted, so that
      all received values count once.
  """
  table = neighbor_table(graph)
  # This rank's slots; the table is padded to the slots of all ranks.
  slots = slots_of(rounds_of(graph, rank))
  sources, present = (
    table.sources[:, rank, :slots],
    table.present[:, rank, :slots],
  )
  reads = at_step(present, step)
  if weights is None:
    return Row(
      at_step(table.self_weights[:, rank], step),
      at_step(table.weights[:, rank, :slots], step),
      reads,
      at_step(table.difference[:, rank], step),
    )
  own, runtime, senders = weights
  # A source that weights what it sends has applied its weight already.
  given = jnp.ones(slots) if senders else runtime[at_step(sources, step)]
  return Row(own, given.astype(own.dtype), reads, np.False_)


def at_step(table: np.ndarray, step: Any) -> Any:
  """The entry of the round; NumPy's where there is one round only."""
  # NumPy's entry and the traced one have the same dtype.
  if table.dtype == np.float64:
    table = table.astype(jax.dtypes.canonicalize_dtype(np.float64))
  return table[0] if len(table) == 1 else jnp.asarray(table)[step]


def average(
  own: Sequence[jax.Array], row: Any, received: Sequence[jax.Array], static: Any
) -> list[jax.Array]:
  """Decodes a weighted sum of packed leaves."""
  del static
  # Own and received values lie in equal buffers of the packing, so the sum is one
  # fused kernel for each buffer and not one for each leaf.
  packing = Packing.of(own)
  return packing.unpack(
    _weighted_sum.combine(packing.pack(own), received, *row)
  )


def scaled(leaves: Sequence[jax.Array], weights: Any) -> list[jax.Array]:
  """Vectors times each of the weights, stacked, in the dtype of the payload."""
  return [
    _weighted_sum.times(
      weights, jnp.broadcast_to(x, (len(weights), *x.shape))
    ).astype(x.dtype)
    for x in leaves
  ]
