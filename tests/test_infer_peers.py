"""Peers from the other end: `infer_sources` and `infer_destinations`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfog

pytestmark = pytest.mark.places("single", "mpi-2", "mpi-3", "mpi-4")


def test_each_end_from_the_other(place):
  n, rank = place.size, jfog.rank()
  random = np.random.RandomState(7)
  for _ in range(4):
    sends = random.rand(n, n) < 0.5
    np.fill_diagonal(sends, False)
    destinations = np.flatnonzero(sends[rank])
    sources = np.flatnonzero(sends[:, rank]).tolist()
    assert jfog.infer_sources(reversed(destinations)) == sources
    assert jfog.infer_destinations(sources) == destinations.tolist()
    peers = jfog.Peers(1.0, dict.fromkeys(sources, 0.5), destinations)
    y = jfog.neighbor_allreduce(jnp.float32(rank), peers)
    np.testing.assert_allclose(y, rank + 0.5 * sum(sources))


def test_bad_ranks(place):
  n, rank = place.size, jfog.rank()
  for bad in ([rank], [n], [-1], [(rank + 1) % n] * 2):
    with pytest.raises(ValueError, match=r"infer_sources: rank .*another rank"):
      jfog.infer_sources(bad)
  with pytest.raises(TypeError, match=r"infer_destinations: ranks are ints"):
    fraction: Any = 0.5
    jfog.infer_destinations([fraction])
  with pytest.raises(ValueError, match="all ranks run one program"):
    jfog.simulate(lambda x: jfog.infer_sources([1]), 3)(jnp.ones(3))
  assert jax.block_until_ready(jfog.allreduce(jnp.float32(1))) == 1


def test_machines_of_equal_size(place):
  assert jfog.is_homogeneous() is True
  if place.size == 3:
    jfog.shutdown()
    comm = jfog.init(local_size=1)
    assert comm.is_homogeneous and jfog.is_homogeneous()
    jfog.shutdown()
