"""Mutexes of windows."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jfog import _compat
from jfog.primitives.windows import _arguments
from jfog.primitives.windows._window import Window
from jfog.runtime import mpi


@contextlib.contextmanager
def win_mutex(
  win: Window, ranks: Sequence[int] | None = None
) -> Iterator[None]:
  """Excludes all others that take the mutex of one of the same ranks.

  Every rank has one mutex in a window. They are taken in ascending order, so two
  who take several do not block each other, and are given back at the end, also
  after an exception. They do not change what the operations do: each of those is
  atomic by itself.

  Operations inside are complete when the mutexes are given back.

  Args:
    win: the window.
    ranks: whose mutexes to take; by default those of all ranks.

  Raises:
    TypeError: if `win` is no window, or a rank is no int.
    ValueError: for a rank that is none, or inside of a transformation such as
      `jax.jit`, which would take the mutex while it traces.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`), or a mutex is not given back in time
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
      "win_mutex is taken where Python runs, and this is traced; call it around "
      "the jitted function."
    )
  size = spec.comm.size
  for rank in () if ranks is None else ranks:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
      raise TypeError(f"win_mutex: {rank!r} in ranks is no rank; pass ints.")
    if not 0 <= rank < size:
      raise ValueError(f"win_mutex: {rank} in ranks is no rank of {size}.")
  if spec.comm.backend not in ("mpi", "nccl"):
    yield
    return
  taken = sorted({int(r) for r in (range(size) if ranks is None else ranks)})
  number = int(win._state)
  jax.effects_barrier()  # what was called before is done before
  _native_mutex(mpi().lock_window, number, taken)
  try:
    yield
  finally:
    try:
      jax.effects_barrier()
    finally:
      _native_mutex(mpi().unlock_window, number, taken)


def _native_mutex(change: Callable, number: int, ranks: list[int]) -> None:
  """Takes or gives back mutexes, with errors like those of operations."""
  try:
    change(number, ranks)
  except RuntimeError as error:
    raise jax.errors.JaxRuntimeError(str(error)) from None
