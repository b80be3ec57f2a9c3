"""The model of the scaling benchmark; benchmarks/scaling.py itself runs by hand."""

import importlib
import pathlib

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module("scaling")


@pytest.mark.parametrize("per_host", [1, 2])
def test_the_fit_finds_rate_and_delay(scaling, per_host):
  latency, per_array = 2e-3, 0.2
  sizes = (4, 8)
  measured = {
    ("125,1", ranks): {
      form: [
        [messages * latency + arrays * per_array, 0.0]
        for messages, arrays in [scaling.features(form, ranks, per_host)] * 3
      ]
      for form in (scaling.ONE_PEER, scaling.STATIC, scaling.RING)
    }
    for ranks in sizes
  }
  found = scaling.fit(measured, "125,1", per_host, sizes)
  np.testing.assert_allclose(found, [latency, per_array], rtol=1e-9)


def test_the_formulas_of_a_step(scaling):
  assert scaling.features(scaling.ONE_PEER, 8, 1) == (1, 1)
  assert scaling.features(scaling.STATIC, 8, 1) == (1, 3)
  assert scaling.features(scaling.RING, 8, 2) == (1, 4)
  assert scaling.features(scaling.HIERARCHICAL, 8, 2) == (1, 1)
  assert scaling.features("jfog.allreduce", 8, 1) == (14, 1.75)
