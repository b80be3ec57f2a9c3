"""Operations between ranks, as JAX primitives."""

from jfog.primitives._collectives import allgather as allgather
from jfog.primitives._collectives import allreduce as allreduce
from jfog.primitives._collectives import barrier as barrier
from jfog.primitives._collectives import broadcast as broadcast
from jfog.primitives._mesh import uniform as uniform
from jfog.primitives._neighbor import check_graph as check_graph
from jfog.primitives._neighbor import neighbor_allreduce as neighbor_allreduce
