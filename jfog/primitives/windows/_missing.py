"""The ranks of a window that have failed, as an array."""

from typing import Any

import jax
import jax.numpy as jnp

from jfog.primitives import _operation
from jfog.primitives._operation import Operation
from jfog.primitives.windows import _arguments, _mesh, _native
from jfog.primitives.windows._window import Window


@_operation.operation
def win_missing(win: Window) -> Any:
  """Which ranks have failed, as this rank knows now.

  What a program sends to them goes nowhere, where it goes on without them: one that
  splits its value over the out-neighbors, as push-sum does, keeps their part. Nothing
  is communicated. See `jfog.missing_ranks` for the same outside of `jax.jit`.

  Args:
    win: the window.

  Returns:
    A bool array of shape `(size,)`, by rank. All false but in a job of
    `jfog run --fault-tolerant` and in `jfog.simulate(alive=)`.

  Raises:
    TypeError: if `win` is not a window.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3)
    >>> def program(x):
    ...   return jfog.win_missing(jfog.win_create(x, graph)).sum()
    >>> jfog.simulate(program, 3)(jnp.zeros(3))
    Array([0, 0, 0], dtype=int32)
  """
  spec = _arguments.require_window(win, "win_missing")
  result, structure = jnp.zeros(spec.comm.size, bool), jax.tree.structure(0)
  if spec.comm.backend in ("mesh", "single"):
    gone = _mesh.missing(spec)
    return Operation([result], structure, [result if gone is None else gone])
  return Operation(
    [result],
    structure,
    comm=spec.comm,
    primitive=_native.win_missing_p,
    fixed=(win._state,),
    params={"comm": spec.comm},
  )
