"""Graphs as arguments of operations: their checks, and their native tables."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jfog.topology import ExactAverage, Schedule, Topology

_TOLERANCE = 1e-9  # of the sum of a row, for the difference form


def check_graph(graph: Any, size: int, operation: str) -> Topology | Schedule:
  """Checks that a graph argument is one, and that its size is `size`."""
  if isinstance(graph, ExactAverage):
    raise TypeError(
      f"{operation}: {graph!r} is a protocol of several rounds and has no mixing "
      f"matrix; take jfog.topology.base_k(size, k) for one round at a time."
    )
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(
      f"{operation}: graph={graph!r} is {type(graph).__name__}; pass a "
      f"jfog.topology.Topology or Schedule, made for example by "
      f"jfog.topology.ring(size)."
    )
  if graph.size != size:
    raise ValueError(
      f"{operation}: the graph has {graph.size} ranks, the communicator has "
      f"{size}; make the graph with size={size}."
    )
  return graph


def step_index(graph: Topology | Schedule, step: Any, operation: str) -> Any:
  """The round of `graph` at `step`: an int, or a traced int32 scalar."""
  period = len(graph)
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
  if jnp.iinfo(step.dtype).max < period:
    step = step.astype(jnp.int32)
  return jnp.remainder(step, jnp.asarray(period, step.dtype)).astype(jnp.int32)


def difference_rows(topology: Topology) -> np.ndarray:
  """The rows to evaluate in difference form; shape (size,), bool."""
  matrix = topology.mixing_matrix
  return (np.abs(matrix.sum(axis=1) - 1) <= _TOLERANCE) & (
    matrix.diagonal() != 0
  )


@functools.lru_cache(maxsize=1024)
def fingerprint(graph: Topology | Schedule) -> int:
  """A number that tells graphs apart, equal on all ranks."""
  digest = hashlib.blake2b(digest_size=8)
  for topology in graph.rounds:
    digest.update(np.ascontiguousarray(topology.mixing_matrix).tobytes())
  return int.from_bytes(digest.digest(), "little", signed=True)


def table(
  graph: Topology | Schedule, rank: int, peer: Callable[[int], int] = int
) -> dict[str, np.ndarray]:
  """Attributes: one rank's rows of every round; the step selects among them.

  Args:
    graph: the graph.
    rank: the rank of the graph whose rows these are.
    peer: from a rank of the graph to the communicator's rank to exchange with.
  """
  return rows_table(
    [
      (
        {peer(s): w for s, w in topology.src_weights(rank).items()},
        [peer(d) for d in topology.out_neighbors(rank)],
        topology.self_weight(rank),
        bool(difference_rows(topology)[rank]),
      )
      for topology in graph.rounds
    ]
  )


def rows_table(rows: list[tuple[dict, list, float, bool]]):
  """Attributes: weights by source, destinations, self weight, difference form."""
  source_begin, sources, source_weights = [0], [], []
  destination_begin, destinations = [0], []
  for weights, to, _, _ in rows:
    sources.extend(weights)
    source_weights.extend(weights.values())
    destinations.extend(to)
    source_begin.append(len(sources))
    destination_begin.append(len(destinations))
  return {
    "source_begin": np.array(source_begin, np.int32),
    # An attribute may not be empty: one more element, which is never read.
    "sources": np.array([*sources, -1], np.int32),
    "source_weights": np.array([*source_weights, 0.0], np.float64),
    "destination_begin": np.array(destination_begin, np.int32),
    "destinations": np.array([*destinations, -1], np.int32),
    "self_weights": np.array([*(row[2] for row in rows), 0.0], np.float64),
    "difference": np.array([*(row[3] for row in rows), False], np.int32),
  }


def numbered(name: str, mode: int, attributes: dict[str, Any]):
  """Adds the number by which the native side finds what it has read of them."""
  digest = hashlib.blake2b(digest_size=8)
  for key, value in [("name", name), ("mode", mode), *attributes.items()]:
    digest.update(key.encode() + np.asarray(value).tobytes())
  return {**attributes, "plan": np.frombuffer(digest.digest(), np.int64)[0]}
