"""The world: `init`, `shutdown`, and the communicator that operations use."""

import functools
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jfog import _log, _validation
from jfog.runtime import (
  _bootstrap,
  _describe,
  _exit,
  _extensions,
  _hangs,
  _rank_process,
  _recording,
  _regroup,
  _state_signal,
  _summary,
)
from jfog.runtime._communicator import (
  Axis,
  Communicator,
  NotInitializedError,
  Single,
  default_axis,
)
from jfog.runtime._process_communicator import (
  DEFAULT_TIMEOUT,
  ProcessCommunicator,
)
from jfog.runtime._program_check import ProgramCheck

_BACKENDS = (None, "mpi", "nccl", "single")

_world: Communicator | None = None
_arguments: dict[str, Any] = {}
_program_check: ProgramCheck | None = None


def init(
  *,
  backend: str | None = None,
  comm: Any = None,
  local_size: int | None = None,
  timeout: float = DEFAULT_TIMEOUT,
  check_programs: bool | None = None,
  on_missing: str | None = None,
  hang_timeout: float | None = None,
) -> Communicator:
  """Makes the world communicator, and returns it.

  In a process of an MPI launcher (`jfog run`, `mpirun`, `srun`) the world is the
  job, and MPI starts here unless it runs already. In any other process it is a
  world of one, which needs no MPI library. Collective: all ranks of the job call
  it, with equal arguments. A second call returns the same world.

  On a spare of `jfog run --spares` it waits until `jfog.recover` of the others takes
  this process in, and returns their new world; if they never do, the process ends
  here with them.

  Args:
    backend: `"mpi"` or `"nccl"`, for arrays on CPUs or GPUs, equal on all ranks;
      or `"single"` for a world of one. By default what the process was launched
      as, with NCCL where JAX has GPUs. With NCCL every rank is given a GPU of its
      machine, if there are enough, before JAX starts to use them, so call this
      before other things of JAX. Operations on CPU arrays go by MPI in any case.
    comm: a communicator of mpi4py whose ranks are to be the world instead.
    local_size: makes consecutive ranks into pretended machines of that many
      ranks. By default machines are those that share memory; the environment
      variable `JFOG_LOCAL_SIZE` stands in for the argument.
    timeout: seconds that this call (at least 15) and later each operation wait for
      other ranks before they fail with `DEADLINE_EXCEEDED`; a tenth of it into a wait
      of an operation a warning is printed. A world of one never waits. By default
      300, or the environment variable `JFOG_TIMEOUT`.
    check_programs: whether ranks compare their programs before they compile
      them: each jitted function with operations in which all ranks take part
      waits for that of the other ranks, and is a `RuntimeError` on all of them if
      the operations differ, naming both sides. A diagnostic: correct programs of
      ranks may differ, or be compiled at other times. By default False, or the
      environment variable `JFOG_CHECK_PROGRAMS`.
    on_missing: what becomes of operations that wait for a rank that has failed, in
      a job of `jfog run --fault-tolerant`: `"error"`, the default, or
      `"reweight"`, with which `jfog.neighbor_allreduce` and `jfog.pair_gossip` go on
      without it, and its weight goes to the own value, and windows without its slots.
      Any other operation that needs the rank is an error (`UNAVAILABLE`) either
      way. `jfog.recover` keeps it.
    hang_timeout: seconds, in a job of `jfog run --fault-tolerant`, and less than
      `timeout`. A rank is stuck, and its process is ended, if another one has waited
      for it in an operation for longer than this and than
      `median + 20 * deviation` of the last 256 times from one operation to the next,
      and it waits in no operation itself. It then is a failed rank, as
      `on_missing` and `jfog.recover` take it. Nothing is ended before 16 operations
      have been done. Make it longer than any pause of one rank, such as the writing
      of a checkpoint. By default off, or the environment variable
      `JFOG_HANG_TIMEOUT`.

  Returns:
    The world, an `ProcessCommunicator` or a world of one.

  Raises:
    SystemExit: with code 0 on a spare, when all ranks of the world have ended.
    ValueError: for a bad argument, a `local_size` that does not divide the
      number of ranks, or arguments that differ from those of the first call.
    RuntimeError: if this process is one of several copies that something other
      than MPI has launched (`srun` without PMI, torchrun), each of which would
      be a world of its own; if the job was launched as N ranks and MPI sees
      another number, if jfog was built without MPI but the job has several
      ranks, if MPI runs without full thread support; if this process is a
      descendant of a rank and not the rank itself, which `backend="single"`
      allows; if some rank does not come within `timeout`; or with NCCL, if
      there is no GPU or no NCCL from 2.18 on, or it cannot connect the ranks in
      time.

  Example:
    >>> import jfog
    >>> jfog.init().size
    1
  """
  global _world, _arguments
  arguments = {"backend": backend, "comm": comm, "local_size": local_size}
  arguments["timeout"] = timeout
  arguments["check_programs"] = check_programs
  arguments["on_missing"] = on_missing
  arguments["hang_timeout"] = hang_timeout
  if isinstance(_world, ProcessCommunicator) and _rank_process.is_fork():
    if backend != "single":
      _rank_process.refuse_fork()
    shutdown()  # of the rank's world, which this fork has inherited
  if _world is not None:
    changed = [
      name
      for name, value in arguments.items()
      # An argument left out of a later call matches; the default timeout is
      # identified by identity, so that timeout=300.0 is compared.
      if value is not None
      and value is not DEFAULT_TIMEOUT
      and value != _arguments[name]
    ]
    if changed:
      raise ValueError(
        f"jfog is initialized already, with {changed[0]}="
        f"{_arguments[changed[0]]!r} and not {arguments[changed[0]]!r}; call "
        f"jfog.shutdown() first."
      )
    return _world
  _log.configure(os.environ)
  local_size = _check_arguments(backend, local_size, timeout)
  _check_on_missing(on_missing)
  if timeout is DEFAULT_TIMEOUT:
    timeout = arguments["timeout"] = (
      _seconds(os.environ, "JFOG_TIMEOUT") or DEFAULT_TIMEOUT
    )
  if hang_timeout is None:
    hang_timeout = _seconds(os.environ, "JFOG_HANG_TIMEOUT")
    arguments["hang_timeout"] = hang_timeout
  _check_hang_timeout(hang_timeout, timeout)
  if check_programs is None:
    check_programs = _is_on(os.environ, "JFOG_CHECK_PROGRAMS")
    arguments["check_programs"] = check_programs
  _is_on(os.environ, "JFOG_SUMMARY")  # refuses a bad value before MPI starts
  if backend == "single" and comm is not None:
    raise ValueError("backend='single' takes no comm; leave one of them out.")
  launched = _bootstrap.launched_size()
  is_spare = False
  if launched is None and comm is None and backend != "single":
    _bootstrap.refuse_other_launchers(os.environ)
  if (
    backend in ("mpi", "nccl")
    or comm is not None
    or (backend is None and launched is not None)
  ):
    reweights = on_missing == "reweight"
    if reweights:
      _bootstrap.require_fault_tolerance("on_missing='reweight'")
    if hang_timeout is not None:
      _bootstrap.require_fault_tolerance("hang_timeout")
    world = _bootstrap.open_processes(
      backend, comm, launched, local_size, float(timeout)
    )
    is_spare = world is None
    processes = None
    if world is None:
      made = _regroup.stand_by(float(timeout))
      world, processes = made.world, made.processes
      assert world is not None
    for name, is_on in (
      ("on_missing='reweight'", reweights),
      ("hang_timeout", hang_timeout is not None),
    ):
      if is_on and world.backend == "nccl":
        raise ValueError(
          f"{name} is for backend='mpi': NCCL cannot go on without a rank; leave "
          f"it out."
        )
    _arguments = arguments
    prepare(world, processes)
  else:
    if local_size not in (None, 1):
      raise ValueError(f"local_size={local_size} does not divide a world of 1.")
    world = Single()
  if is_spare:
    _recording.begin_in_next_world(world, os.environ)
  else:
    _recording.begin_from_environment(world, os.environ)
  _world, _arguments = world, arguments
  if isinstance(world, ProcessCommunicator):
    # All ranks begin the check together, in the first world.
    _watch(world, bool(check_programs) and not is_spare)
  _describe.log_world(world)
  return world


