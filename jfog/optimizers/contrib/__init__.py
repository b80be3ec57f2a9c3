"""Optimizers for special settings; all are names of `jfog.optimizers` too."""

from jfog.optimizers.contrib._d2 import D2State as D2State
from jfog.optimizers.contrib._d2 import d2 as d2
from jfog.optimizers.contrib._deep_squeeze import (
  DeepSqueezeState as DeepSqueezeState,
)
from jfog.optimizers.contrib._deep_squeeze import deep_squeeze as deep_squeeze
from jfog.optimizers.contrib._dmsgd_sync import DmsgdSyncState as DmsgdSyncState
from jfog.optimizers.contrib._dmsgd_sync import dmsgd_sync as dmsgd_sync
from jfog.optimizers.contrib._nids import NidsState as NidsState
from jfog.optimizers.contrib._nids import nids as nids
from jfog.optimizers.contrib._power_gossip import (
  PowerGossipState as PowerGossipState,
)
from jfog.optimizers.contrib._power_gossip import power_gossip as power_gossip
from jfog.optimizers.contrib._relay_sum import RelaySumState as RelaySumState
from jfog.optimizers.contrib._relay_sum import relay_sum as relay_sum

__all__ = [name for name in dir() if not name.startswith("_")]
