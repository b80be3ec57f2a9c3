"""Failure reports: a record per failed rank, and the text about the first."""

import contextlib
import os
import re
import signal
from collections.abc import Sequence

from .output import TRACEBACK
from .processes import shell_code

# Before a record that travels in the rank's stderr, from a host that does not see the
# launcher's folder. It is short enough for one write and one read of a pipe.
MARK = b"\x1ejfog-record "
_CARRIED = 1500  # characters of stderr in such a record
# The exit code of a rank of Open MPI whose connection to another one has closed.
_MPI_ERR_UNKNOWN = 14
_LATER = 3  # ranks that failed after the first one, named in the report


def causes(records: Sequence[dict]) -> list[dict]:
  """The records of ranks that failed by themselves, the first one first.

  Ranks that mpirun ended are left out: clocks of several hosts differ, so that
  their times alone do not decide. So are those that Open MPI ended since the
  connection to another rank was closed, which they may see before that rank's
  wrapper sees its end, unless there are no others.
  """
  own = [record for record in records if not record["torn_down"]]
  own = [each for each in own if not _has_lost_a_peer(each)] or own
  return sorted(own, key=lambda record: record["time"])


def _has_lost_a_peer(record: dict) -> bool:
  """Whether Open MPI has ended a rank by its handler of fatal errors."""
  text = record.get("stderr", "")
  return (
    record.get("code") == _MPI_ERR_UNKNOWN and TRACEBACK.decode() not in text
  )


def first_failure(records: Sequence[dict]) -> dict | None:
  """Returns the record of the rank that failed first, or None without one."""
  return next(iter(causes(records)), None)


def failure_report(record: dict, others: Sequence[dict] = ()) -> str:
  """Returns the last text of `jfog run`, about the rank that failed first.

  Args:
    record: its record.
    others: the records of ranks that failed later, which get a line each.
  """
  rank, stderr = record["rank"], record["stderr"].rstrip("\n")
  traceback = _last_traceback(stderr)
  if record["signal"]:
    head = f"jfog run: rank {rank} was killed by {record['signal']}"
    shown = _last_lines(stderr)
  else:
    head = f"jfog run: rank {rank} failed first (exit code {record['code']})"
    shown = traceback or _last_lines(stderr)
    if traceback and record["is_shown"]:
      head += ", by the traceback above that ends with"
      shown = _last_lines(stderr, 1)
  text = f"{head}:\n{shown}\n" if shown else f"{head}\n"
  return _later(others) + text


def shown_tracebacks(records: Sequence[dict]) -> str:
  """Returns the tracebacks that `--all-tracebacks` shows, in order of time.

  The records bring them, since mpirun drops output of ranks that it ends.
  """
  shown = [record for record in records if record["is_shown"]]
  shown.sort(key=lambda record: record["time"])
  return "".join(record["held"] for record in shown)


def loss_report(record: dict) -> str:
  """Returns the line about a rank without which the job goes on.

  Its traceback comes first, if all are to be shown.
  """
  end = (
    f"was killed by {record['signal']}"
    if record["signal"]
    else f"failed (exit code {record['code']})"
  )
  cause = _last_lines(record["stderr"].rstrip("\n"), 1)
  cause = f": {cause}" if cause and not record["signal"] else ""
  line = f"jfog run: rank {record['rank']} {end}; the others go on{cause}\n"
  return shown_tracebacks([record]) + line


def interrupt_report(records: list[dict]) -> str:
  """Returns the text about a job that was ended: where one of its ranks was."""
  for record in records:
    if record["held"] and not record["is_shown"]:
      traceback = _last_traceback(record["stderr"].rstrip("\n"))
      return f"jfog run: rank {record['rank']} was here:\n{traceback}\n"
  return ""


def _later(records: Sequence[dict]) -> str:
  """A line for each rank that failed after the first one."""
  lines = []
  for record in records[:_LATER]:
    cause = _last_lines(record["stderr"].rstrip("\n"), 1)
    lines.append(
      f"jfog run: rank {record['rank']} failed later (exit code "
      f"{record['code']}){': ' if cause else ''}{cause}\n"
    )
  if (more := len(records) - _LATER) > 0:
    lines.append(f"jfog run: {more} more ranks failed later\n")
  return "".join(lines)


