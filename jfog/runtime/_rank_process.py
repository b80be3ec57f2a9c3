"""The process that is the rank of a job, and the marks that it leaves."""

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

# Set in this process's environment once it is the rank, for its descendants.
_VARIABLE = "JFOG_RANK_PROCESS"
_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")

_started_in = 0  # the process in which this module started MPI; 0: none


def is_rank() -> bool:
  """Whether this process started MPI, and is not a fork of one that did."""
  return _started_in == os.getpid()


def is_fork() -> bool:
  """Whether this process is a fork of one that started MPI."""
  return _started_in not in (0, os.getpid())


def refuse_fork() -> None:
  """Raises a `RuntimeError` in a fork of a process that started MPI."""
  if is_fork():
    raise RuntimeError(_refusal(f"was forked from process {_started_in}"))


def refuse_in_fork(operation: str) -> None:
  """Raises the error of an operation in a fork; see xla_ops/common/fork.h."""
  if is_fork():
    raise jax.errors.JaxRuntimeError(
      f"FAILED_PRECONDITION: jfog: {operation} in a fork of a rank, which has "
      f"neither its threads nor its connections; start the process by 'spawn' "
      f"instead, and call jfog.init(backend='single') in it for a world of its "
      f"own [FAILED_PRECONDITION]"
    )


def claim(launched: bool) -> None:
  """Makes this process the rank that the launcher's variables name.

  Args:
    launched: whether there is an MPI launcher.

  Raises:
    RuntimeError: if another process is that rank, and this one has inherited its
      variables or its memory.
  """
  global _started_in
  refuse_fork()
  if launched:
    if owner := _owner():
      raise RuntimeError(_refusal(f"has the variables of process {owner}"))
    os.environ[_VARIABLE] = f"{_job()} {_identity(os.getpid())}"
  _started_in = os.getpid()


@contextlib.contextmanager
def marked() -> Iterator[None]:
  """Marks for `jfog run` that this rank has entered init, and is ready or failed."""
  mark("entered")
  try:
    yield
  except BaseException:
    mark("failed")
    raise
  mark("ready")


def mark_failure_at_exit(text: str) -> None:
  """Leaves the error of an operation that Python may not have raised."""
  mark("failed_at_exit", text)


def mark(name: str, text: str = "") -> None:
  """Leaves a mark in the launcher's folder."""
  if folder := _folder():
    try:
      with open(os.path.join(folder, f"{rank()}.{name}"), "w") as file:
        file.write(text)
    except OSError:
      pass  # the launcher has ended


def keep_programs(place: int) -> None:
  """Keeps the programs that are compiled from now on for as long as the job lasts.

  They lie in the launcher's folder, by place: after a recovery this rank compiles
  them again, and so does the rank that takes the place of a lost one. Two ranks never
  write into one folder, since JAX's writes are not atomic. A cache that is configured
  already stays.
  """
  folder = _folder()
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  options = {
    "jax_compilation_cache_dir": os.path.join(folder, "programs", f"{place}"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX has looked for one before, in vain


def ranks_with(name: str) -> set[int] | None:
  """The ranks of this job with a mark; None where marks cannot be seen."""
  if not (folder := _folder()):
    return None
  try:
    found = os.listdir(folder)
  except OSError:
    return None
  return {
    int(each.removesuffix(f".{name}"))
    for each in found
    if each.endswith(f".{name}")
  }


def rank() -> int:
  """This rank by the launcher's variables; -1 without any."""
  texts = (os.environ.get(name, "") for name in _RANK)
  return next((int(text) for text in texts if text.isdigit()), -1)


def _refusal(how: str) -> str:
  return (
    f"this process ({os.getpid()}) {how}, which is rank {rank()} of the job, and "
    f"a rank is one process. Call jfog.init(backend='single') here for a world "
    f"of its own (jfog.simulate and jfog.spmd need no init at all), or start a "
    f"job of its own with `jfog run`."
  ).replace("rank -1 of the job", "the rank")


def _owner() -> str:
  """The number of the other process that is this rank; "" if there is none."""
  own = _identity(os.getpid())
  job, _, process = os.environ.get(_VARIABLE, "").partition(" ")
  # The ranks of a job that a rank starts inherit the variable, too.
  if job != _job():
    process = ""
  if not process and (folder := _folder()):
    # Covers descendants whose environment is older than the rank's init. The
    # target of a link is written and made in one step.
    process = _link(own, os.path.join(folder, f"{rank()}.process"))
  number = process.partition("@")[0]
  if process in ("", own) or process != _identity(number):
    return ""  # it is this one, or it has ended
  return number


def _job() -> str:
  """The job and the rank in it, as one word."""
  return f"{os.environ.get('PMIX_NAMESPACE', '')}#{rank()}"


def _folder() -> str:
  """The folder of marks, if `jfog run` started all ranks here; else ""."""
  if os.environ.get("JFOG_RUN_JOB") != os.environ.get("PMIX_NAMESPACE", ""):
    return ""
  return os.environ.get("JFOG_RUN_DIR", "")


def _identity(process: int | str) -> str:
  """A process by its number and its start, since numbers are used again."""
  stat = _read(f"/proc/{process}/stat")
  return f"{process}@{stat.rpartition(')')[2].split()[19]}" if stat else ""


def _read(path: str) -> str:
  try:
    with open(path, encoding="utf-8", errors="replace") as file:
      return file.read()
  except OSError:
    return ""


def _link(target: str, path: str) -> str:
  """Makes a link if there is none; returns the target of the one that is."""
  try:
    os.symlink(target, path)
  except FileExistsError:
    return os.readlink(path)
  except OSError:
    return ""  # without the launcher's folder
  return target
