"""Parts of the mesh renditions that several operations share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from jfog import _compat
from jfog.runtime import Axis, Communicator


def are_virtual(axes: tuple[str, ...]) -> bool:
  """Whether the axes are those of `vmap`, where a gather moves nothing."""
  # A shard_map makes its axes manual; those of vmap are not.
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return bool(axes) and not set(axes) & set(manual)


def varying(x: jax.Array, comm: Communicator) -> jax.Array:
  """Marks `x` as different from rank to rank, where a `shard_map` checks that."""
  return _compat.varying(x, comm.axes) if isinstance(comm, Axis) else x


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The values of all ranks, stacked along a new axis 0."""
  stacked = x
  # Minor first, so that the major axis ends in front.
  for axis in reversed(axes):  # one at a time: vmap gathers over one axis only
    stacked = lax.all_gather(stacked, axis)
  ranks = math.prod(stacked.shape[: len(axes)])
  return stacked.reshape(ranks, *x.shape)


def additive_identity(x: jax.Array) -> jax.Array:
  """The neutral element of addition in the dtype of `x`: -0 for floats.

  A sum with -0 keeps the bits of the other summand; 0 + -0 would lose a sign.
  """
  zero = jnp.zeros_like(x)
  return -zero if jnp.issubdtype(x.dtype, jnp.inexact) else zero


def on_nonempty(
  rendition: Callable[[list[jax.Array]], Sequence[jax.Array]],
  leaves: Sequence[jax.Array],
) -> list[jax.Array]:
  """Runs a mesh rendition on the leaves that have elements.

  The result of an empty leaf is empty, too, and only its shape and dtype are
  computed. XLA:CPU up to the version of JAX 0.11 crashes in its combiner of
  collectives when an empty operand comes with another of the same dtype.
  """
  full = [i for i, x in enumerate(leaves) if x.size]
  if len(full) == len(leaves):
    return list(rendition(list(leaves)))
  empty = [i for i, x in enumerate(leaves) if not x.size]
  results: list[Any] = [None] * len(leaves)
  # Of what the collectives would return: no element, so nothing has to travel.
  shapes = jax.eval_shape(
    lambda *x: rendition(list(x)), *(leaves[i] for i in empty)
  )
  for i, shape in zip(empty, shapes, strict=True):
    results[i] = _compat.zeros(shape)
  if full:
    computed = rendition([leaves[i] for i in full])
    for i, result in zip(full, computed, strict=True):
      results[i] = result
  return results


def uniform(value: Any, comm: Communicator) -> Any:
  """The same integer or bool on every rank of a mesh: the largest one.

  The index of a branch around a collective must be equal on all ranks. Under
  `simulate` a batched index would turn the switch into a computation of all
  branches, and the maximum over the axis is not batched.
  """
  if not isinstance(comm, Axis) or not isinstance(value, jax.core.Tracer):
    return value
  # pmax has no derivative; integers and bools need none.
  value = _compat.varying(lax.stop_gradient(value), comm.axes)
  if value.dtype == jnp.bool_:
    return lax.pmax(value.astype(jnp.int32), comm.axes).astype(jnp.bool_)
  return lax.pmax(value, comm.axes)
