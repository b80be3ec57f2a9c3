"""Jobs of `jfog bench` under the launcher, and the machine they run on."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from jfog import launch


def run_job(
  ranks: int, job: dict[str, Any], environ: Mapping[str, str], deadline: float
) -> Any:
  """Runs `python -m jfog.bench` on the ranks; returns what rank 0 has written.

  Raises:
    RuntimeError: if the job fails.
  """
  with tempfile.TemporaryDirectory() as folder:
    result = pathlib.Path(folder) / "result.json"
    words = ["--no-tag-output", "-np", str(ranks)]
    words += ["--timeout", f"{deadline:g}", sys.executable, "-m", "jfog.bench"]
    command = launch.command_line(
      [*words, json.dumps({**job, "result": str(result)})]
    )
    code = subprocess.run(
      command, env=dict(environ), stdin=subprocess.DEVNULL, check=False
    ).returncode
    if code or not result.exists():
      raise RuntimeError(f"the job of {ranks} ranks ended with code {code}")
    return json.loads(result.read_text())


def facts() -> dict[str, Any]:
  """Cores and versions."""
  return {
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "jfog": importlib.metadata.version("jfog"),
    "jax": importlib.metadata.version("jax"),
    "mpi": launch.installed_mpi().library,
  }
