"""Release of windows."""

import jax

from jfog import _compat
from jfog.primitives.windows._arguments import require_window
from jfog.primitives.windows._native import win_free_p
from jfog.primitives.windows._window import Window


def win_free(win: Window) -> None:
  """Frees a window. Collective on MPI; elsewhere there is nothing to free.

  From its start on other ranks' operations that would reach this rank's part are
  errors, so where ranks are at different places call `jfog.barrier` first. The
  memory is given back when all ranks have come.

  Args:
    win: the window.

  Raises:
    TypeError: if `win` is not a window.
    ValueError: if this very window was freed before.
    jax.errors.JaxRuntimeError: on MPI, if a copy of it was freed before
      (`FAILED_PRECONDITION`), or another rank does not come in time
      (`DEADLINE_EXCEEDED`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> world = jfog.init()
    >>> win = jfog.win_create(jnp.ones(2), jfog.topology.ring(1))
    >>> jfog.win_free(win)

  Source: `win_free` of BlueFog; MPI 4.0, section 12.2.5.
  """
  spec = require_window(win, "win_free")
  win._freed = True
  if spec.comm.backend in ("mesh", "single"):
    return
  ended = win_free_p.bind(win._state, fixed=1, comm=spec.comm)
  if _compat.at_top_level():
    jax.block_until_ready(ended)  # which raises what went wrong
