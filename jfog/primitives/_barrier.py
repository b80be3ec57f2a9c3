"""A barrier over all ranks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
  if not _compat.at_top_level():
    barrier_p.bind(fixed=0, comm=comm)
    return
  jax.block_until_ready(_passed(comm))
  jax.effects_barrier()


@functools.partial(jax.jit, static_argnums=0)
def _passed(comm: Communicator) -> jax.Array:
  """A barrier as a program with a result, which carries the barrier's error."""
  barrier_p.bind(fixed=0, comm=comm)
  return jnp.zeros((), jnp.bool_)


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
  attributes=lambda *leaves, comm: {"context": np.int64(comm.context)},
  on_gpus=_OnGpus(),
)
