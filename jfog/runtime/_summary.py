"""The summary of a run over all ranks: operations, bytes, and waits."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jfog.runtime import _extensions
from jfog.runtime._process_communicator import ProcessCommunicator, counters


class RankSummary(NamedTuple):
  """The part of one rank in a `Summary`."""

  rank: int
  operations: int
  bytes_sent: int
  bytes_received: int
  messages_sent: int
  seconds: float  # since init, or the last reset of the counters
  seconds_waited: float
  seconds_waited_for: dict[int, float]  # by peer


class Summary(NamedTuple):
  """The operations, bytes and waits of all ranks; `str` is a table."""

  ranks: tuple[RankSummary, ...]

  @property
  def slowest_rank(self) -> int | None:
    """The rank for which the others have waited longest; None without waits."""
    waits = [self.waited_by_others(rank) for rank in range(len(self.ranks))]
    return waits.index(max(waits)) if any(waits) else None

  def waited_by_others(self, rank: int) -> float:
    """The seconds that the other ranks have waited for a rank, in sum."""
    return sum(
      other.seconds_waited_for.get(rank, 0.0)
      for other in self.ranks
      if other.rank != rank
    )

  def __str__(self) -> str:
    heads = ("rank", "operations", "sent", "received", "messages", "waited")
    rows: list[tuple[str, ...]] = []
    rows.append((*heads, "waited by others", "waited most for"))
    for each in self.ranks:
      most = max(
        each.seconds_waited_for.items(), key=lambda item: item[1], default=None
      )
      rows.append(
        (
          str(each.rank),
          str(each.operations),
          _bytes(each.bytes_sent),
          _bytes(each.bytes_received),
          str(each.messages_sent),
          f"{each.seconds_waited:.3f} s",
          f"{self.waited_by_others(each.rank):.3f} s",
          "-" if most is None else f"rank {most[0]}, {most[1]:.3f} s",
        )
      )
    lines = _aligned(rows)
    seconds = max((each.seconds for each in self.ranks), default=0.0)
    end = f"{len(self.ranks)} ranks, {seconds:.1f} s"
    if self.slowest_rank is not None:
      waited = self.waited_by_others(self.slowest_rank)
      end += (
        f"; the slowest is rank {self.slowest_rank}, for which the others waited "
        f"{waited:.3f} s"
      )
    return "\n".join([*lines, end])


_begun: dict[int, float] = {}  # by context, the time of the last reset


def begin_summary(comm: ProcessCommunicator) -> None:
  """Begins the time of a summary."""
  _begun[comm.context] = time.monotonic()


def gathered_summary(
  comm: ProcessCommunicator, *, patient: bool = False
) -> Summary:
  """The summary of all ranks of a communicator. Collective.

  Args:
    comm: the communicator.
    patient: waits for the other ranks as long as none of them has failed or left,
      and not for the timeout.
  """
  text = json.dumps(_own(comm)).encode()
  gather = _extensions.mpi().gather
  lengths = gather(comm.context, b"%16d" % len(text), patient)
  padded = text.ljust(max(map(int, lengths)))
  ranks = []
  for rank, each in enumerate(gather(comm.context, padded, patient)):
    fields: dict[str, Any] = json.loads(each)
    waits = {int(k): v for k, v in fields.pop("seconds_waited_for").items()}
    ranks.append(RankSummary(rank=rank, seconds_waited_for=waits, **fields))
  return Summary(tuple(ranks))


def print_at_end(comm: ProcessCommunicator) -> None:
  """Prints the summary on rank 0; all ranks call it at their end."""
  try:
    summary = gathered_summary(comm, patient=True)
  except RuntimeError:
    if comm.rank == 0:
      print("jfog: no summary: a rank ended without one", file=sys.stderr)
    return
  if comm.rank == 0:
    text = "\n".join(f"jfog: {line}" for line in str(summary).split("\n"))
    print(text, file=sys.stderr, flush=True)


def _own(comm: ProcessCommunicator) -> dict[str, Any]:
  """The fields of this rank's `RankSummary`, but for the rank."""
  sent, received, messages, (operations, _), _ = counters(comm)
  *waits, waited = _extensions.mpi().waits(comm.context)
  now = time.monotonic()
  return {
    "operations": operations,
    "bytes_sent": sum(sent),
    "bytes_received": sum(received),
    "messages_sent": sum(messages),
    "seconds": now - _begun.get(comm.context, now),
    "seconds_waited": waited / 1e9,
    "seconds_waited_for": {
      peer: wait / 1e9 for peer, wait in enumerate(waits) if wait
    },
  }


def _bytes(count: int) -> str:
  """A number of bytes.

  Example:
    >>> _bytes(12), _bytes(1500), _bytes(4_000_000)
    ('12 B', '1.5 kB', '4 MB')
  """
  for suffix, unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= unit:
      return f"{count / unit:.3g} {suffix}"
  return f"{count} B"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table whose columns end at one place."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) for cell, width in zip(row, widths, strict=True)
    )
    for row in rows
  ]
