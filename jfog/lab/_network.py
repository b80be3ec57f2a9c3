"""Times of a simulated training on a network, from bytes, compute times and links."""

from typing import Any

import numpy as np

from jfog.topology import Schedule, Topology


def network_times(
  graph: Topology | Schedule | None,
  message_bytes: float,
  compute: Any,
  *,
  latency: Any,
  bandwidth: Any,
) -> np.ndarray:
  """When each rank ends each step of a synchronous training, if it is sent so.

  Rank j has computed step k at `c_j = t_j + compute[k, j]`. Its message comes to
  rank i at `c_j + L_ij + M max(outdegree_j / B_j, indegree_i / B_i)`, for a network
  card shares its rate among the messages of a direction. Rank i ends the step,
  `t_i`, when it has computed and has all messages of its in-neighbors; it waits
  for no other rank. Equal ranks take `compute + L + max(degrees) M / B`.

  Without a graph the step ends with a ring allreduce over all n ranks, the slowest
  rank first and at the pace of the slowest link: all end at
  `max_j c_j + 2 (n - 1) / n M / min B + 2 (n - 1) max L`.

  Args:
    graph: the graph, or a schedule of one round for each step; None for allreduce.
    message_bytes: M, bytes of the message on each edge, as
      `jfog.diagnostics.bytes_per_step` has them for one neighbor.
    compute: seconds, of shape `(steps, n)`.
    latency: L, seconds; a number, or of shape `(n, n)`, receivers by senders.
    bandwidth: B, bytes per second and direction; a number, or of shape `(n,)`.

  Returns:
    Seconds since the start, of shape `(steps, n)`.

  Raises:
    ValueError: for shapes that do not fit, a time or a size below 0, or a bandwidth
      that is not above 0.

  Example:
    >>> import numpy as np, jfog
    >>> ring = jfog.topology.ring(4)
    >>> times = jfog.lab.network_times(
    ...   ring, 1e6, np.full((3, 4), 0.01), latency=1e-3, bandwidth=1e9)
    >>> print(times[:, 0].round(6))
    [0.013 0.026 0.039]

  Source: the alpha-beta model; Thakur, Rabenseifner, Gropp, "Optimization of
    collective communication operations in MPICH", 2005.
  """
  compute = np.asarray(compute, np.float64)
  if compute.ndim != 2 or compute.size == 0:
    raise ValueError(
      f"compute has shape {compute.shape}; pass seconds by step and rank."
    )
  steps, size = compute.shape
  if graph is not None and graph.size != size:
    raise ValueError(
      f"the graph has {graph.size} ranks and compute {size}; make them equal."
    )
  delays = _shaped(latency, (size, size), "latency")
  rates = _shaped(bandwidth, (size,), "bandwidth")
  for name, values in (("compute", compute), ("latency", delays)):
    if not (values >= 0).all():
      raise ValueError(f"{name} has a value below 0 or NaN; pass seconds.")
  if not (rates > 0).all() or not message_bytes >= 0:
    raise ValueError(
      f"bandwidth={bandwidth!r} must be above 0 and message_bytes="
      f"{message_bytes!r} not below."
    )

  times = np.zeros((steps, size))
  now = np.zeros(size)
  rounds = [] if graph is None else [_edges(each) for each in graph.rounds]
  for step in range(steps):
    computed = now + compute[step]
    if graph is None:
      transfer = 2 * (size - 1) / size * message_bytes / rates.min()
      now = np.full(
        size, computed.max() + transfer + 2 * (size - 1) * delays.max()
      )
    else:
      edges = rounds[step % len(rounds)]
      arrival = np.where(
        edges,
        computed[None, :]
        + delays
        + message_bytes
        * np.maximum(
          (edges.sum(axis=0) / rates)[None, :],
          (edges.sum(axis=1) / rates)[:, None],
        ),
        -np.inf,
      )
      now = np.maximum(computed, arrival.max(axis=1))
    times[step] = now
  return times


def _edges(topology: Topology) -> np.ndarray:
  """Whether receiver i hears sender j."""
  edges = np.asarray(topology.mixing_matrix) != 0
  np.fill_diagonal(edges, False)
  return edges


def _shaped(given: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
  values = np.asarray(given, np.float64)
  if values.ndim and values.shape != shape:
    raise ValueError(
      f"{name} has shape {values.shape}; pass a number or shape {shape}."
    )
  return np.broadcast_to(values, shape)
