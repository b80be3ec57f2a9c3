"""Ranks and links that are missing in a simulation."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfog.runtime._bindings import Bindings, is_simulated, new_marker


class Presence(NamedTuple):
  """Ranks and edges that take part in a simulation."""

  edges: jax.Array  # shape=(size, size), bool, by `[dst, src]`
  ranks: jax.Array  # shape=(size,), bool


_bindings = Bindings[Presence]()


def presence(axes: Collection[str], size: int, name: str) -> Presence | None:
  """Ranks and edges that take part along these axes; None if none is missing.

  Raises:
    ValueError: if its ranks are not those of the simulation.
  """
  present = _bindings.current
  if present is None or not is_simulated(axes):
    return None
  if len(present.ranks) != size:
    raise ValueError(
      f"{name}: simulate has alive= or edge_ok= of {len(present.ranks)} ranks, and "
      f"this communicator has {size}; use the default one."
    )
  return present


def current() -> Presence | None:
  """Ranks and edges that take part in the simulation; None if none is missing."""
  return _bindings.current


def refuse_with_missing(name: str) -> None:
  """Refuses an operation of all ranks in a simulation in which some are missing.

  Raises:
    ValueError: naming the operation.
  """
  if _bindings.current is not None:
    raise ValueError(
      f"{name}: simulate has alive= or edge_ok=, and of all operations only "
      f"neighbor_allreduce, pair_gossip and those of windows go on without missing "
      f"ranks; call {name} outside, or without them."
    )


def run(fun: Callable[[], Any], size: int, alive: Any, edge_ok: Any) -> Any:
  """Runs `fun` with missing ranks and edges."""
  present = _checked(edge_ok, (size, size), "edge_ok")
  ranks = _checked(alive, (size,), "alive")
  present &= ranks[:, None] & ranks[None, :]
  return _bindings.run(fun, Presence(present, ranks), new_marker("presence"))


def _checked(mask: Any, shape: tuple[int, ...], name: str) -> jax.Array:
  if mask is None:
    return jnp.ones(shape, bool)
  mask = jnp.asarray(mask)
  if mask.shape != shape or mask.dtype != jnp.bool_:
    raise ValueError(
      f"simulate: {name} is an array of shape {mask.shape} and dtype {mask.dtype}; "
      f"pass bools of shape {shape}, those of one call."
    )
  return mask
