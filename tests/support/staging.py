"""Runs ranked tests on an extension that pip did not install, for scripts."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Runs at the start of Python. An editable installation finds its modules before
# PYTHONPATH does. A rank's preloaded library must not be loaded into mpirun.
_SITECUSTOMIZE = """\
import os, sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in repr(f)]
is_rank = {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & set(os.environ)
if is_rank and "JFOG_PRELOAD" in os.environ:
  import ctypes
  ctypes.CDLL(None).personality(0x0040000)  # TSan wants fixed addresses
  os.environ["LD_PRELOAD"] = os.environ.pop("JFOG_PRELOAD")
  os.execv(sys.executable, sys.orig_argv)
"""
_SAY_WHICH = """
import os, jfog, jfog.runtime
world = jfog.init()
from jfog import _mpi
print(f"rank {world.rank} of {world.size} loads {_mpi.__file__}", flush=True)
raise SystemExit(not _mpi.__file__.startswith(os.environ["JFOG_STAGE"]))
"""


def stage(folder, built, ranks=2, **environment):
  """Assembles the package and verifies that ranks load the built modules.

  Args:
    folder: where the copy of the package is to be.
    built: the directory with the extensions and `_build.py`, in which a relative
      launcher is as seen from an installed jfog.
    ranks: the number of ranks that load it.
    **environment: variables of the ranks' environment.

  Returns:
    The environment in which Python finds this package and no other.
  """
  package = pathlib.Path(folder) / "jfog"
  shutil.copytree(ROOT / "jfog", package)
  for name in ("_mpi", "_nccl"):
    (extension,) = pathlib.Path(built).glob(f"{name}*.so")
    shutil.copy(extension, package)
  build = (pathlib.Path(built) / "_build.py").read_text()
  installed = pathlib.Path(sysconfig.get_path("platlib"), "jfog")
  build += f"""
import os
MPI_LAUNCHER = os.path.normpath(os.path.join({str(installed)!r}, MPI_LAUNCHER))
"""
  (package / "_build.py").write_text(build)
  (package.parent / "sitecustomize.py").write_text(_SITECUSTOMIZE)
  environment = {
    **os.environ,
    "PYTHONPATH": str(folder),
    "JFOG_STAGE": str(package),
    **environment,
  }
  run(jfog_run(ranks, [sys.executable, "-c", _SAY_WHICH]), environment, folder)
  return environment


def jfog_run(ranks, command):
  """The command that runs another one on ranks."""
  words = ["run", "--no-tag-output", "-np", str(ranks)]
  return [sys.executable, "-m", "jfog.cli", *words, *command]


def run(command, environment=None, folder=ROOT):
  """Runs a command in a folder; the script ends if it fails."""
  code = subprocess.run(command, env=environment, cwd=folder).returncode
  if code:
    sys.exit(f"{' '.join(map(str, command[:4]))} ... ended with code {code}")
