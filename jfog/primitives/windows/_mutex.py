"""Mutexes of windows."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax

from jfog import _compat, _validation
from jfog.primitives.windows import _arguments
from jfog.primitives.windows._window import Window
from jfog.runtime import mpi


@contextlib.contextmanager
def win_mutex(
  win: Window, ranks: Sequence[int] | None = None
) -> Iterator[None]:
  """Holds the mutexes of ranks, each of which one rank at a time can hold.

  Every rank has one mutex in a window. They are locked in ascending order, so two
  ranks that lock several do not deadlock, and are unlocked at the end, also after
  an exception. The operations themselves do not lock them: each is atomic.

  Operations inside are complete when the mutexes are unlocked.

  Args:
    win: the window.
    ranks: the owners of the mutexes; by default all ranks.

  Raises:
    TypeError: if `win` is not a window, or a rank is not an int.
    ValueError: for a rank out of range, or inside of a transformation such as
      `jax.jit`, which would lock the mutex while tracing.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`), or a mutex is not unlocked in time
      (`DEADLINE_EXCEEDED`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> world = jfog.init()
    >>> win = jfog.win_create(jnp.ones(2), jfog.topology.ring(1))
    >>> with jfog.win_mutex(win):
    ...   x, win = jfog.win_update(win, jnp.ones(2))

  Source: `win_mutex` of BlueFog.
  """
  spec = _arguments.require_window(win, "win_mutex")
  if not _compat.at_top_level():
    raise ValueError(
      "win_mutex cannot be traced: it locks when Python runs; use it around the "
      "jitted function."
    )
  size = spec.comm.size
  for rank in () if ranks is None else ranks:
    _validation.rank_of_comm(rank, size, "win_mutex: rank")
  if not spec.comm.is_native:
    yield
    return
  taken = sorted({int(r) for r in (range(size) if ranks is None else ranks)})
  number = int(win._state)
  jax.effects_barrier()  # earlier operations complete outside of the lock
  _native_mutex(mpi().lock_window, number, taken)
  try:
    yield
  finally:
    try:
      jax.effects_barrier()
    finally:
      _native_mutex(mpi().unlock_window, number, taken)


def _native_mutex(change: Callable, number: int, ranks: list[int]) -> None:
  """Locks or unlocks mutexes, with the error class of operations."""
  try:
    change(number, ranks)
  except RuntimeError as error:
    raise jax.errors.JaxRuntimeError(str(error)) from None
