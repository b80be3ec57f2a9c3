"""Delays of what is sent over windows in a simulation."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.core
import numpy as np

from jfog.runtime._bindings import Bindings, is_simulated, new_marker

# By the update in which it is sent, the destination and the source.
Delays = tuple[tuple[tuple[int, ...], ...], ...]


_bindings = Bindings[Delays]()


def window_delays(axes: Collection[str], size: int) -> Delays | None:
  """The delays of windows along these axes; None if there are none.

  Raises:
    ValueError: if their ranks are not those of the simulation.
  """
  delays = _bindings.current
  if delays is None or not is_simulated(axes):
    return None
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
  return _bindings.run(fun, delays, new_marker("delays"))
