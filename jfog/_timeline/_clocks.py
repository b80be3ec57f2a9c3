"""The clocks of ranks: their differences from rank 0's, made fit for the messages."""

import dataclasses
from collections.abc import Mapping, Sequence

from ._parts import Part

# The times of one message: sender, receiver, when it was sent and received there.
Message = tuple[int, int, int, int]
_ROUNDS, _SWEEPS = 10, 200
_MARGIN = 5.0  # ns
_BINS = (
  50  # of the time, in each of which the tightest message of an edge counts
)


@dataclasses.dataclass
class Clock:
  """The difference of rank 0's clock from one rank's, linear in time; in ns.

  Attributes:
    points: times of the rank and differences there, one or two.
    uncertainty: for each, half of the interval in which it was measured.
    shifts: for each, what `fit` adds to it, within the uncertainty.
  """

  points: list[tuple[int, float]]
  uncertainty: list[float]
  shifts: list[float]

  def weights(self, time: int) -> list[float]:
    """The parts of the points in the difference at a time of the rank."""
    if len(self.points) == 1:
      return [1.0]
    (first, _), (last, _) = self.points[0], self.points[-1]
    part = (time - first) / max(last - first, 1)
    return [1 - part, part]

  def __call__(self, time: int) -> int:
    """A time of the rank on rank 0's clock."""
    parts = zip(self.weights(time), self.points, self.shifts, strict=True)
    return time + round(sum(w * (p[1] + shift) for w, p, shift in parts))


def clock_of(part: Part) -> Clock:
  """The clock of a part; that of this host where none was measured."""
  clocks = part.clocks[:1] + part.clocks[1:][-1:]
  if not clocks:
    return Clock([(0, 0.0)], [0.0], [0.0])
  points = [(at, (least + most) / 2) for least, most, at in clocks]
  # The intervals cannot be empty but for a clock that jumps.
  uncertainty = [max(most - least, 0) / 2 for least, most, _ in clocks]
  return Clock(points, uncertainty, [0.0] * len(clocks))


def fit(clocks: Mapping[int, Clock], messages: Sequence[Message]) -> float:
  """Shifts clocks so that no message is received before it was sent.

  A difference is known up to an uncertainty, and each message bounds it, too: the
  receiver's time is at least the sender's. The shifts at the two ends of a recording
  are found by projections onto these bounds in turn.

  Returns:
    The ns by which some message is still too early: 0, unless a clock has not run
    evenly.
  """
  known = [m for m in messages if m[0] in clocks and m[1] in clocks]
  for _ in range(_ROUNDS):
    if _project(clocks, known):
      break
  early = (clocks[m[0]](m[2]) - clocks[m[1]](m[3]) for m in known)
  return max(0, max(early, default=0))


def _project(clocks: Mapping[int, Clock], messages: Sequence[Message]) -> bool:
  """Projects the shifts onto the bounds; returns whether they met all before."""
  times = [clocks[m[0]](m[2]) for m in messages]
  begin, end = min(times, default=0), max(times, default=0)
  # Of each edge and bin the tightest: its slack, and the times at its two ends.
  tightest: dict[tuple[int, int, int], tuple[int, int, int]] = {}
  for (sender, receiver, *ends), time in zip(messages, times, strict=True):
    found = (clocks[receiver](ends[1]) - time, ends[0], ends[1])
    key = sender, receiver, _BINS * (time - begin) // max(end - begin, 1)
    tightest[key] = min(tightest.get(key, found), found)
  if all(slack >= 0 for slack, _, _ in tightest.values()):
    return True
  before = {rank: list(clock.shifts) for rank, clock in clocks.items()}
  bounds = [
    (
      slack,
      _terms(receiver, clocks[receiver], received, 1)
      + _terms(sender, clocks[sender], sent, -1),
    )
    for (sender, receiver, _), (slack, sent, received) in tightest.items()
  ]
  for _ in range(_SWEEPS):
    is_fit = True
    for slack, terms in bounds:
      moved = sum(w * (c.shifts[k] - before[r][k]) for r, c, k, w in terms)
      lacks = -slack - moved
      if lacks <= 0:
        continue
      is_fit = False
      # A shift at the end of its uncertainty does not move; a few ns for rounding.
      free = [
        (clock, k, w)
        for _, clock, k, w in terms
        if w * clock.shifts[k] < abs(w) * clock.uncertainty[k]
      ]
      norm = sum(w * w for _, _, w in free)
      for clock, k, w in free:
        limit = clock.uncertainty[k]
        shift = clock.shifts[k] + w * (lacks + _MARGIN) / norm
        clock.shifts[k] = max(-limit, min(limit, shift))
    if is_fit:
      break
  return False


def _terms(
  rank: int, clock: Clock, time: int, sign: int
) -> list[tuple[int, Clock, int, float]]:
  """The shifts in a time of a clock, and their factors."""
  return [
    (rank, clock, k, sign * weight)
    for k, weight in enumerate(clock.weights(time))
    if weight
  ]
