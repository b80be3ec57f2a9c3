"""Jobs of SLURM, PBS, LSF, Kubernetes: their variables, as `init` and `run` see them."""

import os
import pathlib
import re
import socket
import sys

import pytest
import yaml
from support import jobs

import jfog
from jfog import launch, runtime
from jfog.launch import allocation
from jfog.runtime import _bootstrap

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs/running.md"
DEADLINE = 120.0  # seconds
HOST = socket.gethostname()
needs_open_mpi = pytest.mark.skipif(
  runtime.build().MPI_FAMILY != "openmpi", reason="jfog is not on Open MPI"
)


def slurm(nodes, tasks):
  """The variables of a batch script in an allocation of SLURM."""
  return {
    **{"SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_PROCID": "0"},
    **{"SLURM_JOB_NODELIST": nodes, "SLURM_NODELIST": nodes},
    **{"SLURM_TASKS_PER_NODE": tasks, "SLURM_NTASKS": "2"},
    "SLURM_JOB_NUM_NODES": str(len(nodes.split(","))),
  }


def in_file(folder, names, *, variables):
  """Variables that name a file with a host for each slot."""
  path = folder / "hosts"
  path.write_text("\n".join(names) + "\n")
  return {name: value or str(path) for name, value in variables.items()}


def pbs(folder, names):
  """The variables of a job of PBS."""
  variables = {"PBS_JOBID": "7", "PBS_ENVIRONMENT": "PBS_BATCH"}
  return in_file(folder, names, variables={**variables, "PBS_NODEFILE": ""})


def lsf(folder, names):
  """The variables of a job of LSF."""
  variables = {"LSB_JOBID": "7", "LSB_DJOB_HOSTFILE": ""}
  return in_file(folder, names, variables=variables)


def run(variables, *words):
  """Runs `jfog run` with a scheduler's variables."""
  return jobs.printed(
    launch.command_line(list(words)),
    deadline=DEADLINE,
    environment={**os.environ, **variables},
  )


def test_allocations(tmp_path):
  names = ["a", "a", "b"]
  assert allocation.allocation({}) == (0, 0, "")
  assert allocation.allocation(slurm("a,b", "4,2")) == (2, 6, "")
  assert allocation.allocation(slurm("a,b,c", "4(x2),1"))[:2] == (3, 9)
  assert allocation.allocation(pbs(tmp_path, names)) == (2, 3, "")
  assert allocation.allocation(lsf(tmp_path, names)) == (
    *(2, 3),
    str(tmp_path / "hosts"),
  )
  gone = {"PBS_NODEFILE": str(tmp_path / "gone")}
  assert allocation.allocation(gone) == (0, 0, "")


@needs_open_mpi
@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "lsf"])
def test_ranks_of_an_allocation_of_one_host_run(tmp_path, scheduler):
  variables = {
    "slurm": slurm(HOST, "2"),
    "pbs": pbs(tmp_path, [HOST, HOST]),
    "lsf": lsf(tmp_path, [HOST, HOST]),
  }[scheduler]
  words = (sys.executable, "-c", "import os; print(os.uname().nodename)")
  assert (
    run(variables, "--no-tag-output", "-np", "2", *words).split()
    == [os.uname().nodename] * 2
  )


@needs_open_mpi
@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "lsf"])
def test_an_allocation_of_several_hosts_is_used(tmp_path, scheduler):
  """The network is on, variables go along, and the wheel is given LSF's hosts."""
  variables = {
    "slurm": slurm("a,b", "2(x2)"),
    "pbs": pbs(tmp_path, ["a", "a", "b", "b"]),
    "lsf": lsf(tmp_path, ["a", "a", "b", "b"]),
  }[scheduler]
  variables["WITH_THEM"] = "1"
  line = run(variables, "--dry-run", "-np", "auto", "true")
  assert " -np 4 " in line
  assert " -x JFOG_RUN_DIR " in line
  assert " -x WITH_THEM " in line
  assert "OMPI_MCA_btl=" not in line
  assert ("--hostfile" in line) == (scheduler == "lsf")
  named = run(variables, "--dry-run", "-np", "2", "-H", "c:2", "true")
  assert "-H c:2" in named
  assert "--hostfile" not in named


@pytest.mark.parametrize(
  ("variables", "size"),
  [
    # srun --mpi=pmix: PMIx names the rank, and MPI itself the size.
    ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0"}, 0),
    ({"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "8"}, 4),  # --mpi=pmi2
    ({"PMI_RANK": "1", "PMI_SIZE": "4", "PALS_APID": "7"}, 4),  # Cray's aprun
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, 4),
    ({}, None),
  ],
  ids=str,
)
def test_launchers_of_mpi_are_recognized(monkeypatch, variables, size):
  """Also inside of a step of SLURM, whose variables alone would be refused."""
  step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
  for name, value in {**step, **variables}.items():
    monkeypatch.setenv(name, value)
  assert _bootstrap.launched_size() == size


@needs_open_mpi
def test_pmi2_is_refused_where_mpi_has_only_pmix():
  """Open MPI from 5 on has no PMI-2: each task would be a world of one."""
  program = """
import os
os.environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
os.environ |= {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": "8"}
for name in [n for n in os.environ if n.startswith(("OMPI_", "PMIX_"))]:
  del os.environ[name]
import jfog
try:
  jfog.init()
except RuntimeError as error:
  print(error)
"""
  code, out, err = jobs.run_program(
    program, 1, deadline=DEADLINE, command=["env"]
  )
  assert code == 0, err
  assert "launched as one of 2 ranks, but its MPI" in out
  assert "srun --mpi=pmix" in out


@pytest.mark.parametrize(
  ("size", "rank"),
  [("WORLD_SIZE", "RANK"), ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK")],
)
def test_copies_without_mpi_are_refused(monkeypatch, size, rank):
  """torchrun and jsrun."""
  monkeypatch.setenv(size, "4")
  monkeypatch.setenv(rank, "0")
  with pytest.raises(RuntimeError, match=r"jfog run -np 4 .*backend='single'"):
    jfog.init()


def test_the_manifest_of_kubernetes_is_one():
  """Its launcher runs `jfog run` on the hosts that the operator names."""
  (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
  job = yaml.safe_load(text)
  assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
  spec = job["spec"]
  replicas = spec["mpiReplicaSpecs"]
  workers = replicas["Worker"]["replicas"]
  (container,) = replicas["Launcher"]["template"]["spec"]["containers"]
  command = container["command"]
  assert command[:2] == ["jfog", "run"]
  np = int(command[command.index("-np") + 1])
  assert np == workers * spec["slotsPerWorker"]
  assert command[command.index("--hostfile") + 1] == "/etc/mpi/hostfile"