def _watch(world: ProcessCommunicator, check_programs: bool) -> None:
  """Sets up the diagnostics of a world of processes."""
  global _program_check
  _state_signal.install()
  _summary.begin_summary(world)
  if check_programs:
    _program_check = ProgramCheck(world)
  if _is_on(os.environ, "JFOG_SUMMARY"):
    _exit.before_finish = functools.partial(_summary.print_at_end, world)


def shutdown() -> None:
  """Ends the use of the world; `init` may make another one.

  Operations that were traced for the old world are traced again. MPI itself is
  ended when the process ends, because it cannot be started twice.

  Open handles end here: waiting on one is an error. Their operations complete in
  the background, because other ranks may wait for them. A `ResourceWarning`
  counts them.

  Example:
    >>> import jfog
    >>> jfog.init(backend="single").size
    1
    >>> jfog.shutdown()
  """
  global _world
  # From here on operations are refused in Python, before the parts are closed.
  world, _world = _world, None
  if isinstance(world, ProcessCommunicator) and _rank_process.is_rank():
    parts = (world, world.local_part, world.machines_part)
    error = _exit.wait_for_operations()
    _recording.end_open(alone=True)  # a shutdown does not wait for other ranks
    if error:
      print(f"jfog: before the shutdown: {error}", file=sys.stderr, flush=True)
    elif _exit.before_finish is not None:
      _exit.before_finish()
    _exit.before_finish = None
    _end_program_check()
    open_handles = 0
    for part in parts:
      # Parts of one rank have no communicator.
      if isinstance(part, ProcessCommunicator):
        open_handles += _extensions.mpi().close(part.context)
        if part.backend == "nccl":
          open_handles += _extensions.nccl().close(part.context)
    _extensions.mpi().reset_program_device()
    if open_handles:
      warnings.warn(
        f"{open_handles} operations were started and never waited on.",
        ResourceWarning,
        stacklevel=2,
      )
  # Programs hold the communicator's number as a constant, and are traced again
  # for the next one.
  if world is not None:
    jax.clear_caches()
    _log.logger.info("shutdown of the world of %d", world.size)
    _log.set_rank(None)


