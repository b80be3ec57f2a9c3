"""Graphs as arguments of operations: checks, step index and fingerprint."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jfog import _validation
from jfog.topology import ExactAverage, Schedule, Topology
from jfog.topology._neighbor_table import neighbor_table


def check_graph(graph: Any, size: int, operation: str) -> Topology | Schedule:
  """Checks the type of a graph argument, and that its size is `size`."""
  if isinstance(graph, ExactAverage):
    raise TypeError(
      f"{operation}: {graph!r} is a protocol of several rounds and has no mixing "
      f"matrix; take jfog.topology.base_k(size, k) for one round at a time."
    )
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(
      f"{_validation.unlike_graph(graph, f'{operation}: graph')}."
    )
  if graph.size != size:
    raise ValueError(_validation.other_size(graph.size, size, operation))
  return graph


def step_index(graph: Topology | Schedule, step: Any, operation: str) -> Any:
  """The round of `graph` at `step`: an int, or a traced int32 scalar."""
  period = len(graph)
  # Of period 1: every step selects its round, and none has to be given.
  if isinstance(graph, Topology):
    return 0
  if step is None:
    raise ValueError(
      f"{operation}: the graph is a schedule of period {period} and needs a "
      f"step; pass step=k, for example the optimizer's step count."
    )
  if isinstance(step, (int, np.integer)) and not isinstance(step, bool):
    return int(step) % period
  step = jnp.asarray(step)
  if not jnp.issubdtype(step.dtype, jnp.integer) or step.shape != ():
    raise TypeError(
      f"{operation}: step has dtype {step.dtype} and shape {step.shape}; pass "
      f"an integer scalar."
    )
  # The period has to be representable in the dtype of the remainder.
  if jnp.iinfo(step.dtype).max < period:
    step = step.astype(jnp.int32)
  # remainder, not rem: a negative step counts from the end, as in Python.
  return jnp.remainder(step, jnp.asarray(period, step.dtype)).astype(jnp.int32)


def difference_rows(topology: Topology) -> np.ndarray:
  """The rows to evaluate in difference form; shape (size,), bool."""
  return neighbor_table(topology).difference[0]


def fingerprint(graph: Topology | Schedule) -> int:
  """Hash of a graph, equal on all ranks."""
  return neighbor_table(graph).fingerprint
