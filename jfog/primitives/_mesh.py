"""What the mesh renditions of all operations share."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from jfog import _compat
from jfog.runtime import Axis, Communicator


def are_virtual(axes: tuple[str, ...]) -> bool:
  """Whether the axes are those of `vmap`, where a gather moves nothing."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return bool(axes) and not set(axes) & set(manual)


def varying(x: jax.Array, comm: Communicator) -> jax.Array:
  """Marks `x` as different from rank to rank, where a `shard_map` checks that."""
  return _compat.varying(x, comm.axes) if isinstance(comm, Axis) else x


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The values of all ranks, stacked along a new axis 0."""
  stacked = x
  for axis in reversed(axes):  # one at a time: vmap gathers over one axis only
    stacked = lax.all_gather(stacked, axis)
  ranks = math.prod(stacked.shape[: len(axes)])
  return stacked.reshape(ranks, *x.shape)


def nothing(x: jax.Array) -> jax.Array:
  """What can be added to any value and leaves its bits: -0 for floats."""
  zero = jnp.zeros_like(x)
  return -zero if jnp.issubdtype(x.dtype, jnp.inexact) else zero


def uniform(value: Any, comm: Communicator) -> Any:
  """The same integer or bool on every rank of a mesh: the largest one.

  What chooses a branch around a collective must not differ between ranks. Under
  `simulate` it would be batched besides, and every branch computed.
  """
  if not isinstance(comm, Axis) or not isinstance(value, jax.core.Tracer):
    return value
  value = _compat.varying(lax.stop_gradient(value), comm.axes)
  if value.dtype == jnp.bool_:
    return lax.pmax(value.astype(jnp.int32), comm.axes).astype(jnp.bool_)
  return lax.pmax(value, comm.axes)
