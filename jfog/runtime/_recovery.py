"""Ranks that fail: who is missing, and a world of those that are left."""

import contextlib
from typing import Any

import jax

from jfog.runtime import _bootstrap, _exit, _extensions, _rank_process, _world
from jfog.runtime._communicator import Communicator, NotInitializedError
from jfog.runtime._process_communicator import ProcessCommunicator
from jfog.runtime._start import Start


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


def recover() -> Communicator:
  """Makes a world of the ranks that are left, and returns it.

  Collective over them: each rank that is left calls it, after an error of its own or
  after the one by which it learns that another rank has called it. They agree on
  who is left, also if further ranks fail meanwhile, and keep their order; no rank is
  special. `jfog.size()`, `jfog.rank()` and the machines are those of the new world,
  and `launched_ranks` of the world that is returned has the ranks as they were
  launched.

  It leaves alone the arrays of the program: each rank goes on from its own
  parameters. Graphs are functions of the size and are made again, as are optimizers
  around them; programs are traced again. Open handles and windows end here. Ranks
  may come from neighboring steps; `jfog.allreduce(step, "max")` agrees on one.

  Returns:
    The new world.

  Raises:
    RuntimeError: in a job that was not started by `jfog run --fault-tolerant`, or if
      some rank that is left does not come within the timeout of `jfog.init`.
    NotInitializedError: before `jfog.init`.

  Example:
    >>> import jfog
    >>> world = jfog.init(backend="single")
    >>> jfog.recover().size  # a world of one stays as it is
    1
  """
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
  _exit.wait_for_operations()
  for part in parts:
    native.close(part.context)
  native.reset_program_device()
  jax.clear_caches()
  made = _Regroup(world.timeout, None).call(_regroup, native, world)
  if _world.goes_on():
    _bootstrap.let_go_on(made)
  _world.replace(made)
  return made


class _Regroup(Start):
  """Calls that wait for the ranks that are left, some of which may fail."""

  def _look(self) -> None:
    _extensions.mpi().look_at_start()

  def _late(self) -> str:
    return (
      f"DEADLINE_EXCEEDED: jfog: recover on rank {_rank_process.rank()} has waited "
      f"{self._limit:g} s for the other ranks. All ranks that are left call "
      f"jfog.recover; if some come late, pass a longer jfog.init(timeout=)."
    )


class _Direct:
  """Calls in a thread that `_Regroup` waits for already."""

  def __init__(self, timeout: float):
    self.timeout = timeout

  def call(self, function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def _regroup(native: Any, old: ProcessCommunicator) -> ProcessCommunicator:
  """Makes the world again until all ranks that are left have it. Collective."""
  while True:
    native.shrink_world()
    made = None
    # An error here is the failure of one more rank.
    with contextlib.suppress(RuntimeError):
      made = _open(native, old)
    if native.agree_on_survivors(made is not None) and made is not None:
      return made
    # The communicators of this attempt stay behind, failed.


def _open(native: Any, old: ProcessCommunicator) -> ProcessCommunicator:
  context = native.open_survivors(old.machine_rank, old.timeout)
  mine = f"{old.rank:12d}{old.machine_rank:12d}".encode()
  texts = native.gather(context, mine)
  ranks = [int(text[:12]) for text in texts]
  machines = [int(text[12:]) for text in texts]
  order = sorted(set(machines))
  launched = old.launched_ranks or tuple(range(old.size))
  return _bootstrap.with_parts(
    native,
    _Direct(old.timeout),
    context,
    native.rank(context),
    native.size(context),
    tuple(order.index(machine) for machine in machines),
    launched_ranks=tuple(launched[rank] for rank in ranks),
  )
