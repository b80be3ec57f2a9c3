"""jfog: decentralized training for JAX."""

from jfog import diagnostics as diagnostics
from jfog import optimizers as optimizers
from jfog import topology as topology
from jfog.primitives import allgather as allgather
from jfog.primitives import allreduce as allreduce
from jfog.primitives import barrier as barrier
from jfog.primitives import broadcast as broadcast
from jfog.primitives import neighbor_allreduce as neighbor_allreduce
from jfog.runtime import AXIS_NAME as AXIS_NAME
from jfog.runtime import Axis as Axis
from jfog.runtime import Communicator as Communicator
from jfog.runtime import NotInitializedError as NotInitializedError
from jfog.runtime import init as init
from jfog.runtime import local_rank as local_rank
from jfog.runtime import local_size as local_size
from jfog.runtime import machine_rank as machine_rank
from jfog.runtime import machine_size as machine_size
from jfog.runtime import rank as rank
from jfog.runtime import shutdown as shutdown
from jfog.runtime import simulate as simulate
from jfog.runtime import size as size
from jfog.runtime import spmd as spmd
