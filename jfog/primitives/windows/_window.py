"""A window, its static description, and weights of its edges."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfog.runtime import Communicator
from jfog.topology import Topology


@dataclasses.dataclass(frozen=True)
class Spec:
  """Static description of a window; hashable."""

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
    """The number of leaves, for `repr`."""
    leaves = len(self.shapes)
    return f"{leaves} {'leaf' if leaves == 1 else 'leaves'}"


class EdgeWeights(NamedTuple):
  """Weights of this rank's edges, by the rank at their other end."""

  values: jax.Array  # shape=(size,), int32 or a float dtype
  chosen: np.ndarray | None  # shape=(size,), bool: which ranks; None: all


@jax.tree_util.register_pytree_node_class
class Window:
  """Handle of a window, from `jfog.win_create`; a pytree that may cross `jax.jit`.

  Every rank exposes one value, and owns one slot for each of its in-neighbors,
  which that neighbor alone writes.

  On MPI the values lie outside of JAX, in memory that other ranks access, and a
  `Window` holds their number: all copies of it are one window, valid in this
  process until `jfog.win_free`. On a mesh and
  in simulation the values are part of the pytree, and the operations return
  changed copies, so use the window that the last one returned.

  The check that a window was freed is a courtesy: flattening, as `jax.jit` does,
  loses its flag. On MPI the native core refuses a freed window in any copy.

  Attributes:
    topology: the graph that it was made for.
    comm: its communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def step(x):
    ...   win = jfog.win_create(x, graph)
    ...   win = jfog.win_put(win, x)
    ...   x, win = jfog.win_update(win, x)
    ...   return x
    >>> jfog.simulate(step, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 1., 3.], dtype=float32)
  """

  def __init__(self, spec: Spec, state: Any):
    self._spec = spec
    self._state = state  # a number on MPI, else slots
    self._freed = False

  def __repr__(self) -> str:
    freed = ", freed" if self._freed else ""
    return (
      f"<jfog.Window of {self._spec.describe()} on {self.topology!r}{freed}>"
    )

  @property
  def topology(self) -> Topology:
    """The graph that it was made for."""
    return self._spec.topology

  @property
  def comm(self) -> Communicator:
    """Its communicator."""
    return self._spec.comm

  def tree_flatten(self) -> tuple[tuple[Any], Spec]:
    """The arrays of the window, for JAX."""
    return (self._state,), self._spec

  @classmethod
  def tree_unflatten(cls, spec: Spec, children: tuple[Any]) -> "Window":
    """A window of those arrays, for JAX."""
    return cls(spec, *children)
