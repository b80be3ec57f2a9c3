"""Ranks that fail: who is missing, and a world of those that are left."""

import os

import jax

from jfog import _validation
from jfog.runtime import (
  _bootstrap,
  _exit,
  _extensions,
  _rank_process,
  _recording,
  _regroup,
  _role,
  _world,
)
from jfog.runtime._communicator import Communicator, NotInitializedError
from jfog.runtime._process_communicator import ProcessCommunicator


def missing_ranks(*, comm: Communicator | None = None) -> tuple[int, ...]:
  """The ranks of a communicator that have failed, as far as this rank knows.

  Local: nothing is sent. A rank that has ended by a signal, an exception or without
  `jfog.shutdown` is known a moment later on all others, within milliseconds on one
  machine. Only a job of `jfog run --fault-tolerant` outlives them.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    Their ranks in the communicator, ascending; empty in any place other than a
    fault-tolerant job.

  Raises:
    NotInitializedError: without a communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.missing_ranks()
    ()
  """
  comm = _world.resolve(comm)
  if not isinstance(comm, ProcessCommunicator):
    return ()
  return tuple(_extensions.mpi().missing(comm.context))


def is_rank_failure(error: BaseException) -> bool:
  """Whether an error of an operation is one that `jfog.recover` is for.

  These have the status `UNAVAILABLE`: a rank that the operation needs has failed, or
  another rank, which knew of one first, has called `jfog.recover` already.

  Args:
    error: an exception, as of a call of a jitted function.

  Example:
    >>> import jfog
    >>> jfog.is_rank_failure(ValueError("a bad argument"))
    False
  """
  text = str(error)
  return (
    isinstance(error, jax.errors.JaxRuntimeError)
    and "jfog: " in text
    and "[UNAVAILABLE]" in text
  )


def recover(size: int | None = None) -> Communicator:
  """Makes a world of the ranks that are left, and of spares, and returns it.

  Collective over the ranks that are left: each calls it, after an error of its own or
  after the one by which it learns that another rank has called it. They agree on
  who is left, also if further ranks fail meanwhile, and keep their order; no rank is
  special. `jfog.size()`, `jfog.rank()` and the machines are those of the new world.

  In a job of `jfog run --spares N` a spare takes the place of each lost rank, as
  long as there are some: its `jfog.init` returns the new world, whose `joined_ranks`
  are the ranks that have come in. `jfog.share_state` brings them parameters and
  optimizer state. Without a lost rank, a larger `size` lets the world grow.

  It leaves alone the arrays of the program: each rank goes on from its own
  parameters. Graphs are functions of the size and are made again, as are optimizers
  around them; programs are traced again. Open handles, windows and a timeline end
  here. Ranks may come from neighboring steps; `jfog.allreduce(step, "max")` agrees
  on one.

  Args:
    size: the number of ranks that the new world should have; by default that of the
      job at its launch. It has fewer if there are no spares left, and more if
      more ranks are. If ranks pass different sizes, the largest counts.

  Returns:
    The new world. Its `launched_ranks` has for each rank its rank at the launch, or
    that of the lost rank whose place it has taken.

  Raises:
    RuntimeError: in a job that was not started by `jfog run --fault-tolerant`, or if
      some rank that is left does not come within the timeout of `jfog.init`.
    ValueError, TypeError: if `size` is not a positive integer.
    NotInitializedError: before `jfog.init`.

  Example:
    >>> import jfog
    >>> world = jfog.init(backend="single")
    >>> jfog.recover().size  # a world of one stays as it is
    1
  """
  if size is not None:
    size = _validation.positive(size, "size")
  world = _world.world()
  if world is None:
    raise NotInitializedError("jfog.recover: call jfog.init() first.")
  if not isinstance(world, ProcessCommunicator):
    return world
  _rank_process.refuse_fork()
  _bootstrap.require_fault_tolerance("jfog.recover")
  if world.backend == "nccl":
    raise RuntimeError(
      "jfog.recover is for backend='mpi': NCCL's communicators are not made again "
      "after a failure. Start the job again from its last checkpoint."
    )
  native = _extensions.mpi()
  parts = [
    part
    for part in (world, world.local_part, world.machines_part)
    if isinstance(part, ProcessCommunicator)
  ]
  # From here on waits of this rank and of the others end with an error.
  for part in parts:
    native.interrupt(part.context)
  native.call_spares()
  _exit.wait_for_operations()
  _recording.end_open(alone=True)  # a timeline is that of one world
  for part in parts:
    native.close(part.context)
  native.reset_program_device()
  jax.clear_caches()
  made = _regroup.regroup(world.timeout, size or _role.launched())
  assert made.world is not None  # a rank of a world keeps its place
  _world.prepare(made.world, made.processes)
  _world.replace(made.world)
  _recording.begin_in_next_world(made.world, os.environ)
  return made.world
