"""`jfog doctor`: rows, JSON, and a remedy for each problem."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import jfog
from jfog import _doctor, cli, runtime
from jfog.runtime import _gpu_placement


@pytest.fixture
def doctor(monkeypatch, capsys):
  """A function that returns the rows of `jfog doctor`, without an exchange."""
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  works = {"problem": "", "seconds": 1.0}
  monkeypatch.setattr(_doctor, "exchange", lambda: works)

  def rows(gpus, nccl_library):
    monkeypatch.setattr(_gpu_placement, "gpus", lambda: gpus)
    monkeypatch.setattr(runtime, "nccl_library", nccl_library)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:10].strip(): line[10:] for line in lines}

  return rows


def test_doctor_names_the_gpus_and_nccl(doctor):
  gpus = _gpu_placement.Gpus(("NVIDIA H200", "NVIDIA A10"))
  rows = doctor(gpus, lambda: ("2.28.3", "/lib/libnccl.so.2"))
  assert rows["GPUs"] == "2: NVIDIA H200, NVIDIA A10"
  assert rows["NCCL"] == "2.28.3 (/lib/libnccl.so.2)"


def test_doctor_says_why_there_are_no_gpus_and_no_nccl(doctor):
  def missing():
    raise RuntimeError("libnccl.so.2 is not here.")

  rows = doctor(
    _gpu_placement.Gpus(reason="the CUDA driver finds no GPU"), missing
  )
  assert rows["GPUs"] == "none: the CUDA driver finds no GPU"
  assert rows["NCCL"] == "none: libnccl.so.2 is not here."


def test_doctor_as_json_with_a_remedy_for_what_fails(monkeypatch, capsys):
  failure = {
    "problem": "an exchange fails with exit code 1:\nx",
    "seconds": 1.0,
  }
  monkeypatch.setattr(_doctor, "exchange", lambda: failure)
  monkeypatch.setenv("OMPI_MCA_btl", "self,tcp")
  monkeypatch.setenv("JFOG_SHARED_MEMORY", "0")
  usage = shutil.disk_usage("/")
  small = usage._replace(free=2**20)
  monkeypatch.setattr(_doctor.shutil, "disk_usage", lambda path: small)
  assert cli.main(["doctor", "--json"]) == 1
  found = json.loads(capsys.readouterr().out)
  assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
  assert found["versions"]["jfog"] == jfog.__version__
  assert found["mpi"]["transports"] == ["MPI messages (btl=self,tcp)"]
  assert found["mpi"]["thread_level"] == "MPI_THREAD_MULTIPLE"
  assert found["variables"]["OMPI_MCA_btl"] == "self,tcp"
  problems = {each["problem"]: each["remedy"] for each in found["problems"]}
  assert failure["problem"] in problems
  assert "--shm-size" in problems["/dev/shm has 1 MiB free"]


def test_doctor_does_well_without_gpus():
  """Whatever the reasons are here, they are rows and no errors."""
  words = [sys.executable, "-m", "jfog.cli", "doctor"]
  environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    words, stdout=subprocess.PIPE, text=True, timeout=120, env=environ
  )
  rows = {line[:10].strip(): line[10:] for line in done.stdout.splitlines()}
  assert done.returncode == 0
  assert rows["GPUs"] == "none: JAX uses other platforms only (cpu)"
  assert rows["NCCL"]
