"""The role of this process in a fault-tolerant job: its place, or that of a spare."""

import dataclasses
import itertools
import struct
from collections.abc import Sequence

_FORMAT = struct.Struct("<7q")


@dataclasses.dataclass(frozen=True)
class Role:
  """The part of a rank of the job in a world, and on the way to the next one.

  Places number the ranks of a world as they were launched. A rank keeps its place
  for good, and a spare that comes in gets that of a lost rank.
  """

  number: int  # in the job as it was launched, spares included
  place: int  # -1: a spare
  # The machine: its lowest number; of pretended machines their index.
  machine: int
  has_state: bool  # False from the time it comes in until share_state has ended
  wanted: int = 0  # ranks of the next world, if there are spares enough
  # Its process, and a hash of where that number is valid.
  process: int = 0
  host: int = 0

  def packed(self) -> bytes:
    """The role as bytes, of one length for all."""
    return _FORMAT.pack(*map(int, dataclasses.astuple(self)))

  @classmethod
  def unpacked(cls, text: bytes) -> "Role":
    """The role of these bytes."""
    number, place, machine, has_state, *others = _FORMAT.unpack(text)
    return cls(number, place, machine, bool(has_state), *others)


def next_roles(roles: Sequence[Role], local_size: int) -> list[Role]:
  """The roles in the next world, in the given order.

  As many ranks as the largest `wanted`, if there are spares enough; no rank that
  has a place loses it. Spares get the lowest free places, in their order.

  Args:
    roles: those of all ranks of the job that are left.
    local_size: ranks of a pretended machine; 0 for real ones.

  Example:
    >>> ranks = [Role(0, 0, 0, True, 3), Role(2, 2, 0, True, 3), Role(3, -1, 0, True)]
    >>> [role.place for role in next_roles(ranks, 0)]
    [0, 2, 1]
  """
  held = {role.place for role in roles if role.place >= 0}
  free = (place for place in itertools.count() if place not in held)
  missing = max((role.wanted for role in roles), default=0) - len(held)
  made = []
  for role in roles:
    if role.place < 0 and held and missing > 0:
      missing -= 1
      place = next(free)
      machine = place // local_size if local_size else role.machine
      role = dataclasses.replace(
        role, place=place, machine=machine, has_state=False
      )
    made.append(role)
  return made


@dataclasses.dataclass
class _Process:
  role: Role | None = None
  launched: int = 1  # ranks of the world at the launch
  local_size: int = 0


_process = _Process()


def begin(role: Role, launched: int, local_size: int) -> None:
  """Sets the role with which this process starts."""
  _process.role, _process.launched = role, launched
  _process.local_size = local_size


def has_begun() -> bool:
  """Whether this process has been in a world."""
  return _process.role is not None


def role() -> Role:
  """The role of this process."""
  assert _process.role is not None
  return _process.role


def change(role: Role) -> None:
  """Sets the role in a new world."""
  _process.role = role


def take_state() -> None:
  """Marks that this rank has the state of the job."""
  if _process.role is not None:
    _process.role = dataclasses.replace(_process.role, has_state=True)


def launched() -> int:
  """The number of ranks of the world at the launch, without spares."""
  return _process.launched


def local_size() -> int:
  """Ranks of a pretended machine; 0 for real ones."""
  return _process.local_size
