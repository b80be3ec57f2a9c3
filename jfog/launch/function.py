"""`jfog.run`: a function of a Python session on the ranks of a job of its own."""

import codecs
import collections
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .launcher import command_line

_PROGRAM = "from jfog.launch import function; function.call_on_rank()"
_LOOK = 0.2  # seconds between looks for signals
_GRACE = 10.0  # seconds that the launcher has to end an interrupted job
# A job started by a rank of another one is none of its ranks.
_LAUNCHERS = (
  "JFOG_RUN_JOB",
  "OMPI_",
  "PMIX_",
  "PRTE_",
  "PMI_",
  "MPI_LOCAL",
  "JFOG_RUN_DIR",
)


def run(
  fun: Callable[..., Any],
  args: Sequence[Any] = (),
  kwargs: Mapping[str, Any] | None = None,
  *,
  np: int,
  timeout: float | None = None,
  env: Mapping[str, str] | None = None,
) -> list[Any]:
  """Calls `fun(*args, **kwargs)` on `np` ranks of a new job; returns all results.

  `jfog run` from Python, for notebooks and scripts: the ranks are new processes on
  this machine, which start, call the function and end. It calls `jfog.init`
  itself. The function, its arguments and its results travel as pickles of
  cloudpickle, so that a function of a notebook and a lambda work; what it refers
  to by name in an importable module is imported on the ranks. Their output appears
  here, line by line and tagged by rank.

  Args:
    fun: the function.
    args: its positional arguments, the same on all ranks.
    kwargs: its keyword arguments.
    np: the number of ranks; more than there are cores is fine.
    timeout: seconds after which the job is ended; by default never.
    env: variables of the ranks' environment, beside those of this process.

  Returns:
    The results, in the order of ranks.

  Raises:
    TypeError: if `np` is not an integer, or `fun` or an argument cannot be
      pickled.
    ValueError: if `np` or `timeout` is not positive.
    TimeoutError: after `timeout`.
    RuntimeError: if the job fails, with the report of the rank that failed first.

  Example:
    >>> import jfog
    >>> def total(x):
    ...   import jax.numpy as jnp
    ...   world = jfog.init()
    ...   return float(jfog.allreduce(jnp.float32(x * world.rank), "sum"))
    >>> jfog.run(total, (10,), np=2)
    [10.0, 10.0]

  Source: `horovod.run` of Horovod.
  """
  import cloudpickle

  if isinstance(np, bool) or not isinstance(np, int):
    raise TypeError(f"jfog.run: np={np!r} must be a number of ranks.")
  if np < 1:
    raise ValueError(f"jfog.run: np={np} must be at least 1.")
  if timeout is not None and not timeout > 0:
    raise ValueError(
      f"jfog.run: timeout={timeout} must be positive, in seconds."
    )
  try:
    call = cloudpickle.dumps((fun, tuple(args), dict(kwargs or {})))
  except Exception as error:  # of any type: those of the objects' own methods
    raise TypeError(
      f"jfog.run: {fun!r} or its arguments cannot be pickled ({error}); pass arrays "
      f"and plain values, and open files and devices in the function."
    ) from error
  options = ["-np", str(np), "--tag-output"]
  if timeout is not None:
    options += ["--timeout", str(timeout)]
  inherited = {
    k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)
  }
  with tempfile.TemporaryDirectory(prefix="jfog-call-") as folder:
    with open(os.path.join(folder, "call"), "wb") as file:
      file.write(call)
    program = [sys.executable, "-c", _PROGRAM, folder]
    code, text = _finished(
      command_line([*options, "--", *program]), {**inherited, **(env or {})}
    )
    if code == 124 and timeout is not None:
      raise TimeoutError(f"jfog.run: the job did not end within {timeout:g} s.")
    if code:
      raise RuntimeError(
        f"jfog.run: the job ended with exit code {code}.\n{_report(text)}"
      )
    results = []
    for rank in range(np):
      with open(os.path.join(folder, f"result-{rank}"), "rb") as file:
        results.append(cloudpickle.load(file))
  return results


def _finished(
  command: list[str], environ: Mapping[str, str]
) -> tuple[int, str]:
  """Runs a command to its end, and shows its output; its code and that output."""
  job = subprocess.Popen(
    command,
    env=environ,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  assert job.stdout
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  texts: collections.deque[str] = collections.deque(maxlen=1000)
  with job, selectors.DefaultSelector() as selector:
    try:
      selector.register(job.stdout, selectors.EVENT_READ)
      while True:
        # Python handles a signal between two reads: one that another thread of this
        # process has taken does not end a read.
        if not selector.select(_LOOK):
          continue
        read = os.read(job.stdout.fileno(), 1 << 16)
        text = decoder.decode(read, final=not read)
        sys.stdout.write(text)  # of Python: a notebook shows no descriptors
        texts.append(text)
        if not read:
          return job.wait(), "".join(texts)
    except BaseException:  # KeyboardInterrupt first of all
      job.send_signal(signal.SIGTERM)
      try:
        job.wait(_GRACE)
      except subprocess.TimeoutExpired:
        job.kill()
      raise


def _report(text: str) -> str:
  """The report of the launcher, which comes last."""
  start = text.find("jfog run: ")
  return (text[start:] if start >= 0 else text[-2000:]).strip()


def call_on_rank() -> None:
  """Calls the function on one rank, and leaves its result."""
  import cloudpickle

  folder = sys.argv[1]
  with open(os.path.join(folder, "call"), "rb") as file:
    fun, args, kwargs = cloudpickle.load(file)
  result = cloudpickle.dumps(fun(*args, **kwargs))
  rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
  with open(os.path.join(folder, f"result-{rank}"), "wb") as file:
    file.write(result)
