"""The world: `init`, what it finds, and the default communicator."""

import atexit
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jfog import _compat
from jfog.runtime import _extensions, _gpu_placement
from jfog.runtime._communicator import (
  Axis,
  Communicator,
  NotInitializedError,
  Single,
  default_axis,
)

_BACKENDS = (None, "mpi", "nccl", "single")
_UNIQUE_ID = 128  # bytes, of NCCL
# How a launcher tells a process the number of ranks that it has started.
_LAUNCHED_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Signs of a launcher that does not tell the number.
_LAUNCHED = ("PMIX_RANK", "PMI_RANK")
# Launchers that start several copies of a program without MPI: the variables of
# the number of copies and of this copy's number, and what launches so.
_OTHER_LAUNCHERS = (
  ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
  ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
  ("WORLD_SIZE", "RANK", "torchrun or accelerate"),
  ("HOROVOD_SIZE", "HOROVOD_RANK", "horovodrun"),
  ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "flux run"),
  ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun"),
  ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "another MPI"),
)
_DEFAULT_TIMEOUT = 300.0  # seconds


@dataclasses.dataclass(frozen=True)
class MpiCommunicator(Communicator):
  """Ranks that are processes of an MPI job, one rank to a process.

  Made by `jfog.init()`; `local` and `machines` are its sub-communicators.
  """

  context: int  # its number in the native registry
  size: int
  rank: int
  # For every rank, the index of its machine; empty where all are on one.
  machine_of: tuple[int, ...] = dataclasses.field(default=(), repr=False)
  # None where they are this communicator, or one of a single rank.
  local_part: Communicator | None = dataclasses.field(default=None, repr=False)
  machines_part: Communicator | None = dataclasses.field(
    default=None, repr=False
  )
  carrier: str = "mpi"

  @property
  def backend(self) -> str:
    """`"nccl"` if this rank uses a GPU, else `"mpi"`."""
    return self.carrier

  @property
  def local(self) -> Communicator:
    """The ranks of this machine."""
    if self.local_part is not None:
      return self.local_part
    return self if self.machine_size == 1 else Single()

  @property
  def machines(self) -> Communicator:
    """The ranks that have this local rank, one of each machine.

    Raises:
      ValueError: if the machines hold different numbers of ranks.
    """
    if self.machine_size == 1:
      return Single()
    self.require_equal_machines("machines")
    return self.machines_part or self

  @property
  def machine_rank(self) -> int:
    """The index of this rank's machine."""
    return self.machine_of[self.rank] if self.machine_of else 0

  @property
  def machine_size(self) -> int:
    """The number of machines."""
    return max(self.machine_of) + 1 if self.machine_of else 1

  def ranks_of(self, machine: int) -> tuple[int, ...]:
    """The ranks on a machine, ascending."""
    if not self.machine_of:
      return tuple(range(self.size))
    return tuple(r for r, m in enumerate(self.machine_of) if m == machine)

  def require_equal_machines(self, name: str) -> None:
    """Refuses machines of different sizes, on behalf of what has that name.

    Raises:
      ValueError: naming the number of ranks on every machine.
    """
    counts = [len(self.ranks_of(m)) for m in range(self.machine_size)]
    if len(set(counts)) > 1:
      raise ValueError(
        f"{name}: the machines hold different numbers of ranks, {counts}, so "
        f"there is no rank on each for every local rank; start as many ranks on "
        f"every machine, or set local_size in jfog.init."
      )


_world: Communicator | None = None
_arguments: dict[str, Any] = {}


