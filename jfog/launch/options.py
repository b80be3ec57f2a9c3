"""The options of `jfog run`: parsing, and what they mean for mpirun and the ranks."""

import os
import re
import shlex
import sys
from collections.abc import Mapping

from . import allocation as _allocation

# Variables that describe the launching host or its session, and stay there.
_STAYS = re.compile(
  r"(PWD|OLDPWD|HOME|HOSTNAME|HOST|SHELL|SHLVL|USER|LOGNAME|MAIL|TERM|TMPDIR|DISPLAY"
  r"|_|LS_COLORS|XAUTHORITY|WINDOWID|DBUS_.*|SSH_.*|XDG_.*|BASH_FUNC_.*"
  # Open MPI carries its own, and a job's ranks get new ones.
  r"|OMPI_.*|PMIX_.*|PRTE_.*|PMI_.*|JFOG_RUN_.*)"
)
_CONNECT = 10  # seconds
# Of Open MPI 5 and 4, UCX and NCCL.
_INTERFACES = (
  "PRTE_MCA_prte_if_include",
  "OMPI_MCA_oob_tcp_if_include",
  "OMPI_MCA_btl_tcp_if_include",
  "UCX_NET_DEVICES",
  "NCCL_SOCKET_IFNAME",
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def exported(environ: Mapping[str, str]) -> list[str]:
  """Names of the variables that ranks on other hosts get.

  All but those that describe this host or the user's session, and those that a
  command line cannot carry.

  Example:
    >>> exported({"XLA_FLAGS": "--a", "HOME": "/root", "BASH_FUNC_f%%": "() {"})
    ['XLA_FLAGS']
  """
  return sorted(
    name
    for name in environ
    if _NAME.fullmatch(name) and not _STAYS.fullmatch(name)
  )


def parse(arguments: list[str]):
  """The options of a command line; ends the process with code 2 on a bad one."""
  import argparse

  parser = argparse.ArgumentParser(
    prog="jfog run",
    usage="jfog run -np N [-H HOST:SLOTS,... | --hostfile FILE] [options] "
    "command ... | -m module ...",
    description="Runs a command on N ranks, with the MPI jfog was built with.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "-np",
    "-n",
    type=_ranks,
    required=True,
    metavar="N",
    help="number of ranks; `auto` is one for each GPU of this machine, or else for "
    "each core, and with hosts one for each of their slots",
  )
  hosts = parser.add_mutually_exclusive_group()
  hosts.add_argument(
    "-H", "--host", metavar="HOST:SLOTS,...", help="hosts to run on"
  )
  hosts.add_argument(
    "--hostfile", metavar="FILE", help="file that lists the hosts to run on"
  )
  parser.add_argument(
    "--ssh-port", type=int, metavar="PORT", help="port of ssh on the hosts"
  )
  parser.add_argument(
    "--ssh-key", metavar="FILE", help="identity file of ssh for the hosts"
  )
  parser.add_argument(
    "--interface",
    metavar="NAME",
    help="the network interface, e.g. eth0, by which hosts reach each other",
  )
  parser.add_argument(
    "-x",
    action="append",
    default=[],
    dest="variables",
    metavar="NAME[=VALUE]",
    help="a variable of the ranks' environment; on other hosts also with the value "
    "here",
  )
  parser.add_argument(
    "--op-timeout",
    type=float,
    metavar="SECONDS",
    help="the timeout of jfog.init where the program passes none",
  )
  parser.add_argument(
    "--summary",
    action="store_true",
    help="print operations, bytes and waits of all ranks at the end",
  )
  parser.add_argument(
    "--check-programs",
    action="store_true",
    help="compare the programs of all ranks before they are compiled",
  )
  parser.add_argument(
    "--fault-tolerant",
    action="store_true",
    help="let the other ranks go on when one fails (Open MPI 5)",
  )
  parser.add_argument(
    "--spares",
    type=int,
    default=0,
    metavar="N",
    help="with --fault-tolerant: start N more processes, which wait in jfog.init to "
    "take the place of ranks that fail",
  )
  parser.add_argument(
    "--tag-output",
    action=argparse.BooleanOptionalAction,
    help="begin every line of output with [rank]; so by default on several ranks",
  )
  parser.add_argument(
    "--output-dir",
    metavar="DIR",
    help="also write the output of each rank into DIR/rank-N.out and DIR/rank-N.err",
  )
  parser.add_argument(
    "--all-tracebacks",
    action="store_true",
    help="show the traceback of every rank that fails, not of the first alone",
  )
  parser.add_argument(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help="end the job after that long, with exit code 124",
  )
  parser.add_argument(
    "--timeline",
    metavar="DIR",
    help="record what the ranks do, into DIR/timeline.json: sets JFOG_TIMELINE",
  )
  parser.add_argument(
    "--mpi-args",
    type=shlex.split,
    default=[],
    metavar="'WORDS'",
    help="options passed on to mpirun",
  )
  parser.add_argument(
    "--dry-run",
    action="store_true",
    help="print the mpirun command and its variables, and run nothing",
  )
  parser.add_argument(
    "-v",
    "--verbose",
    action="store_true",
    help="print that command, and the end of the job",
  )
  parser.add_argument("--package", help=argparse.SUPPRESS)
  parser.add_argument(
    "-m",
    nargs=argparse.REMAINDER,
    dest="module",
    metavar="MODULE ...",
    help="run a module as a program, like `python -m`",
  )
  parser.add_argument(
    "command", nargs=argparse.REMAINDER, help="command that every rank runs"
  )
  options = parser.parse_args(arguments)
  if options.command[:1] == ["--"]:
    del options.command[0]
  if options.module:
    options.command = [sys.executable, "-m", *options.module]
  if options.spares < 0:
    parser.error(f"--spares must not be negative, got {options.spares}.")
  if options.spares and not options.fault_tolerant:
    parser.error("--spares is for --fault-tolerant.")
  if options.np != "auto" and options.np < 1:
    parser.error(f"-np must be at least 1, got {options.np}.")
  for name in ("timeout", "op_timeout"):
    seconds = getattr(options, name)
    if seconds is not None and not seconds > 0:
      option = f"--{name.replace('_', '-')}"
      parser.error(f"{option} must be positive, got {seconds}.")
  if not options.command:
    parser.error("no command; for example: jfog run -np 2 python train.py")
  if (options.ssh_port or options.ssh_key) and not _has_hosts(options):
    parser.error("--ssh-port and --ssh-key are for --host and --hostfile.")
  for text in options.variables:
    if not _NAME.fullmatch(text.partition("=")[0]):
      parser.error(f"-x {text}: pass NAME or NAME=VALUE.")
    if "=" not in text and text not in os.environ:
      parser.error(
        f"-x {text}: it is not set here; set it, or pass {text}=VALUE."
      )
  if options.np == "auto":
    try:
      options.np = _slots(options) or _allocated() or _devices()
    except (OSError, ValueError) as error:
      parser.error(f"-np auto: {error}")
  if options.tag_output is None:
    options.tag_output = options.np > 1
  return options


def _has_hosts(options) -> bool:
  """Whether hosts are named."""
  return bool(options.host or options.hostfile)


def _ranks(text: str):
  """A number of ranks, or `auto`."""
  import argparse

  if text == "auto":
    return text
  try:
    ranks = int(text)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text} is neither a number nor auto"
    ) from None
  return ranks


