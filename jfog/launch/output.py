"""Output on its way to the terminal: the rank before each line, what is kept back.

A filter turns a chunk of bytes into those that go on: `feed` for each chunk, `expire`
once the time `until` has come, `finish` at the end.
"""

import contextlib
import re
import time
from collections.abc import Callable

TRACEBACK = b"Traceback (most recent call last):"
# Seconds that a traceback is kept back: of a program that goes on, and of one that
# ends by it, which may wait for its operations first.
_HOLD = 3.0
_HOLD_AT_EXIT = 15.0
# Before and after a text of Open MPI and of its daemons.
_RULE = re.compile(rb"^-{60}(?:-{14})?\n", re.M)
_RULE_HOLD = 0.5  # seconds from the first rule to the second, and for a line
# How Open MPI 5 and 4 begin their texts about a rank that has failed, and about a
# host on which no daemon starts or whose daemon is lost.
_ABOUT_FAILURES = (
  b"prterun detected that one or more processes exited",
  b"prterun has exited due to process rank",
  b"prterun noticed that process rank",
  b"mpirun detected that one or more processes exited",
  b"mpirun has exited due to process rank",
  b"mpirun noticed that process rank",
  b"Primary job  terminated normally, but",
  b"A daemon failed to report back",
  b"PRTE has lost communication with a remote daemon",
  b"ORTE was unable to reliably start one or more daemons",
)
# The texts of Open MPI 5 about a rank whose connection to a failed one has closed, and
# about an ssh that has begun before it got a process group of its own.
_SHORT_TEXTS = re.compile(
  rb"^\[[^\]\n]+\] \*\*\* An error occurred in Socket closed\n"
  rb"(?:\[[^\]\n]+\] \*\*\* .*\n)*"
  rb"|^\[[^\]\n]+\] plm:ssh: Warning: setpgid\(.*\n",
  re.M,
)


class Filter:
  """The base of filters; it changes nothing."""

  until = float("inf")

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    return chunk

  def expire(self) -> bytes:
    """Returns the bytes that go on once the time `until` has come."""
    return b""

  def finish(self) -> bytes:
    """Returns the bytes that go on at the end."""
    return b""


class Copied(Filter):
  """Writes all that passes into a file as well, which is made anew."""

  def __init__(self, path: str):
    self._file = open(path, "wb", buffering=0)  # noqa: SIM115

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    with contextlib.suppress(OSError):  # a full disk; the command goes on
      self._file.write(chunk)
    return chunk


class Extracted(Filter):
  """Takes lines that begin with a mark out, and calls a function with each."""

  def __init__(self, mark: bytes, take: Callable[[bytes], None]):
    self._mark = mark
    self._take = take
    self._held = b""  # a part of a mark or of a line behind one

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    text, passed = self._held + chunk, b""
    while (start := text.find(self._mark)) >= 0:
      passed += text[:start]
      line, newline, rest = text[start:].partition(b"\n")
      if not newline:
        return passed + self._hold(line)
      self._take(line[len(self._mark) :])
      text = rest
    parts = range(len(self._mark) - 1, 0, -1)
    part = next((k for k in parts if text.endswith(self._mark[:k])), 0)
    whole = len(text) - part
    return passed + text[:whole] + self._hold(text[whole:])

  def _hold(self, text: bytes) -> bytes:
    """Keeps the text back; nothing goes on."""
    self._held = text
    self.until = time.monotonic() + _RULE_HOLD if text else float("inf")
    return b""

  def expire(self) -> bytes:
    """Returns the bytes that go on once the time `until` has come."""
    held, self._held = self._held, b""
    self.until = float("inf")
    return b"" if held.startswith(self._mark) else held

  finish = expire


class Prefixed(Filter):
  """Whole lines, each after a prefix; those of progress bars end with "\\r"."""

  def __init__(self, prefix: bytes):
    self._prefix = prefix
    self._line = b""

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    lines = (self._line + chunk).splitlines(keepends=True)
    self._line = b""
    if lines and not lines[-1].endswith((b"\n", b"\r")):
      self._line = lines.pop()
    return b"".join(self._prefix + each for each in lines)

  def finish(self) -> bytes:
    """Returns the bytes that go on at the end."""
    return self._prefix + self._line + b"\n" if self._line else b""


class WithoutTraceback(Filter):
  """Keeps a traceback and what follows it back, for 3 seconds.

  If the command ends by it, the launcher's report shows it.

  Args:
    prefix: that of each line.
    is_failing: whether the command is about to end by an exception. Then a traceback
      is kept back for longer.
  """

  def __init__(self, prefix: bytes, is_failing: Callable[[], bool]):
    self.held = b""
    self._is_failing = is_failing
    self._begin = 0.0
    self._head = prefix + TRACEBACK
    self._is_new_line = True

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    if self.held:
      self.held += chunk
      return b""
    start = chunk.find(b"\n" + self._head) + 1
    if start == 0 and not (self._is_new_line and chunk.startswith(self._head)):
      self._is_new_line = chunk.endswith(b"\n")
      return chunk
    self.held = chunk[start:]
    self._begin = time.monotonic()
    self.until = self._begin + _HOLD
    return chunk[:start]

  def expire(self) -> bytes:
    """Returns the bytes that go on once the time `until` has come."""
    end = self._begin + _HOLD_AT_EXIT
    if time.monotonic() < end and self._is_failing():
      self.until = end
      return b""
    held, self.held = self.held, b""
    self.until = float("inf")
    self._is_new_line = held.endswith(b"\n")
    return held


class WithoutBanner(Filter):
  """Drops Open MPI's texts about failures, of which the launcher reports."""

  def __init__(self):
    self.dropped = b""
    self._held = b""  # from a rule on

  def feed(self, chunk: bytes) -> bytes:
    """Takes the next bytes."""
    text, passed = _SHORT_TEXTS.sub(self._drop, self._held + chunk), b""
    self._held = b""
    while rule := _RULE.search(text):
      passed, text = passed + text[: rule.start()], text[rule.start() :]
      head = len(rule[0])
      end = _RULE.search(text, head)
      if not end:
        return passed + self._hold(text)
      banner, text = text[: end.end()], text[end.end() :]
      if banner[head:].startswith(_ABOUT_FAILURES):
        self.dropped += banner
      else:
        passed += banner
    start = text.rfind(b"\n") + 1
    if text[start:] and not text[start:].strip(b"-"):  # the begin of a rule
      return passed + text[:start] + self._hold(text[start:])
    return passed + text

  def _drop(self, found: re.Match[bytes]) -> bytes:
    """Drops a text."""
    self.dropped += found[0]
    return b""

  def _hold(self, text: bytes) -> bytes:
    """Keeps the text back; nothing goes on."""
    self._held = text
    self.until = time.monotonic() + _RULE_HOLD
    return b""

  def expire(self) -> bytes:
    """Returns the bytes that go on once the time `until` has come."""
    held, self._held = self._held, b""
    self.until = float("inf")
    return held

  finish = expire
