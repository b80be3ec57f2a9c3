"""`jfog doctor`: the facts about this machine and environment, and remedies."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any

from jfog import launch

_PACKAGES = ("jfog", "jax", "jaxlib", "numpy", "optax", "mpi4py", "mpi4jax")
_REQUIRED = 5
_PREFIXES = ("JFOG_", "OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "NCCL_", "UCX_")
_NAMES = (
  "JAX_PLATFORMS",
  "XLA_FLAGS",
  "CUDA_VISIBLE_DEVICES",
  "OMP_NUM_THREADS",
)
_LEAST_SHARED = (
  32 * 2**20
)  # bytes of /dev/shm that Open MPI takes for two ranks
_EXCHANGE = """
import jax.numpy as jnp, jfog
jfog.init(timeout=30.0)
total = float(jfog.allreduce(jnp.float32(jfog.rank() + 1), op="sum"))
assert jfog.size() == 2, f"launched as 2 ranks, a world of {jfog.size()}"
assert total == 3.0, f"the sum of 1 and 2 came out as {total}"
"""


def examine() -> dict[str, Any]:
  """The findings of `jfog doctor`.

  Returns:
    A dict that JSON can hold: `python`, `versions` by package, `machine` (cores,
    memory and shared memory in bytes), `devices`, `gpus`, `nccl`, `mpi`,
    `variables` that matter and are set, `exchange` of two ranks, and `problems`,
    a list of `{"problem": ..., "remedy": ...}`.
  """
  # JAX would reserve most of a GPU's memory, which the two ranks need.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  found: dict[str, Any] = {
    "python": sys.version.split()[0],
    "versions": {name: version(name) for name in _PACKAGES},
    "machine": _machine(),
    "devices": _devices(),
    "gpus": _gpus(),
    "nccl": _nccl(),
    "mpi": _mpi(),
    "variables": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(_PREFIXES) or name in _NAMES
    },
  }
  # Without MPI there is nothing to launch, and simulation and meshes work.
  found["exchange"] = exchange() if "library" in found["mpi"] else None
  found["problems"] = _problems(found)
  return found


def version(package: str) -> str:
  """The version of an installed package, or "not installed"."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def _machine() -> dict[str, Any]:
  """Cores that ranks may use, and bytes of memory and of shared memory."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  found = {"cores": len(os.sched_getaffinity(0)), "memory": memory}
  if os.path.isdir("/dev/shm"):
    total, _, free = shutil.disk_usage("/dev/shm")
    found |= {"shared_memory": total, "shared_memory_free": free}
  return found


def _devices() -> dict[str, Any]:
  import jax

  try:
    return {"devices": [str(device) for device in jax.devices()]}
  except RuntimeError as error:
    return {"missing": str(error)}


def _gpus() -> dict[str, Any]:
  from jfog.runtime import _gpu_placement

  found = _gpu_placement.gpus()
  if not found.names:
    return {"missing": str(found.reason)}
  return {"names": list(found.names)}


def _nccl() -> dict[str, Any]:
  from jfog import runtime

  try:
    number, path = runtime.nccl_library()
  except RuntimeError as error:
    return {"missing": str(error)}
  return {"version": number, "path": path}


def _mpi() -> dict[str, Any]:
  try:
    mpi = launch.installed_mpi()
  except RuntimeError as error:
    return {"missing": str(error)}
  return {
    "library": mpi.library,
    "family": mpi.family,
    "launcher": mpi.launcher,
    # jfog.init refuses an MPI with less.
    "thread_level": "MPI_THREAD_MULTIPLE",
    "transports": _transports(),
  }


def _transports() -> list[str]:
  """How ranks of one machine, and machines, exchange."""
  own = os.environ.get("JFOG_SHARED_MEMORY") != "0"
  layers = [
    f"{name}={os.environ[f'OMPI_MCA_{name}']}"
    for name in ("pml", "btl")
    if f"OMPI_MCA_{name}" in os.environ
  ]
  messages = "MPI messages" + (f" ({', '.join(layers)})" if layers else "")
  return [*(["shared memory"] if own else []), messages]


def exchange() -> dict[str, Any]:
  """Runs an allreduce of two ranks; its seconds, and the failure or ""."""
  # A job of its own: this process must not start MPI, as it may go on without.
  program = [sys.executable, "-c", _EXCHANGE]
  arguments = ["-np", "2", "--timeout", "120", *program]
  start = time.monotonic()
  done = subprocess.run(
    launch.command_line(arguments),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    errors="replace",
  )
  seconds = round(time.monotonic() - start, 1)
  if done.returncode == 0:
    return {"problem": "", "seconds": seconds}
  # The launcher's own report comes last.
  report = done.stderr[done.stderr.rfind("jfog run: ") :].strip()
  problem = f"an exchange fails with exit code {done.returncode}:\n{report}"
  return {"problem": problem, "seconds": seconds}


def _problems(found: dict[str, Any]) -> list[dict[str, str]]:
  """Each thing that does not work, with a remedy."""
  problems = []

  def add(problem: str, remedy: str) -> None:
    problems.append({"problem": problem, "remedy": remedy})

  for name in _PACKAGES[:_REQUIRED]:
    if found["versions"][name] == "not installed":
      add(f"{name} is not installed", f"pip install {name}")
  if missing := found["devices"].get("missing"):
    add(
      f"JAX has no devices: {missing}", "set JAX_PLATFORMS=cpu, or install jax"
    )
  free = found["machine"].get("shared_memory_free")
  if free is not None and free < _LEAST_SHARED:
    add(
      f"/dev/shm has {free >> 20} MiB free",
      "mount it larger (docker run --shm-size=1g): Open MPI takes 16 MiB of it for "
      "each rank",
    )
  if found["exchange"] and found["exchange"]["problem"]:
    add(
      found["exchange"]["problem"],
      "see the page on troubleshooting; `jfog run -v -np 2 hostname` shows the "
      "command of mpirun",
    )
  return problems


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
  """The findings as rows of a label and a text."""
  machine = found["machine"]
  mpi, nccl, gpus = found["mpi"], found["nccl"], found["gpus"]
  memory = f"{machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB"
  if "shared_memory" in machine:
    memory += (
      f", /dev/shm {machine['shared_memory_free'] / 2**30:.1f} of "
      f"{machine['shared_memory'] / 2**30:.1f} GiB free"
    )
  versions = found["versions"].items()
  table = [
    ("python", found["python"]),
    *(
      (name, text)
      for k, (name, text) in enumerate(versions)
      if k < _REQUIRED or text != "not installed"
    ),
    ("machine", memory),
    ("devices", _row(found["devices"], lambda x: ", ".join(x["devices"]))),
    (
      "GPUs",
      _row(gpus, lambda x: f"{len(x['names'])}: {', '.join(x['names'])}"),
    ),
    ("NCCL", _row(nccl, lambda x: f"{x['version']} ({x['path']})")),
    ("MPI", _row(mpi, lambda x: f"{x['library']} ({x['family']})")),
  ]
  if "library" in mpi:
    table += [
      ("launcher", mpi["launcher"]),
      ("threads", mpi["thread_level"]),
      ("transport", ", ".join(mpi["transports"])),
    ]
  table += [
    ("variable", f"{name}={value}")
    for name, value in found["variables"].items()
  ]
  if found["exchange"]:
    problem, seconds = (
      found["exchange"]["problem"],
      found["exchange"]["seconds"],
    )
    works = f"an exchange works ({seconds} s with the start of both)"
    table.append(("two ranks", problem or works))
  table += [
    ("problem", f"{each['problem']}\n{'':<10}remedy: {each['remedy']}")
    for each in found["problems"]
    if not (
      found["exchange"] and each["problem"] == found["exchange"]["problem"]
    )
  ]
  return table


def _row(found: dict[str, Any], text: Any) -> str:
  """The text of what was found, or the reason why there is none."""
  return f"none: {found['missing']}" if "missing" in found else text(found)


def report(*, as_json: bool) -> int:
  """Prints the findings; 1 if there is a problem."""
  found = examine()
  if as_json:
    print(json.dumps(found, indent=2))
  else:
    for label, text in rows(found):
      print(f"{label:<10}{text}", flush=True)
  return 1 if found["problems"] else 0
