"""Average with one other rank."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _dtypes, _validation
from jfog.primitives import _mesh, _operation, _pytree
from jfog.primitives._operation import Operation
from jfog.primitives._peers import (
  as_weights,
  peer_allreduce_p,
  scaled,
  sum_to_one,
)
from jfog.runtime import Axis, Communicator, presence, resolve


def _checked_peer(peer: Any, comm: Communicator) -> Any:
  """A rank, as an int or a traced integer scalar; or a tuple, on a mesh."""
  if isinstance(peer, (Sequence, np.ndarray)) and np.ndim(peer) == 1:
    if len(peer) != comm.size:
      raise ValueError(
        f"pair_gossip: peer={peer!r} names {len(peer)} peers for {comm.size} "
        f"ranks; name one for each rank."
      )
    label = "pair_gossip: peer"
    peers = tuple(_validation.rank_of_comm(p, comm.size, label) for p in peer)
    for rank, other in enumerate(peers):
      if peers[other] != rank:
        raise ValueError(
          f"pair_gossip: rank {rank} names rank {other}, which names rank "
          f"{peers[other]}; both ranks of a pair name each other."
        )
    return peers if isinstance(comm, Axis) else peers[comm.rank]
  if isinstance(peer, (int, np.integer)) and not isinstance(peer, bool):
    peer = _validation.rank_of_comm(peer, comm.size, "pair_gossip: peer")
    if isinstance(comm, Axis) and comm.size > 1:
      raise ValueError(
        f"pair_gossip: on a mesh all {comm.size} ranks would name rank {peer}, "
        f"and both ranks of a pair name each other; pass the peers of all ranks, "
        f"as [1, 0, 3, 2], or a function of jfog.rank()."
      )
    return peer
  peer = jnp.asarray(peer)
  if not jnp.issubdtype(peer.dtype, jnp.integer) or peer.shape != ():
    raise TypeError(
      f"pair_gossip: peer has dtype {peer.dtype} and shape {peer.shape}; pass "
      f"an integer scalar."
    )
  return peer


def _own_peer(peers: Sequence[int], comm: Communicator) -> Any:
  """This rank's entry of a table of peers, as an operand."""
  return np.int32(_checked_peer(peers, comm))


