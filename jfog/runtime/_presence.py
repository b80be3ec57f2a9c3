"""Ranks and links that are missing in a simulation."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jfog.runtime._communicator import AXIS_NAME, LOCAL_AXIS_NAME

_numbers = itertools.count()


class Presence(NamedTuple):
  """Ranks and edges that take part in a simulation."""

  edges: jax.Array  # shape=(size, size), bool, by `[dst, src]`
  ranks: jax.Array  # shape=(size,), bool


class _Stack(threading.local):
  """Ranks and edges that take part in the simulations that this thread traces."""

  def __init__(self) -> None:
    self.present: list[Presence] = []


_stack = _Stack()


def is_simulated(axes: Collection[str]) -> bool:
  """Whether the axes may be those of `simulate`."""
  return AXIS_NAME in axes or LOCAL_AXIS_NAME in axes


def presence(axes: Collection[str], size: int, name: str) -> Presence | None:
  """Ranks and edges that take part along these axes; None if none is missing.

  Raises:
    ValueError: if its ranks are not those of the simulation.
  """
  if not _stack.present or not is_simulated(axes):
    return None
  present = _stack.present[-1]
  if len(present.ranks) != size:
    raise ValueError(
      f"{name}: simulate has alive= or edge_ok= of {len(present.ranks)} ranks, and "
      f"this communicator has {size}; use the default one."
    )
  return present


def alive_ranks() -> jax.Array | None:
  """The ranks of the simulation that take part; None if none is missing."""
  return _stack.present[-1].ranks if _stack.present else None


def present_edges() -> jax.Array | None:
  """The edges of the simulation that are present; None if none is missing."""
  return _stack.present[-1].edges if _stack.present else None


def refuse_with_missing(name: str) -> None:
  """Refuses an operation of all ranks in a simulation in which some are missing.

  Raises:
    ValueError: naming the operation.
  """
  if _stack.present:
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

  def body() -> Any:
    with _bound(Presence(present, ranks)):
      return fun()

  return marked(body, new_marker("presence"))


def new_marker(kind: str) -> str:
  """A name for `marked` that was not used before."""
  return f"jfog_{kind}_{next(_numbers)}"


def marked(fun: Callable[[], Any], marker: str) -> Any:
  """Runs `fun` inside of an axis of that name.

  The name of a bound axis is part of the key of JAX's caches: a function that is
  jitted inside of `fun` is traced again, and not taken from another simulation.
  """
  run = jax.vmap(lambda _: fun(), out_axes=None, axis_name=marker)
  return run(jnp.zeros(1))


@contextlib.contextmanager
def _bound(present: Presence) -> Iterator[None]:
  _stack.present.append(present)
  try:
    yield
  finally:
    _stack.present.pop()


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
