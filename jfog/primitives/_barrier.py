"""A barrier over all ranks."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jfog import _compat
from jfog.primitives import _primitive, nccl
from jfog.runtime import Communicator, resolve


def barrier(*, comm: Communicator | None = None) -> None:
  """Waits until all ranks have reached the barrier.

  Called eagerly it returns when all ranks have called it. In a jitted function
  on MPI it is an operation like the others, in program order. On a mesh nothing
  has to wait: all ranks are one program, and the call does nothing.

  Args:
    comm: the communicator; by default the current one, see `jfog.init`.

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
  if not comm.is_native:
    return
  barrier_p.bind(fixed=0, comm=comm)
  if _compat.at_top_level():
    jax.effects_barrier()


class _OnGpus(nccl.Rendition):
  """One call without operands."""

  def encode(
    self, mode: nccl.Mode, scalars: Sequence[Any], leaves: Any, *, comm: Any
  ) -> nccl.Send:
    """The call."""
    del scalars
    attributes = nccl.common_attributes(mode, comm, "barrier", None, leaves)
    return nccl.Send("barrier", attributes, [])


barrier_p = _primitive.define(
  "barrier",
  abstract_eval=lambda *, fixed, comm: [],
  attributes=lambda mode, *leaves, comm: {"context": np.int64(comm.context)},
  on_gpus=_OnGpus(),
)
