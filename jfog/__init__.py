"""jfog: decentralized training for JAX."""

from jfog import diagnostics as diagnostics
from jfog import optimizers as optimizers
from jfog import topology as topology
from jfog.primitives import Handle as Handle
from jfog.primitives import Peers as Peers
from jfog.primitives import Window as Window
from jfog.primitives import allgather as allgather
from jfog.primitives import allgather_start as allgather_start
from jfog.primitives import allreduce as allreduce
from jfog.primitives import allreduce_start as allreduce_start
from jfog.primitives import barrier as barrier
from jfog.primitives import broadcast as broadcast
from jfog.primitives import broadcast_start as broadcast_start
from jfog.primitives import finite_time_average as finite_time_average
from jfog.primitives import (
  finite_time_average_start as finite_time_average_start,
)
from jfog.primitives import (
  hierarchical_neighbor_allreduce as hierarchical_neighbor_allreduce,
)
from jfog.primitives import (
  hierarchical_neighbor_allreduce_start as hierarchical_neighbor_allreduce_start,
)
from jfog.primitives import neighbor_allgather as neighbor_allgather
from jfog.primitives import neighbor_allgather_start as neighbor_allgather_start
from jfog.primitives import neighbor_allreduce as neighbor_allreduce
from jfog.primitives import neighbor_allreduce_start as neighbor_allreduce_start
from jfog.primitives import pair_gossip as pair_gossip
from jfog.primitives import pair_gossip_start as pair_gossip_start
from jfog.primitives import poll as poll
from jfog.primitives import wait as wait
from jfog.primitives import win_accumulate as win_accumulate
from jfog.primitives import win_accumulate_start as win_accumulate_start
from jfog.primitives import win_associated_p as win_associated_p
from jfog.primitives import win_create as win_create
from jfog.primitives import win_free as win_free
from jfog.primitives import win_get as win_get
from jfog.primitives import win_get_start as win_get_start
from jfog.primitives import win_mutex as win_mutex
from jfog.primitives import win_put as win_put
from jfog.primitives import win_put_start as win_put_start
from jfog.primitives import win_update as win_update
from jfog.primitives import win_update_then_collect as win_update_then_collect
from jfog.primitives import win_version as win_version
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
