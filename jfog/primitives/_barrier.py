"""A barrier over all ranks."""

import jax
import jax.core
import numpy as np

from jfog import _compat
from jfog.primitives import _nccl, _primitive
from jfog.runtime import Communicator, resolve


def barrier(*, comm: Communicator | None = None) -> None:
  """Waits until every rank has come here.

  Called eagerly it returns when all ranks have called it. In a jitted function
  on MPI it is an operation like the others, in program order. On a mesh nothing
  has to wait: all ranks are one program, and the call does nothing.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Raises:
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jfog
    >>> world = jfog.init()
    >>> jfog.barrier()

  Source: `barrier` of BlueFog.
  """
  comm = resolve(comm)
  if comm.backend in ("mesh", "single"):
    return
  barrier_p.bind(fixed=0, comm=comm)
  if _compat.at_top_level():
    jax.effects_barrier()


barrier_p = _primitive.define(
  "barrier",
  abstract_eval=lambda *, fixed, comm: [],
  attributes=lambda mode, *leaves, comm: {"context": np.int64(comm.context)},
  on_gpus=_nccl.OnGpus(
    send=lambda mode, fixed, leaves, *, comm: _nccl.Send(
      "barrier", _nccl.told(mode, comm, "barrier", None, leaves), []
    ),
  ),
)
