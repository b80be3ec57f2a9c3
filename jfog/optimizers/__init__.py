"""Decentralized optimizers, as optax transformations.

Each rank runs the transformation on its own parameters and gradients. `update`
communicates: all ranks of the communicator call it equally often, except for
the window optimizers, which do not wait for other ranks. Conventions of all of
them:

* Weights are `W[dst, src]`: rank `dst` weights the value of rank `src` with
  them.
* `inner` is any optax transformation. It gets the rank's own gradient and the
  parameters at which that gradient was computed; its state is never averaged.
* `graph` is a `Topology`, a `Schedule`, read at the number of communications so
  far, or a function `(params, step) -> params`. `topology` stays the same in
  all steps; it is a `Topology` or, where stated, a function. A function is not
  checked.
  `clipped`, `trimmed_mean`, `coordinate_median` and `nearest_mean` make such
  functions, for graphs on which some ranks may send anything.
* `check=False` skips the checks of the graph, not the algorithm.
* `comm` is the communicator; the current one by default, see `jfog.init`.
* Parameters are float or complex. For 16-bit parameters the updates, the
  buffers and the messages are float32: `optax.apply_updates` rounds once per
  step.

`jfog.optimizers.contrib` lists the methods for special settings.
"""

from jfog.optimizers._bias_corrected import (
  ExactDiffusionState as ExactDiffusionState,
)
from jfog.optimizers._bias_corrected import ExtraState as ExtraState
from jfog.optimizers._bias_corrected import exact_diffusion as exact_diffusion
from jfog.optimizers._bias_corrected import extra as extra
from jfog.optimizers._combine import (
  AdaptThenCombineState as AdaptThenCombineState,
)
from jfog.optimizers._combine import (
  AdaptWithCombineState as AdaptWithCombineState,
)
from jfog.optimizers._combine import adapt_then_combine as adapt_then_combine
from jfog.optimizers._combine import adapt_with_combine as adapt_with_combine
from jfog.optimizers._compressed_gossip import ChocoState as ChocoState
from jfog.optimizers._compressed_gossip import choco as choco
from jfog.optimizers._gradient_allreduce import (
  GradientAllreduceState as GradientAllreduceState,
)
from jfog.optimizers._gradient_allreduce import (
  gradient_allreduce as gradient_allreduce,
)
from jfog.optimizers._gradient_tracking import (
  GradientTrackingState as GradientTrackingState,
)
from jfog.optimizers._gradient_tracking import PushPullState as PushPullState
from jfog.optimizers._gradient_tracking import (
  gradient_tracking as gradient_tracking,
)
from jfog.optimizers._gradient_tracking import push_pull as push_pull
from jfog.optimizers._momentum import DecentlamState as DecentlamState
from jfog.optimizers._momentum import (
  QuasiGlobalMomentumState as QuasiGlobalMomentumState,
)
from jfog.optimizers._momentum import decentlam as decentlam
from jfog.optimizers._momentum import (
  quasi_global_momentum as quasi_global_momentum,
)
from jfog.optimizers._periodic import DilocoState as DilocoState
from jfog.optimizers._periodic import GossipPgaState as GossipPgaState
from jfog.optimizers._periodic import LocalSgdState as LocalSgdState
from jfog.optimizers._periodic import SlowMomentumState as SlowMomentumState
from jfog.optimizers._periodic import diloco as diloco
from jfog.optimizers._periodic import gossip_pga as gossip_pga
from jfog.optimizers._periodic import local_sgd as local_sgd
from jfog.optimizers._periodic import slow_momentum as slow_momentum
from jfog.optimizers._push_sum import PushDigingState as PushDigingState
from jfog.optimizers._push_sum import PushSumState as PushSumState
from jfog.optimizers._push_sum import push_diging as push_diging
from jfog.optimizers._push_sum import push_sum as push_sum
from jfog.optimizers._robust import clipped as clipped
from jfog.optimizers._robust import coordinate_median as coordinate_median
from jfog.optimizers._robust import nearest_mean as nearest_mean
from jfog.optimizers._robust import trimmed_mean as trimmed_mean
from jfog.optimizers._window_averaging import WindowGetState as WindowGetState
from jfog.optimizers._window_averaging import (
  WindowPushSumState as WindowPushSumState,
)
from jfog.optimizers._window_averaging import WindowPutState as WindowPutState
from jfog.optimizers._window_averaging import window_get as window_get
from jfog.optimizers._window_averaging import window_push_sum as window_push_sum
from jfog.optimizers._window_averaging import window_put as window_put
from jfog.optimizers.compressors import Compressor as Compressor
from jfog.optimizers.compressors import identity as identity
from jfog.optimizers.compressors import low_rank as low_rank
from jfog.optimizers.compressors import message_bytes as message_bytes
from jfog.optimizers.compressors import quantize as quantize
from jfog.optimizers.compressors import random_k as random_k
from jfog.optimizers.compressors import sign as sign
from jfog.optimizers.compressors import top_k as top_k
from jfog.optimizers.contrib import D2State as D2State
from jfog.optimizers.contrib import DeepSqueezeState as DeepSqueezeState
from jfog.optimizers.contrib import DmsgdSyncState as DmsgdSyncState
from jfog.optimizers.contrib import NidsState as NidsState
from jfog.optimizers.contrib import PowerGossipState as PowerGossipState
from jfog.optimizers.contrib import RelaySumState as RelaySumState
from jfog.optimizers.contrib import d2 as d2
from jfog.optimizers.contrib import deep_squeeze as deep_squeeze
from jfog.optimizers.contrib import dmsgd_sync as dmsgd_sync
from jfog.optimizers.contrib import nids as nids
from jfog.optimizers.contrib import power_gossip as power_gossip
from jfog.optimizers.contrib import relay_sum as relay_sum

__all__ = [name for name in dir() if not name.startswith("_")]
