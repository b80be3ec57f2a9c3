"""Delays of what is sent over windows in a simulation."""

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.core
import numpy as np

from jfog.runtime import _presence

# By the update in which it is sent, the destination and the source.
Delays = tuple[tuple[tuple[int, ...], ...], ...]


class _Stack(threading.local):
  """The delays of the simulations that this thread traces."""

  def __init__(self) -> None:
    self.delays: list[Delays] = []


_stack = _Stack()


def window_delays(axes: Collection[str], size: int) -> Delays | None:
  """The delays of windows along these axes; None if there are none.

  Raises:
    ValueError: if their ranks are not those of the simulation.
  """
  if not _stack.delays or not _presence.is_simulated(axes):
    return None
  delays = _stack.delays[-1]
  if len(delays[0]) != size:
    raise ValueError(
      f"win_create: simulate has delay= among {len(delays[0])} ranks, and this "
      f"communicator has {size}; use the default one, or pass win_create(delay=)."
    )
  return delays


def checked_delay(delay: Any, size: int, operation: str) -> Delays | None:
  """A delay as tuples `[t][dst][src]`; None if all are 0.

  Raises:
    TypeError: if it is not an integer.
    ValueError: if it is negative or of another shape.
  """
  if isinstance(delay, jax.core.Tracer):
    raise TypeError(
      f"{operation}: delay is traced; pass an int or a NumPy array of them."
    )
  table = np.asarray(delay)
  if not np.issubdtype(table.dtype, np.integer):
    raise TypeError(
      f"{operation}: delay has dtype {table.dtype}; it counts updates, so pass "
      f"integers."
    )
  if table.ndim == 0:
    table = np.full((size, size), table)
  if table.ndim == 2:
    table = table[None]
  if table.shape[1:] != (size, size) or len(table) == 0:
    raise ValueError(
      f"{operation}: delay has shape {np.shape(delay)}; pass an int, or an array "
      f"delay[dst, src] or delay[t, dst, src] of {size} ranks."
    )
  if table.min() < 0:
    raise ValueError(
      f"{operation}: delay has an entry {table.min()}; what is sent arrives 0 or "
      f"more updates later."
    )
  if not table.any():
    return None
  return tuple(tuple(map(tuple, matrix)) for matrix in table.tolist())


def run(fun: Callable[[], Any], delays: Delays) -> Any:
  """Runs `fun`, whose windows have these delays."""

  def body() -> Any:
    with _bound(delays):
      return fun()

  return _presence.marked(body, _presence.new_marker("delays"))


@contextlib.contextmanager
def _bound(delays: Delays) -> Iterator[None]:
  _stack.delays.append(delays)
  try:
    yield
  finally:
    _stack.delays.pop()