def world() -> Communicator | None:
  """The world communicator of `init`; None before it."""
  return _world


def resolve(comm: Communicator | None = None) -> Communicator:
  """The communicator of an operation: `comm`, the bound axis, or the world.

  Raises:
    TypeError: if `comm` is not a communicator.
    NotInitializedError: without any of the three.
  """
  if comm is not None:
    if not isinstance(comm, Communicator):
      raise TypeError(
        f"comm={comm!r} is not a jfog communicator; pass the result of "
        f"jfog.init() or jfog.Axis(name), or give an mpi4py communicator to "
        f"jfog.init(comm=...)."
      )
    if isinstance(comm, Axis):
      comm.require_bound()
    return comm
  found = default_axis() or _world
  if found is None:
    raise NotInitializedError(
      "there is no communicator here: call jfog.init() first, run the function "
      "inside jfog.simulate, jfog.spmd or a jax.shard_map over an axis named "
      "'jfog', or pass comm=."
    )
  return found


def rank() -> Any:
  """This rank in the default communicator: an int, or traced on a mesh.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: x + jfog.rank(), 3)(jnp.zeros(3))
    Array([0., 1., 2.], dtype=float32)
  """
  return resolve().rank


def size() -> int:
  """The number of ranks of the default communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: x + jfog.size(), 3)(jnp.zeros(3))
    Array([3., 3., 3.], dtype=float32)
  """
  return resolve().size


def is_homogeneous() -> bool:
  """Whether all machines hold the same number of ranks.

  `jfog.hierarchical_neighbor_allreduce` and `comm.machines` need it.

  Example:
    >>> import jfog
    >>> world = jfog.init()
    >>> jfog.is_homogeneous()
    True
  """
  return resolve().is_homogeneous


def local_rank() -> Any:
  """This rank's place on its machine, in the default communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> x = jnp.zeros(4)
    >>> jfog.simulate(lambda x: x + jfog.local_rank(), 4, local_size=2)(x)
    Array([0., 1., 0., 1.], dtype=float32)
  """
  return resolve().local_rank


