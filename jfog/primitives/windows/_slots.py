"""Slots of windows on a mesh: their edges, packing and contents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog.primitives import _weighted_sum
from jfog.primitives.windows._window import Spec
from jfog.topology import Topology

# An associated p undergoes the arithmetic of the data bit for bit where both are
# elements of one array: XLA fuses a product and a sum in some loops, and not in
# others, which rounds once or twice.


def _host(spec: Spec) -> int | None:
  """The leaf that p lies behind, in one array; None if there is none like it."""
  return (
    spec.dtypes.index(spec.p_dtype) if spec.p_dtype in spec.dtypes else None
  )


def pack(spec: Spec, leaves: list[jax.Array], p: Any) -> list[jax.Array]:
  """The leaves as arrays, and p in its place."""
  if not spec.associated_p:
    return list(leaves)
  host = _host(spec)
  if host is None:
    # p is behind the leaves, as an array of its own: no leaf has its dtype.
    return [*leaves, p]
  return [
    jnp.append(x.ravel(), p) if i == host else x for i, x in enumerate(leaves)
  ]


def unpack(spec: Spec, arrays: list[jax.Array]) -> tuple[list[jax.Array], Any]:
  """The leaves and p that `pack` has put together."""
  if not spec.associated_p:
    return list(arrays), None
  host = _host(spec)
  if host is None:
    return list(arrays[:-1]), arrays[-1]
  leaves = [
    x[:-1].reshape(spec.shapes[i]) if i == host else x
    for i, x in enumerate(arrays)
  ]
  return leaves, arrays[host][-1]


def edges_of(topology: Topology) -> np.ndarray:
  """Adjacency matrix `[dst, src]`, without self-loops."""
  edges = topology.mixing_matrix != 0
  np.fill_diagonal(edges, False)
  return edges


def sources_of(topology: Topology) -> np.ndarray:
  """The rank that writes slot k of rank i, at `[k, i]`; i itself for an unused slot."""
  neighbors = [topology.in_neighbors(i) for i in range(topology.size)]
  sources = np.tile(np.arange(topology.size), (max(map(len, neighbors)), 1))
  for i, ranks in enumerate(neighbors):
    sources[: len(ranks), i] = ranks
  return sources


def own_sources(spec: Spec) -> jax.Array:
  """The ranks that write this rank's slots."""
  return jnp.asarray(sources_of(spec.topology))[:, spec.comm.rank]


def write(
  old: jax.Array, message: jax.Array, there: Any, adds: Any
) -> jax.Array:
  """`old` with the message written `there`, or added to it where it `adds`."""
  # In the dtype of the message, which for an accumulate is that of sums:
  # rounded once, after the addition.
  total = old.astype(message.dtype) + message
  new = jnp.where(_weighted_sum.along(adds, total), total, message).astype(
    old.dtype
  )
  return jnp.where(_weighted_sum.along(there, new), new, old)
