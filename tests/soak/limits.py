"""Limits of resources, children, signals, open ports and modes of files."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import time
from typing import Any

import jfog.launch
from soak import fault_rank, runner

DEADLINE = 300.0  # seconds; each takes a few, the long ones half a minute
_LISTEN = "0A"
_GIGABYTES = 24.0  # of memory for the leaf of 2**31 elements on two ranks


def _line(name, ended, problems, output=True):
  if fault_rank.WRONG in ended.output:
    problems.append("a wrong number")
  for sign in ("terminate called", "Fatal Python error", "Segmentation"):
    if sign in ended.output:
      problems.append(f"{sign!r} in the output")
  problems += [f"left behind: {text}" for text in ended.left]
  return {
    "name": name,
    "problems": problems,
    "seconds": ended.seconds,
    "output": ended.output if problems and output else "",
  }


def _succeeds(name, ranks, *arguments, timeout=60.0):
  """A job that ends right."""
  ended = runner.run(
    ["-m", "soak.limits_rank", name, str(timeout), *arguments],
    ranks,
    deadline=DEADLINE,
  )
  problems = []
  if ended.code is None:
    problems.append(f"did not end within {DEADLINE:g} s")
  elif ended.code:
    problems.append(f"exit code {ended.code} instead of 0")
  if "THE CHILD ACTED AS THE RANK" in ended.output:
    problems.append("an operation of a forked child went through")
  return _line(" ".join([name, *arguments]), ended, problems)


def growth(ranks=2, seconds=5):
  return _succeeds("growth", ranks, str(seconds))


def leaves(ranks=2, count=1000):
  return _succeeds("leaves", ranks, str(count))


def handles(ranks=3, count=2000):
  return _succeeds("handles", ranks, str(count))


def fork(ranks=2):
  return _succeeds("fork", ranks, timeout=10.0)


def children(ranks=2):
  return _succeeds("subprocess", ranks, timeout=20.0)


def spawn(ranks=2):
  return _succeeds("spawn", ranks, timeout=20.0)


def elements(ranks=2, count=2**31):
  memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") / 1e9
  if memory < _GIGABYTES:
    return _left_out(
      "elements", f"{memory:.0f} GB of memory are free, not {_GIGABYTES:g}"
    )
  return _succeeds("elements", ranks, str(count), timeout=300.0)


def _left_out(name, reason):
  return {"name": name, "problems": [], "seconds": 0.0, "left_out": reason}


def address_space(ranks=2):
  """The rank without memory reports it by an error, and the job ends."""
  ended = runner.run(
    ["-m", "soak.limits_rank", "address_space", "20", str(50_000_000)],
    ranks,
    deadline=DEADLINE,
  )
  problems = []
  if ended.code is None:
    problems.append(f"did not end within {DEADLINE:g} s")
  elif ended.code != 1:
    problems.append(f"exit code {ended.code} instead of 1")
  if not re.search("REFUSED.*(RESOURCE_EXHAUSTED|memory)", ended.output, re.I):
    problems.append("no error that names memory")
  return _line("address_space", ended, problems)


def _looping(watch, timeout=20.0, ranks=2, command=None):
  """A job that runs operations until `watch` ends it."""
  with runner.job(
    ["-m", "soak.limits_rank", "loop", str(timeout)], ranks, command=command
  ) as running:
    problems = []
    if not running.await_line("LOOPS", DEADLINE / 2):
      problems.append("the job did not start")
    else:
      problems += watch(running) or []
    return running.finish(time.monotonic() - running.start + 30), problems


def interrupted_rank(ranks=3):
  """Ctrl-C of one rank ends the job by KeyboardInterrupt, and names it."""

  def watch(running):
    os.kill(running.ranks()[1], signal.SIGINT)

  ended, problems = _looping(watch, ranks=ranks)
  if ended.code in (None, 0):
    problems.append(f"exit code {ended.code}")
  if not re.search(r"rank 1 (failed first|was killed)", ended.output):
    problems.append("rank 1 is not named")
  return _line("interrupted_rank", ended, problems)


def interrupted_launcher(ranks=2):
  """Ctrl-C of the launcher ends all ranks within seconds."""
  began = []

  def watch(running):
    os.kill(running.launcher, signal.SIGINT)
    began.append(time.monotonic() - running.start)

  ended, problems = _looping(watch, ranks=ranks)
  if ended.code != 128 + signal.SIGINT:
    problems.append(f"exit code {ended.code} instead of 130")
  if began and ended.seconds - began[0] > 15:
    problems.append(f"took {ended.seconds - began[0]:.1f} s")
  return _line("interrupted_launcher", ended, problems)


def _sockets(pid):
  """The inodes of a process's sockets."""
  found = set()
  for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
    with contextlib.suppress(OSError):
      if inode := re.match(r"socket:\[(\d+)\]", os.readlink(path)):
        found.add(inode[1])
  return found


