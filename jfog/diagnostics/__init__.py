"""Diagnostics: traces of a training, consensus distance, bytes sent."""

from jfog.diagnostics._applied_updates import CheckedState as CheckedState
from jfog.diagnostics._applied_updates import (
  check_applied_updates as check_applied_updates,
)
from jfog.diagnostics._consensus import consensus_distance as consensus_distance
from jfog.diagnostics._counters import bytes_per_step as bytes_per_step
from jfog.diagnostics._counters import counters as counters
from jfog.diagnostics._counters import reset_counters as reset_counters
from jfog.diagnostics._summary import summary as summary
from jfog.diagnostics._trace import Trace as Trace
from jfog.diagnostics._trace import trace as trace
from jfog.runtime import RankSummary as RankSummary
from jfog.runtime import Summary as Summary

__all__ = [name for name in dir() if not name.startswith("_")]
