"""Windows on a mesh and in simulation: slots inside of the program."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfog.runtime import Communicator
from jfog.topology import Topology


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is fixed about a window; hashable."""

  structure: Any
  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[np.dtype, ...]
  topology: Topology
  comm: Communicator
  zero_init: bool
  associated_p: bool
  delay: Any  # hashable; None without delays

  @property
  def p_dtype(self) -> np.dtype:
    """The dtype of the associated p: the widest leaf's, at least float32."""
    dtype = jnp.dtype(jnp.float32)
    for leaf in self.dtypes:
      if jnp.issubdtype(leaf, jnp.inexact):
        dtype = jnp.promote_types(dtype, jnp.finfo(leaf).dtype)
    return dtype

  def describe(self) -> str:
    """What values it holds, for people."""
    leaves = len(self.shapes)
    return f"{leaves} {'leaf' if leaves == 1 else 'leaves'}"


class EdgeWeights(NamedTuple):
  """Weights of this rank's edges, by the rank at their other end."""

  values: jax.Array  # shape=(size,), int32 or a float dtype
  chosen: np.ndarray | None  # shape=(size,), bool: which ranks; None: all