def leave_record(
  rank: int,
  code: int,
  ended: float,
  stderr: bytes,
  *,
  torn_down: bool,
  held: bytes,
  is_shown: bool,
) -> bool:
  """Leaves the record of a failed rank for `jfog run`, in a file or in stderr.

  Returns whether it is in a file. One in stderr has the end of the rank's own only,
  all of which is to be shown.

  Args:
    rank: the rank in the job.
    code: the exit code, -n for signal n.
    ended: the time of its end, as `time.time` has it.
    stderr: the end of its stderr.
    torn_down: whether mpirun was ending the job already.
    held: the traceback by which it ends, if that is not on the terminal yet.
    is_shown: whether the tracebacks of all ranks are to be shown.
  """
  import json

  run_dir = os.environ.get("JFOG_RUN_DIR", "")
  if not run_dir:
    return False  # the command of --dry-run, without a launcher
  record = {
    "rank": rank,
    "time": ended,
    "code": shell_code(code),
    "signal": signal_name(-code) if code < 0 else "",
    "torn_down": torn_down,
    "stderr": stderr.decode(errors="replace"),
    "held": held.decode(errors="replace"),
    "is_shown": is_shown,
  }
  path = os.path.join(run_dir, f"{rank}.json")
  try:
    # Written aside and renamed: the launcher reads complete records only.
    with open(path + ".part", "w", encoding="utf-8") as file:
      json.dump(record, file)
    os.replace(path + ".part", path)
  except OSError:  # on another host, without the launcher's folder
    carried = record["stderr"][-_CARRIED:]
    _send({**record, "held": "", "is_shown": True, "stderr": carried})
    return False
  return True


def send_end(rank: int) -> None:
  """Sends the mark of a rank that ends without an error, from another host."""
  _send({"rank": rank, "mark": "ended"})


def _send(record: dict) -> None:
  """Writes a record into stderr, which mpirun brings to the launcher."""
  import base64
  import json
  import zlib

  text = base64.b64encode(zlib.compress(json.dumps(record).encode()))
  with contextlib.suppress(OSError):
    os.write(2, MARK + text + b"\n")


def keep(run_dir: str, line: bytes) -> None:
  """Writes a record or a mark that has come in stderr into the launcher's folder."""
  import base64
  import json
  import zlib

  with contextlib.suppress(ValueError, KeyError, zlib.error, OSError):
    record = json.loads(zlib.decompress(base64.b64decode(line.strip())))
    path = os.path.join(run_dir, f"{int(record['rank'])}")
    if record.get("mark") == "ended":
      open(f"{path}.ended", "w", encoding="utf-8").close()
      return
    with open(f"{path}.part", "w", encoding="utf-8") as file:
      json.dump(record, file)
    os.replace(f"{path}.part", f"{path}.json")


def signal_name(number: int) -> str:
  """The name of a signal."""
  try:
    return signal.Signals(number).name
  except ValueError:  # a real-time signal
    return f"signal {number}"


def unreachable(banner: str) -> str:
  """The host on which no daemon has started, by Open MPI's text; "" if none."""
  found = re.search(r"^ *Remote host: *(\S+)", banner, re.M)
  if "daemon" not in banner or not found:
    return ""
  return found[1]


def lost_host(banner: str) -> str:
  """The host whose daemon is lost, by Open MPI's text; "" if none."""
  found = re.search(r"^ *Remote daemon: .* on node (\S+)", banner, re.M)
  return found[1] if found else ""


def has_records(run_dir: str) -> bool:
  """Whether some rank has failed."""
  return any(name.endswith(".json") for name in os.listdir(run_dir))


def records(run_dir: str) -> list[dict]:
  """Reads the records of the failed ranks, sorted by file name."""
  import json

  found = []
  for name in sorted(os.listdir(run_dir)):
    if name.endswith(".json"):
      with open(os.path.join(run_dir, name), encoding="utf-8") as file:
        found.append(json.load(file))
  return found


def _last_traceback(text: str) -> str:
  """Returns the last traceback with the exceptions it was chained from."""
  head = TRACEBACK.decode()
  chained = (
    "During handling of the above exception, another exception occurred:\n\n",
    "The above exception was the direct cause of the following exception:\n\n",
  )
  start = text.rfind(head)
  while start > 0 and text[:start].endswith(chained):
    earlier = text.rfind(head, 0, start)
    if earlier < 0:
      break
    start = earlier
  if start < 0:
    return ""
  return text[text.rfind("\n", 0, start) + 1 :]


def _last_lines(text: str, count: int = 10) -> str:
  return "\n".join(text.split("\n")[-count:])
