"""The public names, each of which `__init__.py` imports at its first use."""

from . import attacks as attacks
from . import diagnostics as diagnostics
from . import lab as lab
from . import optimizers as optimizers
from . import topology as topology
from ._timeline import span as span
from .launch import run as run
from .primitives import Handle as Handle
from .primitives import Peers as Peers
from .primitives import Window as Window
from .primitives import allgather as allgather
from .primitives import allgather_start as allgather_start
from .primitives import allreduce as allreduce
from .primitives import allreduce_start as allreduce_start
from .primitives import barrier as barrier
from .primitives import broadcast as broadcast
from .primitives import broadcast_start as broadcast_start
from .primitives import finite_time_average as finite_time_average
from .primitives import (
  finite_time_average_start as finite_time_average_start,
)
from .primitives import (
  hierarchical_neighbor_allreduce as hierarchical_neighbor_allreduce,
)
from .primitives import (
  hierarchical_neighbor_allreduce_start as hierarchical_neighbor_allreduce_start,
)
from .primitives import infer_destinations as infer_destinations
from .primitives import infer_sources as infer_sources
from .primitives import neighbor_allgather as neighbor_allgather
from .primitives import neighbor_allgather_start as neighbor_allgather_start
from .primitives import neighbor_allreduce as neighbor_allreduce
from .primitives import neighbor_allreduce_start as neighbor_allreduce_start
from .primitives import pair_gossip as pair_gossip
from .primitives import pair_gossip_start as pair_gossip_start
from .primitives import poll as poll
from .primitives import share_state as share_state
from .primitives import wait as wait
from .primitives import win_accumulate as win_accumulate
from .primitives import win_accumulate_start as win_accumulate_start
from .primitives import win_associated_p as win_associated_p
from .primitives import win_create as win_create
from .primitives import win_free as win_free
from .primitives import win_get as win_get
from .primitives import win_get_start as win_get_start
from .primitives import win_missing as win_missing
from .primitives import win_mutex as win_mutex
from .primitives import win_put as win_put
from .primitives import win_put_start as win_put_start
from .primitives import win_update as win_update
from .primitives import win_update_then_collect as win_update_then_collect
from .primitives import win_version as win_version
from .runtime import AXIS_NAME as AXIS_NAME
from .runtime import Axis as Axis
from .runtime import Communicator as Communicator
from .runtime import NotInitializedError as NotInitializedError
from .runtime import init as init
from .runtime import is_homogeneous as is_homogeneous
from .runtime import is_rank_failure as is_rank_failure
from .runtime import local_rank as local_rank
from .runtime import local_size as local_size
from .runtime import machine_rank as machine_rank
from .runtime import machine_size as machine_size
from .runtime import map_ranks as map_ranks
from .runtime import missing_ranks as missing_ranks
from .runtime import num_ranks as num_ranks
from .runtime import rank as rank
from .runtime import recover as recover
from .runtime import shard as shard
from .runtime import shutdown as shutdown
from .runtime import simulate as simulate
from .runtime import size as size
from .runtime import spmd as spmd
from .runtime import stack as stack
from .runtime import timeline as timeline

__version__: str