@functools.partial(
  _operation.operation, pack={list: _own_peer, tuple: _own_peer}
)
def pair_gossip(
  x: Any,
  peer: Any,
  *,
  self_weight: Any = 0.5,
  pair_weight: Any = 0.5,
  check: bool = True,
  comm: Communicator | None = None,
) -> Any:
  """Averages `x` with that of one other rank.

  Computes `y[i] = self_weight x[i] + pair_weight x[peer[i]]`. The two ranks name
  each other, send each other their leaves in one message and wait for each
  other. A rank that names itself uses its own value twice. Weights that sum to 1
  are evaluated as `x[i] + pair_weight (x[peer[i]] - x[i])`. On a mesh, a table of
  all peers is one permutation; with a traced peer the operation gathers the
  values of all ranks and selects one; a rank whose traced peer is out of range or
  names another rank gets NaN.

  Linear in `x`, with itself as transpose (each rank then weights what it sends
  with its own `pair_weight`).

  Args:
    x: a pytree of float or complex arrays, of equal shapes and dtypes on both
      ranks.
    peer: the other rank, an int or a traced integer scalar; or a sequence of
      ints, the peer of every rank. Another peer is neither traced nor compiled
      again if it is traced.
    self_weight: the weight of the own value, a number, which may be traced.
    pair_weight: the weight of the peer's value, likewise.
    check: whether to check with a peer that is new to this rank that it names
      this rank, before the payload is sent; see `Peers`. On MPI only.
    comm: the communicator; by default the current one, see `jfog.init`.

  Returns:
    A pytree like `x`, in shapes and dtypes.

  Raises:
    ValueError: if `peer` is an int that is out of range, or a table in which two
      ranks do not name each other, or on a mesh an int, which all ranks would
      name.
    TypeError: for integer or bool leaves, or a `peer` of another type.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`; and if a
      traced peer is out of range (`INVALID_ARGUMENT`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> swap = lambda x: jfog.pair_gossip(x, jfog.rank() ^ 1)
    >>> jfog.simulate(swap, 4)(jnp.array([0.0, 2.0, 4.0, 8.0]))
    Array([1., 1., 6., 6.], dtype=float32)

  Source: `pair_gossip` of BlueFog; Boyd et al., "Randomized Gossip Algorithms",
  2006.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, "pair_gossip")
  _pytree.require_inexact(leaves, names, "pair_gossip")
  peer = _checked_peer(peer, comm)
  weights = [self_weight, pair_weight]
  difference = sum_to_one(weights)
  own, other, *_ = pair = as_weights([*weights, 1.0], "a weight")

  def on_mesh(leaves: list[jax.Array]) -> list[jax.Array]:
    mix = functools.partial(_mix_on_mesh, peer, own, other, difference, comm)
    if not isinstance(comm, Axis) or isinstance(peer, tuple):
      return [mix(x) for x in leaves]
    mutual = _names_back(peer, comm)
    return [jnp.where(mutual, mix(x), jnp.nan).astype(x.dtype) for x in leaves]

  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=on_mesh,
    primitive=peer_allreduce_p,
    # The peer is the only source and the only destination.
    fixed=()
    if isinstance(peer, tuple)
    else (jnp.stack([jnp.asarray(peer, jnp.int32)] * 2), pair),
    operands=lambda: _pytree.to_native(leaves, names, "pair_gossip"),
    params={
      "sources": 1,
      "scales": False,
      "difference": difference,
      "pair": True,
      "check": bool(check),
      "comm": comm,
    },
  )


pair_gossip_start = _operation.start_of(
  pair_gossip,
  """>>> swap = lambda x: jfog.wait(jfog.pair_gossip_start(x, jfog.rank() ^ 1))
    >>> jfog.simulate(swap, 2)(jnp.array([0.0, 2.0]))
    Array([1., 1.], dtype=float32)""",
)


def _names_back(peer: jax.Array, comm: Axis) -> jax.Array:
  """Whether the traced peer of this rank is a rank that names this one."""
  peers = _mesh.gather(_mesh.varying(peer, comm), comm.axes)
  named = peers[jnp.clip(peer, 0, comm.size - 1)]
  return (peer >= 0) & (peer < comm.size) & (named == comm.rank)


def _mix_on_mesh(
  peer: Any,
  own: Any,
  other: Any,
  difference: bool,
  comm: Communicator,
  x: jax.Array,
) -> jax.Array:
  """Mesh rendition: a permutation, or for a traced peer a gather of all ranks."""
  value = x
  if isinstance(comm, Axis):
    varying = _mesh.varying(x, comm)
    if isinstance(peer, tuple) and not _mesh.are_virtual(comm.axes):
      # A table of peers is a permutation, as each rank names the one that names it.
      pairs = [(source, rank) for rank, source in enumerate(peer)]
      value = lax.ppermute(varying, comm.axes, pairs)
    else:
      if isinstance(peer, tuple):
        peer = jnp.asarray(peer)[comm.rank]
      # A permutation has to be known when the program is compiled.
      value = _mesh.gather(varying, comm.axes)[peer]
      present = presence(comm.axes, comm.size, "pair_gossip")
      if present is not None:
        # As between processes: the own value takes the weight of a missing peer.
        value = jnp.where(present.edges[comm.rank][peer], value, varying)
  # own x + other value: the weights do not sum to 1, or are traced.
  if not difference:
    return (scaled(own, x) + scaled(other, value)).astype(x.dtype)
  # x + other (value - x): equal values come back bit for bit.
  wide = x.astype(_dtypes.accumulation(x.dtype))
  return (wide + scaled(other, value.astype(wide.dtype) - wide)).astype(x.dtype)
