"""Experiments on virtual ranks: sweeps, splits of data, times on a network."""

from jfog.lab._network import network_times as network_times
from jfog.lab._predict import StepPrediction as StepPrediction
from jfog.lab._predict import predict_step as predict_step
from jfog.lab._split import split_by_label as split_by_label
from jfog.lab._split import split_dirichlet as split_dirichlet
from jfog.lab._split import split_shards as split_shards
from jfog.lab._sweep import sweep as sweep

__all__ = [
  "StepPrediction",
  "network_times",
  "predict_step",
  "split_by_label",
  "split_dirichlet",
  "split_shards",
  "sweep",
]
