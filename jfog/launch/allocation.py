"""The hosts that SLURM, PBS or LSF have allocated to the job of `jfog run`."""

import collections
import re
from collections.abc import Mapping

Allocation = collections.namedtuple(
  "Allocation", ["hosts", "slots", "hostfile"]
)
Allocation.__doc__ = """Hosts on which a scheduler lets a job run.

`hosts` is their number, `slots` the number of ranks that fit, 0 if it is not known,
and `hostfile` a file that `mpirun` has to be given, "" if it finds the hosts itself.
"""
_NONE = Allocation(0, 0, "")


def allocation(environ: Mapping[str, str]) -> Allocation:
  """Returns the allocation in whose first host this process runs.

  Open MPI reads those of SLURM and PBS by itself. That of LSF only a build with LSF's
  library reads, which the wheel is not, so that it is passed on as a hostfile.

  Args:
    environ: the environment, with the scheduler's variables.

  Returns:
    The allocation; 0 hosts without one.

  Example:
    >>> slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    >>> slurm["SLURM_TASKS_PER_NODE"] = "4(x2),2"
    >>> allocation(slurm)
    Allocation(hosts=3, slots=10, hostfile='')
  """
  if "SLURM_JOB_ID" in environ:
    hosts = environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1"))
    tasks = re.findall(
      r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_TASKS_PER_NODE", "")
    )
    slots = sum(int(count) * int(times or 1) for count, times in tasks)
    return Allocation(int(hosts) if hosts.isdigit() else 1, slots, "")
  if path := environ.get("PBS_NODEFILE"):
    names = _lines(path)
    return Allocation(len(set(names)), len(names), "")
  if path := environ.get("LSB_DJOB_HOSTFILE"):
    names = _lines(path)
    return Allocation(len(set(names)), len(names), path)
  return _NONE


def _lines(path: str) -> list[str]:
  """The hosts of a file that names each once for each slot; none if unreadable."""
  try:
    with open(path, encoding="utf-8") as file:
      return [line.split()[0] for line in file if line.strip()]
  except OSError:
    return []
