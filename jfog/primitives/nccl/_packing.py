"""Packing of leaves: small leaves of one dtype share one buffer."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Leaves of fewer bytes than this share a buffer. Not tuned on a GPU yet.
_PACKED = 1 << 20


class Packing:
  """Assignment of leaves to buffers: all small leaves of a dtype share one.

  The assignment depends on shapes and dtypes only. Those are equal on all ranks,
  so all ranks exchange the same buffers.
  """

  def __init__(self, avals: Sequence[tuple[tuple[int, ...], np.dtype]]):
    self._shapes = [shape for shape, _ in avals]
    self._groups: list[list[int]] = []
    shared: dict[Any, list[int]] = {}
    for i, (shape, dtype) in enumerate(avals):
      if math.prod(shape) * dtype.itemsize >= _PACKED:
        self._groups.append([i])
      elif dtype in shared:
        shared[dtype].append(i)
      else:
        shared[dtype] = [i]
        self._groups.append(shared[dtype])
    self.dtypes = [avals[group[0]][1] for group in self._groups]
    self.sizes = [
      sum(math.prod(self._shapes[i]) for i in group) for group in self._groups
    ]

  @classmethod
  def of(cls, leaves: Sequence[Any]) -> "Packing":
    """The packing of leaves, built once for leaves of the same avals."""
    return _packing(
      tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves), _PACKED
    )

  def pack(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """One vector for each buffer."""
    flat = [x.reshape(-1) for x in leaves]
    return [
      jnp.concatenate([flat[i] for i in group]) if group[1:] else flat[group[0]]
      for group in self._groups
    ]

  def unpack(self, packed: Sequence[jax.Array]) -> list[jax.Array]:
    """The leaves in these vectors, in their original order."""
    leaves: list[Any] = [None] * len(self._shapes)
    for group, x in zip(self._groups, packed, strict=True):
      begin = 0
      for i in group:
        end = begin + math.prod(self._shapes[i])
        leaves[i] = x[begin:end].reshape(self._shapes[i])
        begin = end
    return leaves

  def avals(self, *axes: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the vectors, with `axes` as leading axes."""
    return [
      jax.ShapeDtypeStruct((*axes, size), dtype)
      for size, dtype in zip(self.sizes, self.dtypes, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _packing(
  avals: tuple[tuple[tuple[int, ...], np.dtype], ...], limit: int
) -> Packing:
  del limit  # part of the key: tests on GPUs vary _PACKED
  return Packing(avals)
