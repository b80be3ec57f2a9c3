"""Checks of the windows' arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog.primitives import _pytree
from jfog.primitives.windows._window import EdgeWeights, Spec, Window


def require_window(win: Any, operation: str) -> Spec:
  """The static description of a window that was not freed."""
  if not isinstance(win, Window):
    raise TypeError(
      f"{operation}: win={win!r} is {type(win).__name__}, not a window; pass what "
      f"jfog.win_create has returned."
    )
  if win._freed:
    raise ValueError(
      f"{operation}: this window was freed; make another one by jfog.win_create."
    )
  return win._spec


def require_like(spec: Spec, x: Any, operation: str) -> list[jax.Array]:
  """The leaves of `x`, if it is like the window's value."""
  leaves, names, structure = _pytree.flatten(x, operation)
  if structure != spec.structure:
    raise ValueError(
      f"{operation}: x has the structure {structure}, the window "
      f"{spec.structure}; pass a tree like the one it was made with."
    )
  for leaf, name, shape, dtype in zip(
    leaves, names, spec.shapes, spec.dtypes, strict=True
  ):
    if leaf.shape != shape or leaf.dtype != dtype:
      raise ValueError(
        f"{operation}: the leaf {name} has shape {leaf.shape} and dtype "
        f"{leaf.dtype}, the window's {shape} and {dtype}; reshape or cast it, or "
        f"make another window."
      )
  return leaves


def real_weight(spec: Spec, weight: Any, name: str, operation: str) -> Any:
  """A weight, or several, in a dtype that fits the window's leaves.

  Static weights stay NumPy arrays, which saves JAX dispatches.
  """
  # Known weights stay in NumPy: then the operand is a constant of the program,
  # also under tracing.
  if isinstance(weight, (int, float, np.number, np.ndarray)):
    weight = np.asarray(weight)
  else:
    weight = jnp.asarray(weight)
  if weight.dtype == np.bool_ or not (
    jnp.issubdtype(weight.dtype, np.integer)
    or jnp.issubdtype(weight.dtype, np.floating)
  ):
    raise TypeError(
      f"{operation}: {name} has dtype {weight.dtype}; weights are real numbers."
    )
  if name == "self_weight" and weight.shape != ():
    raise ValueError(
      f"{operation}: self_weight has shape {weight.shape}; pass a scalar."
    )
  # Integers suit leaves of every dtype and stay exact in integer ones.
  if jnp.issubdtype(weight.dtype, np.integer):
    return weight.astype(np.int32)
  for leaf, dtype in zip(spec.names, spec.dtypes, strict=True):
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"{operation}: {name} has dtype {weight.dtype}, but the leaf {leaf} has "
        f"dtype {dtype}, which truncates fractions; pass integer weights, or cast "
        f"the leaf to a float dtype."
      )
  # float64 only where JAX has it enabled; Python floats count as float32
  # otherwise.
  wide = weight.dtype == np.float64 == jnp.result_type(float)
  return weight if wide else weight.astype(np.float32)


def edge_weights(
  spec: Spec, weights: Any, name: str, operation: str
) -> EdgeWeights:
  """The weights of this rank's edges, by the rank at their other end."""
  size, chosen = spec.comm.size, None
  if isinstance(weights, Mapping):
    chosen = _chosen(spec, weights, name, operation)
    given = [
      # Ranks that are left out have an entry as well, which is not read: the
      # vector has one shape on all ranks.
      real_weight(spec, weights[r] if chosen[r] else 0, name, operation)
      for r in range(size)
    ]
    dtype = jnp.result_type(*given)
    stack = numpy_or_jax(*given).stack
    values = stack([w.astype(dtype) for w in given])
  else:
    weights = 1 if weights is None else weights
    values = real_weight(spec, weights, name, operation)
    if values.shape not in ((), (size,)):
      raise ValueError(
        f"{operation}: {name} has shape {values.shape}; pass one number, {size} "
        f"of them (one for each rank), or a dict from neighbors to numbers."
      )
    values = numpy_or_jax(values).broadcast_to(values, (size,))
  if spec.comm.backend in ("mesh", "single"):  # what is picked of it is traced
    values = jnp.asarray(values)
  return EdgeWeights(values, chosen)


def _chosen(
  spec: Spec, weights: Mapping, name: str, operation: str
) -> np.ndarray:
  """Mask of the ranks that a dict of weights has; shape=(size,), dtype=bool."""
  chosen = np.zeros(spec.comm.size, bool)
  neighbors = _neighbors(spec, name)
  for rank, weight in weights.items():
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
      raise TypeError(
        f"{operation}: {name} has the key {rank!r}; keys are ranks, ints."
      )
    if rank not in neighbors:
      raise ValueError(
        f"{operation}: {name} has the rank {rank}, which is not an "
        f"{'out' if name == 'dst_weights' else 'in'}-neighbor; these are "
        f"{sorted(neighbors)}."
      )
    if jnp.shape(weight) != ():
      raise ValueError(
        f"{operation}: {name}[{rank}] has shape {jnp.shape(weight)}; pass a "
        f"scalar."
      )
    chosen[rank] = True
  return chosen


def numpy_or_jax(*arrays: Any) -> Any:
  """The module that handles these arrays: NumPy if all are its own."""
  return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def _neighbors(spec: Spec, name: str) -> set[int]:
  """The ranks that a dict of weights may name; on a mesh those of any rank."""
  topology = spec.topology
  ends = (
    topology.out_neighbors if name == "dst_weights" else topology.in_neighbors
  )
  if spec.comm.backend == "mesh":
    return {r for rank in range(topology.size) for r in ends(rank)}
  return set(ends(spec.comm.rank))


def own_edges(
  neighbors: Sequence[int], weights: EdgeWeights
) -> tuple[tuple[int, ...], Any]:
  """The neighbors to communicate with, ascending, and their weights."""
  peers = tuple(
    int(r) for r in neighbors if weights.chosen is None or weights.chosen[r]
  )
  return peers, weights.values[np.array(peers, np.int32)]
