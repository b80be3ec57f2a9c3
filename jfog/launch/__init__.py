"""Launch: `jfog run` and the wrapper that it starts around each rank.

The launcher starts mpirun; mpirun starts this folder as a program around every
rank. The wrapper of a rank runs the command, keeps the end of its stderr, and
leaves a record when it fails, from which the launcher reports the first failure.
Both run on the standard library alone and import a module where they use it,
because a job pays for the wrapper's start once per rank. `jfog.run` starts the
launcher from a Python session.
"""

from .function import run as run
from .launcher import Mpi as Mpi
from .launcher import built_package as built_package
from .launcher import command_line as command_line
from .launcher import installed_mpi as installed_mpi
from .launcher import job_environment as job_environment
from .launcher import main as main
from .launcher import mpirun_command as mpirun_command
from .rank import rank_environment as rank_environment
from .report import failure_report as failure_report
from .report import first_failure as first_failure
