"""Shared parts of the GPU check's programs: the world, cases, and their facts.

A program runs on every rank of a job that `check` has started. It appends facts
to the file that JFOG_GPU_FACTS names, one JSON object a line, as soon as each is
known, so that a program that hangs or crashes keeps what came before.
"""

import json
import os
import pathlib
import sys
import time
import traceback
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "benchmarks")]
# The installed jfog is meant, not the source tree.
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != _ROOT]

# The emulation's library in a rehearsal; empty on a GPU.
EMULATION = os.environ.get("JFOG_GPU_EMULATION", "")
REHEARSAL = bool(EMULATION)
TIMEOUT = 20.0  # seconds that an operation waits for other ranks
_TEXT = 6000  # bytes of an error that ranks exchange


class NotApplicable(Exception):
  """Raised on all ranks by a case that does not apply to their number."""


def require(condition, reason):
  """Skips the case for a reason unless a condition holds."""
  if not condition:
    raise NotApplicable(reason)


class World:
  """The world on NCCL, and exchanges by MPI that work while NCCL does not.

  It has what the peers of the benchmarks use of an mpi4py communicator.
  """

  def __init__(self, timeout=TIMEOUT, local_size=None):
    if REHEARSAL:
      from support import emulated

      self.library = emulated.carry_jfog(EMULATION)
    self._arguments = {"timeout": timeout, "local_size": local_size}
    self._open()
    # A rank whose operation fails by its deadline comes that much later.
    self._aside = self._extensions.mpi().split(
      self.comm.context, 0, self.rank, 5 * timeout
    )

  def _open(self):
    import jfog
    from jfog.runtime import _extensions

    self.comm: Any = jfog.init(backend="nccl", **self._arguments)
    self._extensions = _extensions
    self.rank, self.size = self.comm.rank, self.comm.size

  def reopen(self, **changes):
    """Makes a new world in place of one that has failed, on all ranks."""
    import jfog

    self._arguments |= changes
    jfog.shutdown()
    self._open()

  def gather(self, text):
    """The texts of all ranks, at most `_TEXT` bytes of each."""
    padded = text.encode(errors="replace")[-_TEXT:].ljust(_TEXT)
    texts = self._extensions.mpi().gather(self._aside, padded)
    return [each.decode(errors="replace").rstrip() for each in texts]

  def bcast(self, value):
    """Rank 0's bytes."""
    text = value.hex() if self.rank == 0 else ""
    return bytes.fromhex(self.gather(text)[0])

  def Barrier(self):
    """Waits for all ranks."""
    self.gather("")

  def slowest(self, number):
    """The greatest number of all ranks."""
    return max(map(float, self.gather(repr(float(number)))))

  def record(self, name, **facts):
    """Appends facts to the file, on rank 0."""
    if self.rank == 0:
      record(name, **facts)

  def run(self, cases):
    """Runs cases by name, each on all ranks; returns how many failed.

    A case that fails on any rank is recorded with every rank's error, and the
    next one gets a new world. A case may return measured facts.
    """
    failures = 0
    for name, case in cases.items():
      begin, facts, error = time.monotonic(), None, ""
      try:
        facts = case()
      except NotApplicable as reason:
        self.record(name, outcome="skipped", reason=str(reason))
        continue
      except Exception:
        error = traceback.format_exc(limit=-4)
      seconds = time.monotonic() - begin
      errors = self.gather(error)
      if any(errors):
        failures += 1
        said = {f"rank {i}": e for i, e in enumerate(errors) if e}
        self.record(name, outcome="failed", seconds=seconds, errors=said)
        self.reopen()
      else:
        outcome = "measured" if facts else "passed"
        self.record(name, outcome=outcome, seconds=seconds, **(facts or {}))
    return failures


def record(name, **facts):
  """Appends facts about a case to the file of this job."""
  line = json.dumps({"case": name, **facts})
  if path := os.environ.get("JFOG_GPU_FACTS"):
    with open(path, "a", encoding="utf-8") as file:
      file.write(line + "\n")
  print(line, flush=True)
