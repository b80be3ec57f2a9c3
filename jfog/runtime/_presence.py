"""Ranks and links that are missing in a simulation."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_numbers = itertools.count()


class _Stack(threading.local):
  """The edges that are present in the simulations that this thread traces."""

  def __init__(self) -> None:
    self.present: list[tuple[jax.Array, jax.Array]] = []  # edges, ranks


_stack = _Stack()


def present_edges() -> jax.Array | None:
  """The edges that are present, by `[dst, src]`; None if none is missing."""
  return _stack.present[-1][0] if _stack.present else None


def alive_ranks() -> jax.Array | None:
  """The ranks that take part; None if none is missing."""
  return _stack.present[-1][1] if _stack.present else None


def refuse_with_missing(name: str) -> None:
  """Refuses an operation of all ranks in a simulation in which some are missing.

  Raises:
    ValueError: naming the operation.
  """
  if _stack.present:
    raise ValueError(
      f"{name}: simulate has alive= or edge_ok=, and of all operations only "
      f"neighbor_allreduce and pair_gossip go on without missing ranks; call "
      f"{name} outside, or without them."
    )


def run(fun: Callable[[], Any], size: int, alive: Any, edge_ok: Any) -> Any:
  """Runs `fun` with missing ranks and edges."""
  present = _checked(edge_ok, (size, size), "edge_ok")
  ranks = _checked(alive, (size,), "alive")
  present &= ranks[:, None] & ranks[None, :]

  def body() -> Any:
    with _bound(present, ranks):
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
def _bound(present: jax.Array, ranks: jax.Array) -> Iterator[None]:
  _stack.present.append((present, ranks))
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
