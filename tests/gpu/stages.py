"""The stages of the GPU check, in the order of their worth.

Deadlines are those of 16 cores and one GPU; a rehearsal on the emulation, at
small sizes, gets several times as long.
"""

import os
import pathlib
import re
import shutil
import sys
import sysconfig

from driver import Job, Stage

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(__file__).resolve().parent
WHEELS = ROOT / "gpu-wheels"
PYTHON = sys.executable
JFOG = str(pathlib.Path(sysconfig.get_path("scripts")) / "jfog")
# Ranked tests, the most basic ones first.
RANKED = (
  *("neighbor", "collectives", "order", "handles", "neighbor_allgather"),
  *("peers", "hierarchical", "finite_average", "windows", "mismatch"),
)


def stages(rehearsal: bool, emulation: str = "") -> list[Stage]:
  """All stages.

  Args:
    rehearsal: whether they run on the emulation and not on a GPU.
    emulation: the folder in which stage 1 builds it, then.
  """
  slow = 6 if rehearsal else 1
  library = str(pathlib.Path(emulation) / "libjfog_emulation.so")
  common = {
    "PYTHONUNBUFFERED": "1",
    # Neither choosing the fastest kernels nor plugins are what is tested.
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "NCCL_DEBUG": "WARN",
  }
  if rehearsal:
    common |= {"JAX_PLATFORMS": "cpu", "JFOG_GPU_EMULATION": library}
  else:
    common |= {
      "JAX_PLATFORMS": "cuda,cpu",
      "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    }

  def job(name, command, deadline, text=None, **environment):
    return Job(name, command, slow * deadline, common | environment, text)

  def program(name, script, ranks, deadline, *arguments, **environment):
    limit = str(slow * deadline - 1)
    command = [JFOG, "run", "-np", str(ranks), "--timeout", limit]
    command += [PYTHON, str(FOLDER / f"{script}.py"), *arguments]
    return job(name, command, deadline, **environment)

  def ranked(ranks, deadline):
    """Ranked tests, each of which is reported although the job is cut off."""
    backend = "emulated" if rehearsal else "nccl"
    tests = [f"tests/test_{name}.py" for name in RANKED]
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--backend", backend, "-k", f"mpi-{ranks}", "-rfE"]
    command += ["--job-deadline", str(slow * deadline - 10), *tests]
    shell = f'cd "{ROOT}" && exec "$@"'
    return job(
      f"ranked tests on {ranks} ranks",
      ["sh", "-c", shell, "sh", *command],
      deadline,
      _pytest_counts,
    )

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
    build = f"import emulated; emulated.build({emulation!r})"
    first.append(
      job(
        "emulation",
        [PYTHON, "-c", build],
        30,
        PYTHONPATH=str(ROOT / "tests"),
      )
    )
  elif smi := shutil.which("nvidia-smi"):
    query = "name,driver_version,memory.total,compute_mode,mig.mode.current"
    command = [smi, f"--query-gpu={query}", "--format=csv,noheader"]
    first.insert(0, job("GPU", command, 10, lambda text: {"gpu": text.strip()}))
  return [
    Stage(1, "install, versions, doctor", first),
    Stage(2, "one rank", [program("operations", "operations", 1, 60)]),
    Stage(
      3, "two ranks on one GPU", [program("operations", "operations", 2, 75)]
    ),
    Stage(
      4,
      "averages against raw NCCL and XLA",
      [
        program("averages", "averages", 2, 75),
        job(
          "XLA",
          [PYTHON, str(FOLDER / "averages.py"), "--xla", "start"],
          45,
        ),
      ],
    ),
    Stage(5, "ranked tests", [ranked(2, 120), ranked(4, 60)]),
  ]


def environment_facts() -> dict:
  """What is known before anything is installed."""
  return {
    "Python": sys.version.split()[0],
    "cores": len(os.sched_getaffinity(0)),
    "MPS": shutil.which("nvidia-cuda-mps-control") or "not installed",
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
