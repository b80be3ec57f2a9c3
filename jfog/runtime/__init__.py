"""Runtime: communicators and backends."""

from jfog.runtime._attackers import Attack as Attack
from jfog.runtime._attackers import Message as Message
from jfog.runtime._attackers import has_attackers as has_attackers
from jfog.runtime._attackers import (
  refuse_with_attackers as refuse_with_attackers,
)
from jfog.runtime._attackers import sent as sent
from jfog.runtime._bindings import is_simulated as is_simulated
from jfog.runtime._communicator import AXIS_NAME as AXIS_NAME
from jfog.runtime._communicator import LOCAL_AXIS_NAME as LOCAL_AXIS_NAME
from jfog.runtime._communicator import Axis as Axis
from jfog.runtime._communicator import Communicator as Communicator
from jfog.runtime._communicator import (
  NotInitializedError as NotInitializedError,
)
from jfog.runtime._communicator import Single as Single
from jfog.runtime._delays import checked_delay as checked_delay
from jfog.runtime._delays import window_delays as window_delays
from jfog.runtime._extensions import build as build
from jfog.runtime._extensions import mpi as mpi
from jfog.runtime._extensions import nccl_library as nccl_library
from jfog.runtime._map_ranks import map_ranks as map_ranks
from jfog.runtime._map_ranks import num_ranks as num_ranks
from jfog.runtime._map_ranks import shard as shard
from jfog.runtime._map_ranks import stack as stack
from jfog.runtime._presence import Presence as Presence
from jfog.runtime._presence import presence as presence
from jfog.runtime._presence import refuse_with_missing as refuse_with_missing
from jfog.runtime._process_communicator import (
  MpiCommunicator as MpiCommunicator,
)
from jfog.runtime._process_communicator import (
  ProcessCommunicator as ProcessCommunicator,
)
from jfog.runtime._process_communicator import counters as counters
from jfog.runtime._process_communicator import reset_counters as reset_counters
from jfog.runtime._rank_process import refuse_in_fork as refuse_in_fork
from jfog.runtime._recovery import is_rank_failure as is_rank_failure
from jfog.runtime._recovery import missing_ranks as missing_ranks
from jfog.runtime._recovery import recover as recover
from jfog.runtime._role import take_state as take_state
from jfog.runtime._simulate import simulate as simulate
from jfog.runtime._simulate import spmd as spmd
from jfog.runtime._summary import RankSummary as RankSummary
from jfog.runtime._summary import Summary as Summary
from jfog.runtime._summary import begin_summary as begin_summary
from jfog.runtime._summary import gathered_summary as gathered_summary
from jfog.runtime._timeline import timeline as timeline
from jfog.runtime._world import init as init
from jfog.runtime._world import is_homogeneous as is_homogeneous
from jfog.runtime._world import local_rank as local_rank
from jfog.runtime._world import local_size as local_size
from jfog.runtime._world import machine_rank as machine_rank
from jfog.runtime._world import machine_size as machine_size
from jfog.runtime._world import rank as rank
from jfog.runtime._world import resolve as resolve
from jfog.runtime._world import shutdown as shutdown
from jfog.runtime._world import size as size
from jfog.runtime._world import world as world
