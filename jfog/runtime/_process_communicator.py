"""Communicators of processes: the ranks of an MPI job, and their counters."""

import dataclasses
import hashlib

from jfog.runtime import _extensions
from jfog.runtime._communicator import Communicator, Single

DEFAULT_TIMEOUT = 300.0  # seconds


@dataclasses.dataclass(frozen=True)
class ProcessCommunicator(Communicator):
  """The ranks of an MPI job, one process each; data moves by MPI or NCCL.

  Made by `jfog.init()`; `local` and `machines` are its sub-communicators. Two
  communicators are equal if their native ones are the same; the timeout belongs
  to the native one and takes no part in the comparison.
  """

  context: int  # key of the native communicator in the extension's registry
  size: int
  rank: int
  # The index of each rank's machine; empty if all ranks share one machine.
  machine_of: tuple[int, ...] = ()
  # None if the part is this communicator itself or has a single rank.
  local_part: Communicator | None = None
  machines_part: Communicator | None = None
  carrier: str = "mpi"  # or "nccl", for arrays on GPUs
  timeout: float = dataclasses.field(  # seconds, of every operation
    default=DEFAULT_TIMEOUT, compare=False
  )
  launched_ranks: tuple[int, ...] = dataclasses.field(default=(), compare=False)
  joined_ranks: tuple[int, ...] = dataclasses.field(default=(), compare=False)

  def __repr__(self) -> str:
    machines = self.machine_size
    return (
      f"<jfog communicator: rank {self.rank} of {self.size}, {self.backend}, "
      f"{machines} machine{'s' if machines > 1 else ''}>"
    )

  def __hash__(self) -> int:
    # Of the key alone: operations are looked up by their communicator.
    return hash(self.context)

  @property
  def is_native(self) -> bool:
    """`True`: operations are FFI handlers over MPI or NCCL."""
    return True

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

  @property
  def is_homogeneous(self) -> bool:
    """Whether all machines hold the same number of ranks."""
    counts = [len(self.ranks_of(m)) for m in range(self.machine_size)]
    return len(set(counts)) == 1

  def ranks_of(self, machine: int) -> tuple[int, ...]:
    """The ranks on a machine, ascending."""
    if not self.machine_of:
      return tuple(range(self.size))
    return tuple(r for r, m in enumerate(self.machine_of) if m == machine)

  def require_equal_machines(self, name: str) -> None:
    """Requires the same number of ranks on every machine.

    Args:
      name: the operation that requires it, for the message.

    Raises:
      ValueError: naming the number of ranks on every machine.
    """
    if not self.is_homogeneous:
      counts = [len(self.ranks_of(m)) for m in range(self.machine_size)]
      raise ValueError(
        f"{name}: the machines hold different numbers of ranks, {counts}; "
        f"start as many ranks on every machine, or set local_size in jfog.init."
      )


def numbered_by_layout(world: ProcessCommunicator) -> ProcessCommunicator:
  """The world, its native communicators numbered by what programs see of them.

  Programs hold the number as a constant. A recovered world of the same size, in
  which the machines and this rank are the same, so has the same programs, and
  JAX finds them in its persistent cache. A communicator of an earlier world that
  is still passed either stands for the new one, or its number is not found.
  """

  def renumbered(comm: ProcessCommunicator, name: str) -> ProcessCommunicator:
    layout = repr((name, comm.size, comm.rank, comm.machine_of)).encode()
    digest = hashlib.blake2b(layout, digest_size=7).digest()
    number = 1 << 60 | int.from_bytes(digest)  # above those that are counted up
    _extensions.mpi().renumber(comm.context, number)
    return dataclasses.replace(comm, context=number)

  local, machines = world.local_part, world.machines_part
  if isinstance(local, ProcessCommunicator):
    local = renumbered(local, "local")
  if isinstance(machines, ProcessCommunicator):
    machines = renumbered(machines, "machines")
  return dataclasses.replace(
    renumbered(world, "world"), local_part=local, machines_part=machines
  )


def counters(comm: ProcessCommunicator) -> list[list[int]]:
  """The native counters, MPI's and NCCL's summed.

  Returns:
    Bytes sent, bytes received and messages sent, each a list over peers, then
    `[operations, consistency checks]`, and averages without each peer; see
    `jfog.diagnostics.counters`.
  """
  *counted, missing = _extensions.mpi().counters(comm.context)
  if comm.backend == "nccl":
    on_gpus = _extensions.nccl().counters(comm.context)
    counted = [
      [a + b for a, b in zip(*columns, strict=True)]
      for columns in zip(counted, on_gpus, strict=True)
    ]
  return [*counted, missing]


def reset_counters(comm: ProcessCommunicator) -> None:
  """Resets the native counters of a communicator to zero."""
  _extensions.mpi().reset_counters(comm.context)
  if comm.backend == "nccl":
    _extensions.nccl().reset_counters(comm.context)


# The name before NCCL was a second carrier.
MpiCommunicator = ProcessCommunicator