def init(
  *,
  backend: str | None = None,
  comm: Any = None,
  local_size: int | None = None,
  timeout: float = _DEFAULT_TIMEOUT,
) -> Communicator:
  """Makes the world communicator, and returns it.

  In a process that an MPI launcher has started (`jfog run`, `mpirun`, `srun`)
  the world is the job, and MPI is started here if nobody has. In any other
  process it is a world of one, which needs no MPI library. Collective: all
  ranks of the job call it, with equal arguments. Calling it again returns the
  world there is.

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
    timeout: seconds that an operation waits for other ranks before it fails
      with `DEADLINE_EXCEEDED`; a tenth of it into a wait a warning is printed.
      A world of one waits for nobody.

  Returns:
    The world, an `MpiCommunicator` or a world of one.

  Raises:
    ValueError: for a bad argument, a `local_size` that does not divide the
      number of ranks, or arguments that differ from those of the first call.
    RuntimeError: if this process is one of several copies that something other
      than MPI has launched (`srun` without PMI, torchrun), each of which would
      be a world of its own; if the job was launched as N ranks and MPI sees
      another number, if jfog was built without MPI but the job has several
      ranks, if MPI runs without full thread support; or with NCCL, if there is
      no GPU or no NCCL from 2.18 on, or it cannot connect the ranks in time.

  Example:
    >>> import jfog
    >>> jfog.init().size
    1
  """
  global _world, _arguments
  arguments = {"backend": backend, "comm": comm, "local_size": local_size}
  arguments["timeout"] = timeout
  if _world is not None:
    changed = [
      name
      for name, value in arguments.items()
      # The default of a later call, the object itself, asks for nothing.
      if value is not None
      and value is not _DEFAULT_TIMEOUT
      and value != _arguments[name]
    ]
    if changed:
      raise ValueError(
        f"jfog is initialized already, with {changed[0]}="
        f"{_arguments[changed[0]]!r} and not {arguments[changed[0]]!r}; call "
        f"jfog.shutdown() first."
      )
    return _world
  local_size = _check_arguments(backend, local_size, timeout)
  if backend == "single" and comm is not None:
    raise ValueError("backend='single' takes no comm; leave one of them out.")
  launched = _launched_size()
  if launched is None and comm is None and backend != "single":
    _refuse_other_launchers(os.environ)
  if (
    backend in ("mpi", "nccl")
    or comm is not None
    or (backend is None and launched is not None)
  ):
    world = _mpi_world(backend, comm, launched, local_size, float(timeout))
  else:
    if local_size not in (None, 1):
      raise ValueError(f"local_size={local_size} does not divide a world of 1.")
    world = Single()
  _world, _arguments = world, arguments
  return world


def shutdown() -> None:
  """Ends the use of the world; `init` may make another one.

  Operations that were traced for the old world are traced again. MPI itself is
  ended when the process ends, because it cannot be started twice.

  Handles that are still open end here: waiting on one is an error. What they
  stand for goes on in the background, for the other ranks may wait for it. A
  `ResourceWarning` counts them.

  Example:
    >>> import jfog
    >>> jfog.init(backend="single").size
    1
    >>> jfog.shutdown()
  """
  global _world
  world, _world = _world, None
  if isinstance(world, MpiCommunicator):
    parts = (world, world.local_part, world.machines_part)
    try:
      jax.effects_barrier()
    except jax.errors.JaxRuntimeError as error:
      print(f"jfog: before the shutdown: {error}", file=sys.stderr, flush=True)
      _compat.begin_order_anew()
    forgotten = 0
    for part in parts:
      if isinstance(part, MpiCommunicator):
        forgotten += _extensions.mpi().close(part.context)
        if part.backend == "nccl":
          forgotten += _extensions.nccl().close(part.context)
    if forgotten:
      warnings.warn(
        f"{forgotten} operations were started and never waited on.",
        ResourceWarning,
        stacklevel=2,
      )
  if world is not None:
    jax.clear_caches()


def world() -> Communicator | None:
  """The world that `init` has made, or None."""
  return _world


