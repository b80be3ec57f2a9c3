"""The clocks of ranks: their differences from rank 0's, made fit for the messages."""

import dataclasses
from collections.abc import Mapping, Sequence

from ._parts import Part

# The times of one message: sender, receiver, when it was sent and received there.
Message = tuple[int, int, int, int]
_SWEEPS = 200


@dataclasses.dataclass
class Clock:
  """The difference of rank 0's clock from one rank's, linear in time; in ns.

  Attributes:
    points: times of the rank and differences there, one or two.
    uncertainty: half of the widest interval in which a difference was measured.
    shift: added to all differences, within the uncertainty.
  """

  points: list[tuple[int, float]]
  uncertainty: float
  shift: float = 0.0

  def __call__(self, time: int) -> int:
    """A time of the rank on rank 0's clock."""
    (at, offset), *rest = self.points
    if rest:
      later, changed = rest[-1]
      offset += (changed - offset) * (time - at) / max(later - at, 1)
    return time + round(offset + self.shift)


def clock_of(part: Part) -> Clock:
  """The clock of a part; that of this host where none was measured."""
  if not part.clocks:
    return Clock([(0, 0.0)], 0.0)
  points = [(at, (least + most) / 2) for least, most, at in part.clocks]
  widest = max(most - least for least, most, _ in part.clocks)
  # The intervals cannot be empty but for a clock that jumps.
  return Clock(points, max(widest, 0) / 2)


def fit(clocks: Mapping[int, Clock], messages: Sequence[Message]) -> float:
  """Shifts clocks so that no message is received before it was sent.

  A difference is known up to an uncertainty, and each message bounds it, too: the
  receiver's time is at least the sender's. The shifts are found by projections onto
  these bounds in turn.

  Returns:
    The ns by which some message is still too early: 0, unless a clock has not run
    evenly.
  """
  bounds: dict[tuple[int, int], float] = {}
  for sender, receiver, sent, received in messages:
    if sender in clocks and receiver in clocks:
      slack = clocks[receiver](received) - clocks[sender](sent)
      edge = sender, receiver
      bounds[edge] = min(bounds.get(edge, slack), slack)
  limits = {rank: clock.uncertainty for rank, clock in clocks.items()}
  if 0 in limits:
    limits[0] = 0.0
  shifts = dict.fromkeys(clocks, 0.0)
  worst = 0.0
  for _ in range(_SWEEPS):
    worst = 0.0
    for (sender, receiver), slack in bounds.items():
      lacks = shifts[sender] - shifts[receiver] - slack
      if lacks <= 0:
        continue
      worst = max(worst, lacks)
      # Half for each, but what one cannot move the other does; 1 ns for rounding.
      lacks += 1.0
      up = min(lacks / 2, limits[receiver] - shifts[receiver])
      down = min(lacks - up, limits[sender] + shifts[sender])
      up = min(lacks - down, limits[receiver] - shifts[receiver])
      shifts[receiver] += max(up, 0.0)
      shifts[sender] -= max(down, 0.0)
    if not worst:
      break
  for rank, clock in clocks.items():
    clock.shift = shifts[rank]
  return worst