def _devices() -> int:
  """The number of GPUs of this machine, or of the cores that ranks may use."""
  from .rank import gpus

  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  found = (
    gpus() if visible is None else len([d for d in visible.split(",") if d])
  )
  return found or len(os.sched_getaffinity(0))


def _allocated() -> int:
  """The slots of an allocation of several hosts; 0 without one."""
  allocated = _allocation.allocation(os.environ)
  return allocated.slots if allocated.hosts > 1 else 0


def _slots(options) -> int:
  """The sum of the slots of the hosts; 0 without hosts."""
  words = options.host.split(",") if options.host else []
  if options.hostfile:
    with open(options.hostfile, encoding="utf-8") as file:
      lines = [line.partition("#")[0].split() for line in file]
    # Open MPI: "host slots=2"; MPICH: "host:2".
    words = []
    for host, *rest in filter(None, lines):
      slots = [word[6:] for word in rest if word.startswith("slots=")]
      words.append(f"{host}:{slots[0]}" if slots else host)
  total = 0
  for word in words:
    _, colon, slots = word.rpartition(":")
    if not colon:
      total += 1
    elif slots.isdigit() and int(slots) > 0:
      total += int(slots)
    else:
      raise ValueError(f"{word} has no number of slots; write HOST:SLOTS")
  return total


def given_variables(options, *, several_hosts: bool = False) -> dict[str, str]:
  """The variables that the options set in the ranks' environment."""
  given = {}
  for text in options.variables:
    name, equals, value = text.partition("=")
    given[name] = value if equals else os.environ[name]
  if options.op_timeout is not None:
    given["JFOG_TIMEOUT"] = f"{options.op_timeout:g}"
  if options.summary:
    given["JFOG_SUMMARY"] = "1"
  if options.check_programs:
    given["JFOG_CHECK_PROGRAMS"] = "1"
  if options.timeline:
    given["JFOG_TIMELINE"] = os.path.abspath(options.timeline)
  if options.fault_tolerant:
    given["JFOG_FAULT_TOLERANT"] = "1"
  elif "JFOG_FAULT_TOLERANT" in os.environ:
    given["JFOG_FAULT_TOLERANT"] = "0"  # of the job that this one starts in
  if options.spares or "JFOG_SPARES" in os.environ:
    given["JFOG_SPARES"] = f"{options.spares}"
  if several_hosts or _has_hosts(options):
    # Without a question for a password, which would wait for ever.
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}"]
    if options.ssh_port:
      ssh += ["-p", str(options.ssh_port)]
    if options.ssh_key:
      ssh += ["-i", options.ssh_key]
    for name in ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"):
      if options.ssh_port or options.ssh_key or name not in os.environ:
        given[name] = " ".join(ssh)
  if options.interface:
    given |= dict.fromkeys(_INTERFACES, options.interface)
  return given


def as_shell_line(command: list[str], variables: Mapping[str, str]) -> str:
  """A line for a shell that runs a command with variables."""
  settings = [f"{name}={value}" for name, value in sorted(variables.items())]
  return shlex.join(["env", *settings, *command])


def command_problem(command: list[str]) -> tuple[int, str]:
  """Returns the exit code and text for a command that no rank can start."""
  import shutil

  name = command[0]
  if shutil.which(name):
    return 0, ""
  if os.path.isfile(name) and name.endswith(".py"):
    script = " ".join(command)
    return (
      126,
      f"{name} is not a command; put `python` before it: `python {script}`.",
    )
  if os.path.isfile(name) and os.path.dirname(name):
    return 126, f"{name} is not executable; `chmod +x {name}` makes it so."
  return 127, f"command not found: {name}; give a path or a command on PATH."