def local_size() -> int:
  """The number of ranks on this machine, in the default communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> x = jnp.zeros(4)
    >>> jfog.simulate(lambda x: x + jfog.local_size(), 4, local_size=2)(x)
    Array([2., 2., 2., 2.], dtype=float32)
  """
  return resolve().local_size


def machine_rank() -> Any:
  """The index of this rank's machine, in the default communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> x = jnp.zeros(4)
    >>> jfog.simulate(lambda x: x + jfog.machine_rank(), 4, local_size=2)(x)
    Array([0., 0., 1., 1.], dtype=float32)
  """
  return resolve().machine_rank


def machine_size() -> int:
  """The number of machines of the default communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> x = jnp.zeros(4)
    >>> jfog.simulate(lambda x: x + jfog.machine_size(), 4, local_size=2)(x)
    Array([2., 2., 2., 2.], dtype=float32)
  """
  return resolve().machine_size


def prepare(
  made: ProcessCommunicator, processes: Sequence[_hangs.Process] | None
) -> None:
  """Sets what the arguments of `init` say about failures in a new world.

  Args:
    made: the new world.
    processes: of its ranks; None to gather them, which is collective.
  """
  if _arguments.get("on_missing") == "reweight":
    _bootstrap.let_go_on(made)
  hang_timeout = _arguments.get("hang_timeout")
  if hang_timeout is not None:
    processes = processes or _hangs.gathered(made)
    _hangs.find_hangs(made, float(hang_timeout), processes)


def replace(made: ProcessCommunicator) -> None:
  """Makes the result of a recovery the world."""
  global _world
  _world = made
  _end_program_check()
  _watch(made, check_programs=False)


def _end_program_check() -> None:
  global _program_check
  if _program_check is not None:
    _program_check.close()
    _program_check = None


def _check_on_missing(on_missing: Any) -> None:
  if on_missing not in (None, "error", "reweight"):
    raise ValueError(
      f"on_missing={on_missing!r} must be 'error' or 'reweight'."
    )


def _check_hang_timeout(hang_timeout: Any, timeout: float) -> None:
  if hang_timeout is None:
    return
  if not isinstance(hang_timeout, (int, float)) or isinstance(
    hang_timeout, bool
  ):
    raise TypeError(
      f"hang_timeout={hang_timeout!r} must be a number of seconds."
    )
  if not 0 < hang_timeout < timeout:
    raise ValueError(
      f"hang_timeout={hang_timeout} must be positive and less than timeout={timeout}, "
      f"after which an operation fails in any case."
    )


def _seconds(environ: Mapping[str, str], name: str) -> float | None:
  """The value of a variable in seconds; None if it is unset."""
  text = environ.get(name)
  if not text:
    return None
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  if not seconds > 0:
    raise ValueError(
      f"{name}={text!r} must be a positive number of seconds; correct it, or "
      f"unset it for the default."
    )
  return seconds


def _is_on(environ: Mapping[str, str], name: str) -> bool:
  """Whether a variable is 1, and not 0 or unset."""
  text = environ.get(name, "")
  if text not in ("", "0", "1"):
    raise ValueError(
      f"{name}={text!r} must be 0 or 1; correct it, or unset it."
    )
  return text == "1"


def _check_arguments(backend: Any, local_size: Any, timeout: Any) -> int | None:
  """Checks plain arguments; returns `local_size`, also from JFOG_LOCAL_SIZE."""
  if backend not in _BACKENDS:
    raise ValueError(
      f"backend={backend!r} must be one of {_BACKENDS}. A mesh needs no init: "
      f"use jfog.simulate, jfog.spmd or jax.shard_map."
    )
  if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
    raise TypeError(f"timeout={timeout!r} must be a number of seconds.")
  if not timeout > 0:
    raise ValueError(f"timeout={timeout} must be positive, in seconds.")
  if local_size is None and (text := os.environ.get("JFOG_LOCAL_SIZE")):
    if not text.isdigit():
      raise ValueError(f"JFOG_LOCAL_SIZE={text!r} is not a positive number.")
    local_size = int(text)
  if local_size is None:
    return None
  return _validation.positive(local_size, "local_size")
