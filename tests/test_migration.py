"""Every public name of BlueFog has its place in the page about migration."""

import pathlib
import re

import jfog

PAGE = (
  pathlib.Path(__file__)
  .resolve()
  .parents[1]
  .joinpath("docs", "migrating_from_bluefog.md")
)
# The public names of BlueFog 0.3.
NAMES = """
  init shutdown size rank local_size local_rank machine_size machine_rank
  is_homogeneous mpi_threads_supported unified_mpi_window_model_supported nccl_built
  suspend resume set_skip_negotiate_stage get_skip_negotiate_stage
  set_topology load_topology is_topo_weighted in_neighbor_ranks out_neighbor_ranks
  set_machine_topology load_machine_topology is_machine_topo_weighted
  in_neighbor_machine_ranks out_neighbor_machine_ranks
  allreduce allreduce_ allreduce_nonblocking allreduce_nonblocking_
  allgather allgather_nonblocking broadcast broadcast_ broadcast_nonblocking
  broadcast_nonblocking_ barrier neighbor_allreduce neighbor_allreduce_nonblocking
  neighbor_allgather neighbor_allgather_nonblocking
  hierarchical_neighbor_allreduce hierarchical_neighbor_allreduce_nonblocking
  pair_gossip pair_gossip_nonblocking poll wait synchronize
  win_create win_free win_put win_put_nonblocking win_get win_get_nonblocking
  win_accumulate win_accumulate_nonblocking win_update win_update_then_collect
  win_wait win_poll win_mutex get_win_version win_associated_p
  turn_on_win_ops_with_associated_p turn_off_win_ops_with_associated_p
  get_current_created_window_names
  broadcast_parameters broadcast_optimizer_state allreduce_parameters
  timeline_start_activity timeline_end_activity timeline_context
  CommunicationType DistributedAdaptThenCombineOptimizer
  DistributedAdaptWithCombineOptimizer DistributedGradientAllreduceOptimizer
  DistributedAllreduceOptimizer DistributedNeighborAllreduceOptimizer
  DistributedHierarchicalNeighborAllreduceOptimizer DistributedWinPutOptimizer
  DistributedPullGetOptimizer DistributedPushSumOptimizer
  ExponentialTwoGraph ExponentialGraph SymmetricExponentialGraph MeshGrid2DGraph
  StarGraph RingGraph FullyConnectedGraph IsTopologyEquivalent IsRegularGraph
  GetRecvWeights GetSendWeights GetDynamicOnePeerSendRecvRanks
  GetDynamicSendRecvRanks GetExp2DynamicSendRecvMachineRanks
  GetInnerOuterRingDynamicSendRecvRanks GetInnerOuterExpo2DynamicSendRecvRanks
  InferSourceFromDestinationRanks InferDestinationFromSourceRanks
  bfrun ibfrun BLUEFOG_TIMELINE BLUEFOG_LOG_LEVEL BLUEFOG_LOG_HIDE_TIME
  BLUEFOG_CYCLE_TIME BLUEFOG_FUSION_THRESHOLD BLUEFOG_NODES_PER_MACHINE
  BLUEFOG_OPS_ON_CPU BLUEFOG_WIN_ON_CPU BLUEFOG_MPI_THREAD_LEVEL
  BLUEFOG_NUM_FINALIZER_THREADS
"""
BLUEFOG = NAMES.split()


def rows():
  """Pairs of the two columns of the tables."""
  for line in PAGE.read_text().splitlines():
    if line.startswith("| ") and not line.startswith("| BlueFog"):
      left, right = re.split(r"\s\|\s", line.strip("| "), maxsplit=1)
      yield left, right


def test_every_name_of_bluefog_has_a_row():
  found = " ".join(left for left, _ in rows())
  names = set(re.findall(r"\w+", found))
  assert not [name for name in BLUEFOG if name not in names]


def test_rows_name_what_jfog_has():
  count = 0
  for _, right in rows():
    assert right
    for path in re.findall(r"jfog((?:\.[a-z_]\w*)+)", right, re.IGNORECASE):
      value = jfog
      for name in path.strip(".").split("."):
        value = getattr(value, name)
        count += 1
  assert count > 50
