"""The way of all ranks that are left, and of spares, to a new world."""

import contextlib
import dataclasses
import time
from typing import Any

from jfog.runtime import (
  _bootstrap,
  _extensions,
  _hangs,
  _rank_process,
  _role,
)
from jfog.runtime._process_communicator import (
  ProcessCommunicator,
  numbered_by_layout,
)
from jfog.runtime._start import Start

_NAP = 0.05  # seconds between two looks of a spare


@dataclasses.dataclass
class Regrouped:
  """The next world, as one rank of the job sees it."""

  role: _role.Role
  members: set[int]  # the ranks of the world, as they are numbered in the job
  world: ProcessCommunicator | None = None  # None on a spare
  processes: tuple[_hangs.Process, ...] = ()  # of the ranks of the world


def regroup(timeout: float, wanted: int) -> Regrouped:
  """Makes the next world. Collective over the ranks of the job that are left.

  Args:
    timeout: seconds, of the call and of each operation in the new world.
    wanted: the number of ranks that it should have, if there are spares enough.
  """
  native = _extensions.mpi()
  made = _Regroup(timeout, None).call(_until_agreed, native, timeout, wanted)
  if _role.role().place < 0 <= made.role.place:
    _rank_process.keep_programs(made.role.place)
  _role.change(made.role)
  if made.world is not None:
    made.world = numbered_by_layout(made.world)
  return made


def stand_by(timeout: float) -> Regrouped:
  """Waits, as a spare, for a place in a world; returns what it is then.

  Raises:
    SystemExit: with code 0, when all ranks of the world have ended.
  """
  native = _extensions.mpi()
  members = set(range(_role.launched()))
  _rank_process.mark("spare")
  while True:
    is_called, failed = native.look_as_spare()
    if is_called:
      made = regroup(timeout, 0)
      members = made.members
      if made.world is not None:
        _rank_process.mark("joined")
        return made
    elif members <= set(failed):
      raise SystemExit(0)
    time.sleep(_NAP)


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


def _until_agreed(native: Any, timeout: float, wanted: int) -> Regrouped:
  """Makes the world again until all ranks that are left have it. Collective."""
  while True:
    native.shrink_job()
    made = None
    # An error here is the failure of one more rank.
    with contextlib.suppress(RuntimeError):
      made = _attempt(native, timeout, wanted)
    if native.agree_on_survivors(made is not None) and made is not None:
      return made
    # The communicators of this attempt stay behind, failed.


def _attempt(native: Any, timeout: float, wanted: int) -> Regrouped:
  process, host = _hangs.this_process()
  own = dataclasses.replace(
    _role.role(), wanted=wanted, process=process, host=host
  )
  texts = native.gather_in_start(own.packed())
  roles = _role.next_roles(
    [_role.Role.unpacked(text) for text in texts], _role.local_size()
  )
  (own,) = (role for role in roles if role.number == own.number)
  made = Regrouped(own, {i for i, role in enumerate(roles) if role.place >= 0})
  context = native.open_in_start(own.place, own.machine, timeout)
  if own.place < 0:
    return made
  members = sorted(
    (role for role in roles if role.place >= 0), key=lambda role: role.place
  )
  made.processes = tuple((role.process, role.host) for role in members)
  machines = sorted({role.machine for role in members})
  made.world = _bootstrap.with_parts(
    native,
    _Direct(timeout),
    context,
    native.rank(context),
    native.size(context),
    tuple(machines.index(role.machine) for role in members),
    launched_ranks=tuple(role.place for role in members),
    joined_ranks=tuple(
      rank for rank, role in enumerate(members) if not role.has_state
    ),
  )
  return made
