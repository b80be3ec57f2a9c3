"""Operations between ranks, as JAX primitives."""

from jfog.primitives._allgather import allgather as allgather
from jfog.primitives._allgather import allgather_start as allgather_start
from jfog.primitives._allreduce import allreduce as allreduce
from jfog.primitives._allreduce import allreduce_start as allreduce_start
from jfog.primitives._barrier import barrier as barrier
from jfog.primitives._broadcast import broadcast as broadcast
from jfog.primitives._broadcast import broadcast_start as broadcast_start
from jfog.primitives._ffi_attributes import check_graph as check_graph
from jfog.primitives._finite_time_average import (
  finite_time_average as finite_time_average,
)
from jfog.primitives._finite_time_average import (
  finite_time_average_start as finite_time_average_start,
)
from jfog.primitives._hierarchical import (
  hierarchical_neighbor_allreduce as hierarchical_neighbor_allreduce,
)
from jfog.primitives._hierarchical import (
  hierarchical_neighbor_allreduce_start as hierarchical_neighbor_allreduce_start,
)
from jfog.primitives._infer_peers import (
  infer_destinations as infer_destinations,
)
from jfog.primitives._infer_peers import infer_sources as infer_sources
from jfog.primitives._mesh import uniform as uniform
from jfog.primitives._mesh import varying as varying
from jfog.primitives._neighbor_allgather import (
  neighbor_allgather as neighbor_allgather,
)
from jfog.primitives._neighbor_allgather import (
  neighbor_allgather_start as neighbor_allgather_start,
)
from jfog.primitives._neighbor_allreduce import (
  neighbor_allreduce as neighbor_allreduce,
)
from jfog.primitives._neighbor_allreduce import (
  neighbor_allreduce_start as neighbor_allreduce_start,
)
from jfog.primitives._operation import Handle as Handle
from jfog.primitives._operation import poll as poll
from jfog.primitives._operation import wait as wait
from jfog.primitives._pair_gossip import pair_gossip as pair_gossip
from jfog.primitives._pair_gossip import pair_gossip_start as pair_gossip_start
from jfog.primitives._peers import Peers as Peers
from jfog.primitives._share_state import share_state as share_state
from jfog.primitives.windows import Window as Window
from jfog.primitives.windows import win_accumulate as win_accumulate
from jfog.primitives.windows import (
  win_accumulate_start as win_accumulate_start,
)
from jfog.primitives.windows import win_associated_p as win_associated_p
from jfog.primitives.windows import win_create as win_create
from jfog.primitives.windows import win_free as win_free
from jfog.primitives.windows import win_get as win_get
from jfog.primitives.windows import win_get_start as win_get_start
from jfog.primitives.windows import win_missing as win_missing
from jfog.primitives.windows import win_mutex as win_mutex
from jfog.primitives.windows import win_put as win_put
from jfog.primitives.windows import win_put_start as win_put_start
from jfog.primitives.windows import win_update as win_update
from jfog.primitives.windows import (
  win_update_then_collect as win_update_then_collect,
)
from jfog.primitives.windows import win_version as win_version
