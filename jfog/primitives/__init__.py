"""Operations between ranks, as JAX primitives."""

from jfog.primitives._calls import Handle as Handle
from jfog.primitives._calls import poll as poll
from jfog.primitives._calls import wait as wait
from jfog.primitives._collectives import allgather as allgather
from jfog.primitives._collectives import allgather_start as allgather_start
from jfog.primitives._collectives import allreduce as allreduce
from jfog.primitives._collectives import allreduce_start as allreduce_start
from jfog.primitives._collectives import barrier as barrier
from jfog.primitives._collectives import broadcast as broadcast
from jfog.primitives._collectives import broadcast_start as broadcast_start
from jfog.primitives._finite_time import (
  finite_time_average as finite_time_average,
)
from jfog.primitives._finite_time import (
  finite_time_average_start as finite_time_average_start,
)
from jfog.primitives._gather import neighbor_allgather as neighbor_allgather
from jfog.primitives._gather import (
  neighbor_allgather_start as neighbor_allgather_start,
)
from jfog.primitives._graphs import check_graph as check_graph
from jfog.primitives._hierarchical import (
  hierarchical_neighbor_allreduce as hierarchical_neighbor_allreduce,
)
from jfog.primitives._hierarchical import (
  hierarchical_neighbor_allreduce_start as hierarchical_neighbor_allreduce_start,
)
from jfog.primitives._mesh import uniform as uniform
from jfog.primitives._neighbor import neighbor_allreduce as neighbor_allreduce
from jfog.primitives._neighbor import (
  neighbor_allreduce_start as neighbor_allreduce_start,
)
from jfog.primitives._peers import Peers as Peers
from jfog.primitives._peers import pair_gossip as pair_gossip
from jfog.primitives._peers import pair_gossip_start as pair_gossip_start