def resolve(comm: Communicator | None = None) -> Communicator:
  """The communicator of an operation: `comm`, the bound axis, or the world.

  Raises:
    TypeError: if `comm` is no communicator.
    NotInitializedError: if there is none of the three.
  """
  if comm is not None:
    if not isinstance(comm, Communicator):
      raise TypeError(
        f"comm={comm!r} is no jfog communicator; pass what jfog.init() "
        f"returned or jfog.Axis(name), or give an mpi4py communicator to "
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


def _check_arguments(backend, local_size, timeout) -> int | None:
  """Checks the plain arguments; returns the local size that is meant."""
  if backend not in _BACKENDS:
    raise ValueError(
      f"backend={backend!r} is not a world's; take one of {_BACKENDS}. A mesh "
      f"needs no init: use jfog.simulate, jfog.spmd or jax.shard_map."
    )
  if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
    raise TypeError(f"timeout is a number of seconds, got {timeout!r}.")
  if not timeout > 0:
    raise ValueError(f"timeout={timeout} must be positive, in seconds.")
  if local_size is None and (text := os.environ.get("JFOG_LOCAL_SIZE")):
    if not text.isdigit():
      raise ValueError(f"JFOG_LOCAL_SIZE={text!r} is not a positive number.")
    local_size = int(text)
  if local_size is None:
    return None
  if isinstance(local_size, bool) or not isinstance(local_size, int):
    raise TypeError(f"local_size is an int, got {local_size!r}.")
  if local_size < 1:
    raise ValueError(f"local_size={local_size} must be at least 1.")
  return local_size


def _launched_size() -> int | None:
  """The number of ranks this process was launched with; None if alone.

  0 stands for a launcher that does not tell.
  """
  for name in _LAUNCHED_SIZE:
    if os.environ.get(name, "").isdigit():
      return int(os.environ[name])
  return 0 if any(name in os.environ for name in _LAUNCHED) else None


def _refuse_other_launchers(environ: Mapping[str, str]) -> None:
  """Raises where this is one of several copies that MPI knows nothing about."""
  for size, rank, launcher in _OTHER_LAUNCHERS:
    if rank not in environ or not environ.get(size, "").isdigit():
      continue
    if int(environ[size]) < 2:
      continue
    if size == "SLURM_NTASKS" and not (
      "SLURM_STEP_ID" in environ or environ[rank] != "0"
    ):
      continue  # a batch script, which is started once
    raise RuntimeError(
      f"this process is one of {environ[size]} copies ({size}={environ[size]}, "
      f"{rank}={environ[rank]}) that {launcher} has started without jfog's MPI, "
      f"and each of them would be a world of its own. Start the job with `jfog "
      f"run -np {environ[size]} ...` or `srun --mpi=pmix ...`, or pass "
      f"backend='single' for worlds of one (jfog.simulate and jfog.spmd need no "
      f"init at all)."
    )


def counters(comm: MpiCommunicator) -> list[list[int]]:
  """What the native side has counted; see `jfog.diagnostics.counters`."""
  counted = _extensions.mpi().counters(comm.context)
  if comm.backend == "nccl":
    on_gpus = _extensions.nccl().counters(comm.context)
    counted = [
      [a + b for a, b in zip(*columns, strict=True)]
      for columns in zip(counted, on_gpus, strict=True)
    ]
  return counted


def reset_counters(comm: MpiCommunicator) -> None:
  """Sets them to zero."""
  _extensions.mpi().reset_counters(comm.context)
  if comm.backend == "nccl":
    _extensions.nccl().reset_counters(comm.context)


def _mpi_world(backend, comm, launched, local_size, timeout) -> MpiCommunicator:
  """Starts MPI and opens the world on it."""
  if backend == "nccl" and launched is None:
    found = _gpu_placement.gpus()  # before MPI starts for nothing
    _require_gpus([len(found.names)], found.reason)
  native = _extensions.mpi()
  # Open MPI reads its parameters at its start. Messages up to this size leave
  # without a handshake; its own limit of 4 KiB makes them several times dearer.
  for transport in ("sm", "vader"):
    os.environ.setdefault(f"OMPI_MCA_btl_{transport}_eager_limit", "65536")
  # Windows over UCX print an error where there is no UCX.
  os.environ.setdefault("OMPI_MCA_osc", "^ucx")
  _mpi4py_ends_mpi()  # before MPI is started here
  native.start()
  if comm is None:
    context = native.open_world(local_size or 0, timeout)
    _check_launched_size(launched, native.size(context))
  else:
    context = native.open_fortran(
      _fortran_handle(comm), local_size or 0, timeout
    )
  _install_hooks()
  rank, size = native.rank(context), native.size(context)
  leaders = native.machines(context)
  device = None
  if backend != "mpi":
    device = _take_gpu(backend, context, rank, leaders)
  if local_size is None:
    order = sorted(set(leaders))
    machine_of = tuple(order.index(leader) for leader in leaders)
  else:
    if size % local_size != 0:
      raise ValueError(
        f"local_size={local_size} does not divide the {size} ranks of the "
        f"world; take a divisor."
      )
    machine_of = tuple(r // local_size for r in range(size))
  return _with_parts(native, context, rank, size, machine_of, timeout, device)


def _take_gpu(
  backend: str | None, context: int, rank: int, leaders: Sequence[int]
) -> int | None:
  """Places this rank on a GPU; returns CUDA's number of it.

  None if no rank has a GPU and no `backend` was asked for. Collective: what
  ranks find differs.
  """
  found = _gpu_placement.gpus()
  count = len(found.names)
  counts = [int(text) for text in _gathered(context, f"{count:8d}")]
  if backend is None and not any(counts):
    return None
  _require_gpus(counts, found.reason)
  machine = [i for i, leader in enumerate(leaders) if leader == leaders[rank]]
  place = machine.index(rank)
  mine = _gpu_placement.identity(_gpu_placement.chosen(place, count)).hex()
  identities = _gathered(context, mine)
  sharing = identities.count(mine)
  placement = _gpu_placement.place(place, len(machine), count, sharing=sharing)
  _gpu_placement.separate_hosts(placement, rank, _extensions.nccl().version())
  return placement.index


def _require_gpus(counts: Sequence[int], reason: str) -> None:
  """Refuses ranks without a GPU; this one's `reason` is that it has none."""
  if not all(counts):
    without = [i for i, count in enumerate(counts) if not count]
    raise RuntimeError(
      f"backend='nccl' needs a GPU on every rank, and the ranks {without} have "
      f"none{': ' + reason if reason else ''}. Use backend='mpi', for arrays on "
      f"CPUs."
    )


def _gathered(context: int, text: str) -> list[str]:
  """The equally long texts of all ranks."""
  texts = _extensions.mpi().gather(context, text.encode())
  return [each.decode() for each in texts]


def _open_nccl(context: int, device: int, timeout: float) -> None:
  """Connects the ranks of a communicator by NCCL. Collective."""
  mpi, nccl = _extensions.mpi(), _extensions.nccl()
  rank, size = mpi.rank(context), mpi.size(context)
  # Two ids make a communicator in blocking mode, which launches operations from
  # the calling thread; not the default until it has been measured on a GPU.
  blocking = os.environ.get("JFOG_NCCL_BLOCKING") == "1"
  count = 2 if blocking else 1
  if blocking:
    # Since NCCL 2.22 collectives connect at their first use, and the host waits.
    os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
  unique_ids = bytes(count * _UNIQUE_ID)
  if rank == 0:
    unique_ids = b"".join(nccl.unique_id() for _ in range(count))
  (unique_ids, *_) = mpi.gather(context, unique_ids)
  nccl.create(context, unique_ids, rank, size, device, timeout)


def _with_parts(
  native, context, rank, size, machine_of: Sequence[int], timeout, device=None
) -> MpiCommunicator:
  """The world with its sub-communicators inside and across machines.

  With the number of a `device` they are connected by NCCL, too.
  """
  machines = max(machine_of) + 1
  mine = machine_of[rank]
  members = [r for r in range(size) if machine_of[r] == mine]

  def part(color, key, machine_of=()):
    made = native.split(context, color, key, timeout)
    return MpiCommunicator(
      made, native.size(made), native.rank(made), machine_of, carrier=carrier
    )

  carrier = "mpi" if device is None else "nccl"

  # A communicator of one rank needs no MPI. All others are apart from the world,
  # also where they have the same ranks: operations of two are in no order.
  local = part(mine, rank)
  across = None
  if machines > 1 and len({machine_of.count(m) for m in machine_of}) == 1:
    across = part(members.index(rank), mine, tuple(range(machines)))
  if local.size == 1:
    native.close(local.context)
    local = Single()
  if machines == 1:
    machine_of = ()
  world = MpiCommunicator(
    context, size, rank, tuple(machine_of), local, across, carrier
  )
  if device is not None:
    for comm in (world, local, across):
      if isinstance(comm, MpiCommunicator):
        _open_nccl(comm.context, device, timeout)
  return world


def _check_launched_size(launched: int | None, size: int) -> None:
  if not launched or launched == size:
    return
  raise RuntimeError(
    f"this process was launched as one of {launched} ranks, but its MPI "
    f"({_extensions.build().MPI_LIBRARY}) is a world of {size}: the launcher "
    f"belongs to another MPI. Start the job with `jfog run -np {launched} ...`, "
    f"or rebuild jfog with JFOG_MPI=system against the launcher's MPI."
  )


def _fortran_handle(comm) -> int:
  """The handle of an mpi4py communicator, if mpi4py runs on the same MPI."""
  if not hasattr(comm, "py2f"):
    raise TypeError(f"comm={comm!r} is no communicator of mpi4py.")
  from mpi4py import MPI  # the user has it: comm is one of its objects

  theirs, ours = MPI.Get_library_version(), _extensions.mpi().library_version()
  if theirs != ours:
    raise ValueError(
      f"mpi4py runs on {theirs.splitlines()[0]!r} and jfog on "
      f"{ours.splitlines()[0]!r}; install an mpi4py for jfog's MPI."
    )
  if comm == MPI.COMM_NULL:
    raise ValueError("comm is MPI.COMM_NULL; pass a communicator with ranks.")
  return comm.py2f()


@functools.cache
def _mpi4py_ends_mpi() -> bool:
  """Whether mpi4py has started MPI here, and so ends it with the process."""
  theirs = sys.modules.get("mpi4py.MPI")
  return theirs is not None and theirs.Is_initialized()


@functools.cache
def _install_hooks() -> None:
  """Ends MPI with the process, and a failed process without its peers."""
  atexit.register(_finish)
  previous = sys.excepthook

  def excepthook(kind, value, traceback):
    previous(kind, value, traceback)
    if hasattr(sys, "ps1"):  # a prompt: the process goes on
      return
    # Whatever waits for peers gives up at once, MPI is not finalized, and the
    # launcher sees a nonzero exit and ends the other ranks.
    atexit.unregister(_finish)
    _abandon(f"this rank failed with {kind.__name__}: {value}")

  sys.excepthook = excepthook


def _abandon(reason: str) -> None:
  """Fails all operations, and lets nobody wait for the peers at the end."""
  for module in _in_use():
    module.abandon(reason)
  if _mpi4py_ends_mpi():
    from mpi4py import run  # it would call MPI_Finalize, which waits

    run.set_abort_status(1)


def _finish() -> None:
  # Operations still running need their peers and MPI.
  try:
    jax.effects_barrier()
  except Exception as error:
    print(f"jfog: an operation failed at exit: {error}", file=sys.stderr)
    _abandon(f"an operation failed at exit: {error}")
  for module in _in_use():
    module.finish()


def _in_use() -> list[Any]:
  """The native modules of this process, the one that needs the other first."""
  nccl = _extensions.nccl.cache_info().currsize > 0
  return [*([_extensions.nccl()] if nccl else []), _extensions.mpi()]