def listeners(pid: int) -> list[tuple[str, int]]:
  """Addresses and ports on which a process listens for TCP."""
  inodes, found = _sockets(pid), []
  for name in ("tcp", "tcp6"):
    with contextlib.suppress(OSError):
      for row in (
        pathlib.Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
      ):
        words = row.split()
        if len(words) > 9 and words[3] == _LISTEN and words[9] in inodes:
          address, port = words[1].split(":")
          raw = bytes.fromhex(address)
          if name == "tcp":
            (number,) = struct.unpack("<I", raw)
            text = ".".join(str(number >> k & 255) for k in (24, 16, 8, 0))
          else:
            text = "loopback6" if raw[-1] == 1 or raw[12] == 1 else "any6"
          found.append((text, int(port, 16)))
  return found


def _is_enclosed(path, folder):
  """Whether a folder that the job has made keeps others from a file."""
  if not pathlib.Path(path).is_relative_to(folder / "tmp"):
    return False
  parents = pathlib.Path(path).relative_to(folder / "tmp").parents
  made = [folder / "tmp" / parent for parent in parents if parent.name]
  return any(not os.stat(each).st_mode & 0o077 for each in made)


def ports_and_modes(ranks=2):
  """No port to other hosts, no port in a rank, no file that others may read."""

  def watch(running):
    problems = []
    ranks = set(running.ranks().values())
    for pid, line in running.processes():
      for address, port in listeners(pid):
        if pid in ranks:
          problems.append(f"a rank listens on {address}:{port}")
        elif not address.startswith(("127.", "loopback")):
          problems.append(f"{line[:40]} listens on {address}:{port}")
    for path in running.files():
      with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if mode & 0o077 and not _is_enclosed(path, running.folder):
          problems.append(f"{path} has mode {mode & 0o777:o}")
    os.kill(running.launcher, signal.SIGTERM)
    return problems

  ended, problems = _looping(watch, ranks=ranks)
  return _line("ports_and_modes", ended, problems, output=False)


def small_shared_memory(ranks=3, size="3m"):
  """A /dev/shm that is too small is an error, or the job goes on without it."""
  unshare = ["unshare", "--mount", "sh", "-c"]
  mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
  if (
    not shutil.which("unshare")
    or subprocess.run([*unshare, mount], capture_output=True).returncode
  ):
    return _left_out("small_shared_memory", "needs the right to mount")
  command = [
    *(*unshare, f'{mount} && mkdir -p "$SHARED" && exec "$@"', "sh"),
    *jfog.launch.command_line(["--no-tag-output", "-np", str(ranks)]),
  ]
  # Open MPI's own places: those of the soak are in what is mounted over.
  with runner.job(
    ["-m", "soak.limits_rank", "leaves", "20", "10"],
    ranks,
    environment={"SHARED": "/dev/shm/x"}
    | {f"OMPI_MCA_{n}_backing_directory": "/dev/shm" for n in runner._BACKING},
    command=command,
  ) as running:
    ended = running.finish(DEADLINE)
  problems = []
  if ended.code is None:
    problems.append(f"did not end within {DEADLINE:g} s")
  elif ended.code and not re.search("shm|shared memory", ended.output):
    problems.append(f"exit code {ended.code} without a word on shared memory")
  return _line("small_shared_memory", ended, problems)


SHORT = {
  "growth": growth,
  "leaves": leaves,
  "handles": handles,
  "fork": fork,
  "children": children,
  "spawn": spawn,
  "address_space": address_space,
  "interrupted_rank": interrupted_rank,
  "interrupted_launcher": interrupted_launcher,
  "ports_and_modes": ports_and_modes,
  "small_shared_memory": small_shared_memory,
}
# A shim that corrupts messages, as in tests of fields, would stand here, too.
LONG = {
  "growth for a minute": lambda: growth(3, 60),
  "5000 leaves": lambda: leaves(2, 5000),
  "17 000 handles": lambda: handles(3, 17_000),
  "2**31 elements": elements,
}


def run(name: str) -> dict[str, Any]:
  """Runs one of them; returns its line of the report."""
  return {**SHORT, **LONG}[name]()
