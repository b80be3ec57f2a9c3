"""The places in which one test body runs: alone, simulated, on a mesh, on MPI."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jfog
import jfog.runtime


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a program of one rank runs, with a number of ranks."""

  name: str
  size: int
  local_size: int = 1

  @property
  def kind(self) -> str:
    """`single`, `simulate`, `mesh` or `mpi`."""
    return self.name.split("-")[0]

  def map(self, fun: Callable, in_axes: Any = 0) -> Callable:
    """`fun` of stacked arguments; on MPI and alone this rank's result only."""
    if self.kind == "simulate":
      return jfog.simulate(
        fun, self.size, in_axes=in_axes, local_size=self.local_size
      )
    if self.kind == "mesh":
      mesh, axis = None, jfog.AXIS_NAME
      if self.local_size > 1:
        axis = (jfog.AXIS_NAME, jfog.runtime.LOCAL_AXIS_NAME)
        devices = np.array(jax.devices()[: self.size])
        mesh = Mesh(devices.reshape(-1, self.local_size), axis)
      return jfog.spmd(fun, mesh, in_axes=in_axes, axis=axis)

    def one(*args):
      axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
      own = [
        arg if axis is None else self.mine(arg)
        for arg, axis in zip(args, axes, strict=True)
      ]
      return fun(*own)

    return one

  def run(self, fun: Callable, *stacked: Any, in_axes: Any = 0) -> Any:
    """Calls `map(fun)` on stacked arguments."""
    fun = self.map(fun, in_axes)
    # Eagerly a mesh compiles every operation for itself, which takes long.
    return (jax.jit(fun) if self.kind == "mesh" else fun)(*stacked)

  def mine(self, stacked: Any) -> Any:
    """The part of a stacked truth that corresponds to the result of `run`."""
    if self.kind in ("simulate", "mesh"):
      return stacked
    rank = jfog.rank()
    return jax.tree.map(lambda x: x[rank], stacked)
