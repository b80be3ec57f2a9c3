"""Seconds of a training step by the alpha-beta model, for graphs and allreduces."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jfog import _validation
from jfog.topology import Schedule, Topology


class StepPrediction(NamedTuple):
  """A step of training as `predict_step` computes it; averages over a period."""

  seconds: float  # of a step, computation and what it does not hide
  communication: float  # seconds of the communication, hidden or not
  bytes_out: float  # out of the busiest host
  efficiency: float  # seconds of computation by those of a step


class _Network(NamedTuple):
  """Ranks, ranks of a host, and links."""

  size: int
  per_host: int
  latency: float
  bandwidth: float
  inner_latency: float
  inner_bandwidth: float

  @property
  def hosts(self) -> int:
    return self.size // self.per_host


_Edges = tuple[np.ndarray, np.ndarray]  # senders and receivers of a round
_Round = tuple[float, float]  # seconds, bytes out of the busiest host


def predict_step(
  graph: str | Topology | Schedule,
  message_bytes: float,
  *,
  size: int | None = None,
  compute: float,
  latency: float,
  bandwidth: float,
  ranks_per_host: int = 1,
  inner_latency: float = 0.0,
  inner_bandwidth: float = math.inf,
  overlap: float = 0.0,
  every: int = 1,
) -> StepPrediction:
  """Predicts the seconds of a synchronous training step on equal ranks.

  With M bytes in a message, L and B the latency and the bandwidth of a host's link,
  L' and B' those inside a host, n ranks and m of them on each of h hosts, a round of
  communication takes

      graph                     L + M max(e / B, d / B')
      hierarchical (one peer)   L + M/B + 2 (m-1)/m M/B' + M/B' + 2 (m-1) L'
      ring allreduce            2 (n-1)/n M/B + 2 (n-1) ((L + (m-1) L') / m)
      tree allreduce            2 M/B + 2 ceil(log2 h) L + 2 ceil(log2 m) L'
      halving-doubling          2 (h-1)/h M/B + 2 ceil(log2 h) L
                                  + 2 (m-1)/m M/B' + 2 ceil(log2 m) L'

  where e is the largest number of messages that leave or enter a host in the round,
  and d the same of a rank inside its host. On one host L' and B' take the place of L
  and B. Consecutive ranks share a host. A round happens in each `every`-th step, so
  that a step takes `compute + mean(max(0, round - overlap)) / every`, the mean over a
  schedule's period.

  Args:
    graph: a graph of n ranks, or a name: `"one_peer_exponential"`, `"exponential"`,
      `"ring"`, `"mesh_grid_2d"`, `"torus_2d"`, as in `jfog.topology` but without a
      matrix, so that `size` may be large; `"hierarchical_one_peer_exponential"`, the
      average by hosts; `"ring_allreduce"`, `"tree_allreduce"` and
      `"halving_doubling_allreduce"`, which halves within hosts first.
    message_bytes: M, as `jfog.diagnostics.bytes_per_step` has them for one neighbor:
      of the parameters, of twice those for gradient tracking, or of a compressed
      message.
    size: n, needed with a name.
    compute: seconds of a step's computation.
    latency: L, seconds.
    bandwidth: B, bytes per second and direction of a host's link.
    ranks_per_host: m, a divisor of n.
    inner_latency: L', seconds.
    inner_bandwidth: B', bytes per second and direction of a rank inside its host.
    overlap: the seconds of the computation in which a round may go on: forward and
      backward for `adapt_with_combine` and windows, the backward for gradients sent
      leaf by leaf, 0 for `adapt_then_combine`.
    every: the steps from one round to the next, as of `local_sgd` and `diloco`.

  Returns:
    A `StepPrediction`.

  Raises:
    ValueError: for an unknown name, a size that is missing or another one than the
      graph's, hosts that the ranks do not fill, or a number out of its range.
    TypeError: if `graph` is neither a graph nor a name.

  Example:
    >>> import jfog
    >>> link = {"latency": 50e-6, "bandwidth": 25e9 / 8, "compute": 0.2}
    >>> for name in ("one_peer_exponential", "ring_allreduce"):
    ...   step = jfog.lab.predict_step(name, 102.4e6, size=128, **link)
    ...   print(f"{1000 * step.communication:.1f} ms, {step.efficiency:.0%}")
    32.8 ms, 86%
    77.7 ms, 72%

  Source: the alpha-beta model; Thakur, Rabenseifner, Gropp, "Optimization of
    collective communication operations in MPICH", 2005.
  """
  every = _validation.positive(every, "predict_step: every")
  network = _network(
    graph,
    size,
    ranks_per_host,
    latency,
    bandwidth,
    inner_latency,
    inner_bandwidth,
  )
  for name, value in (
    ("message_bytes", message_bytes),
    ("compute", compute),
    ("overlap", overlap),
  ):
    _at_least_zero(name, value)

  if network.size == 1:
    rounds = [(0.0, 0.0)]
  elif isinstance(graph, str) and graph in _COLLECTIVES:
    rounds = [_COLLECTIVES[graph](network, message_bytes)]
  else:
    edges = (
      _GRAPHS[graph](network.size)
      if isinstance(graph, str)
      else [_edges(each) for each in graph.rounds]
    )
    rounds = [_round(network, message_bytes, each) for each in edges]
  seconds, sent = np.array(rounds).T
  visible = np.maximum(0, seconds - overlap).mean() / every
  step = compute + float(visible)
  return StepPrediction(
    step,
    float(seconds.mean()) / every,
    float(sent.mean()) / every,
    compute / step if step else 1.0,
  )


def _network(
  graph: str | Topology | Schedule,
  size: int | None,
  ranks_per_host: int,
  latency: float,
  bandwidth: float,
  inner_latency: float,
  inner_bandwidth: float,
) -> _Network:
  """The network, of which all numbers are checked."""
  if isinstance(graph, str):
    if graph not in _GRAPHS and graph not in _COLLECTIVES:
      known = ", ".join([*_GRAPHS, *_COLLECTIVES])
      raise ValueError(f"predict_step: {graph!r} is not one of {known}.")
    if size is None:
      raise ValueError(
        f"predict_step: {graph!r} has no size; pass size=, the number of ranks."
      )
    size = _validation.positive(size, "predict_step: size")
  elif isinstance(graph, (Topology, Schedule)):
    if size is not None and size != graph.size:
      raise ValueError(
        f"predict_step: size={size} and the graph has {graph.size} ranks; make "
        f"them equal, or leave size out."
      )
    size = graph.size
  else:
    raise TypeError(
      f"predict_step: expects a Topology, a Schedule or a name, got {graph!r}."
    )
  per_host = _validation.positive(
    ranks_per_host, "predict_step: ranks_per_host"
  )
  if size % per_host:
    raise ValueError(
      f"predict_step: ranks_per_host={per_host} does not divide {size} ranks; "
      f"take a divisor."
    )
  for name, value in (("latency", latency), ("inner_latency", inner_latency)):
    _at_least_zero(name, value)
  for name, value in (
    ("bandwidth", bandwidth),
    ("inner_bandwidth", inner_bandwidth),
  ):
    if not value > 0:
      raise ValueError(
        f"predict_step: {name}={value!r} must be above 0; pass bytes per second."
      )
  return _Network(
    size, per_host, latency, bandwidth, inner_latency, inner_bandwidth
  )


def _at_least_zero(name: str, value: float) -> None:
  if not 0 <= value < math.inf:
    raise ValueError(
      f"predict_step: {name}={value!r} must be a finite number >= 0."
    )


def _round(network: _Network, message_bytes: float, edges: _Edges) -> _Round:
  """One exchange with the neighbors, all messages of a link one after the other."""
  sources, destinations = edges
  if not len(sources):
    return 0.0, 0.0
  hosts = sources // network.per_host, destinations // network.per_host
  crosses = hosts[0] != hosts[1]
  out, into = (np.bincount(each[crosses], minlength=1).max() for each in hosts)
  inner = max(
    np.bincount(each[~crosses], minlength=1).max()
    for each in (sources, destinations)
  )
  seconds = (
    network.latency if crosses.any() else network.inner_latency
  ) + message_bytes * max(
    max(out, into) / network.bandwidth, inner / network.inner_bandwidth
  )
  return float(seconds), float(out * message_bytes)


def _edges(topology: Topology) -> _Edges:
  weights = np.array(topology.mixing_matrix)
  np.fill_diagonal(weights, 0)
  destinations, sources = np.nonzero(weights)
  return sources, destinations


# Edges by name: the rank that receives, and how far behind the senders are.


def _circulant(size: int, offsets: list[int]) -> _Edges:
  ranks = np.arange(size)
  distinct = sorted({offset % size for offset in offsets} - {0})
  sources = np.tile(ranks, len(distinct))
  ahead = np.repeat(np.array(distinct, int), size)
  return sources, (sources + ahead) % size


def _powers(size: int) -> list[int]:
  return [2**p for p in range((size - 1).bit_length())]


def _grid(size: int, is_periodic: bool) -> list[_Edges]:
  """The rows and columns of `jfog.topology.mesh_grid_2d`: the closest factors."""
  rows = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
  columns = size // rows
  row, column = np.divmod(np.arange(size), columns)
  pairs = set()
  for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
    to = row + down, column + right
    inside = (
      (to[0] >= 0) & (to[0] < rows) & (to[1] >= 0) & (to[1] < columns)
    ) | is_periodic
    receivers = to[0] % rows * columns + to[1] % columns
    pairs.update(
      (int(s), int(r))
      for s, r in zip(np.arange(size)[inside], receivers[inside], strict=True)
      if s != r
    )
  table = np.array(sorted(pairs), int).reshape(-1, 2)
  return [(table[:, 0], table[:, 1])]


_GRAPHS: dict[str, Callable[[int], list[_Edges]]] = {
  "one_peer_exponential": lambda n: [_circulant(n, [d]) for d in _powers(n)],
  "exponential": lambda n: [_circulant(n, _powers(n))],
  "ring": lambda n: [_circulant(n, [1, -1])],
  "mesh_grid_2d": lambda n: _grid(n, is_periodic=False),
  "torus_2d": lambda n: _grid(n, is_periodic=True),
}


# Averages of all ranks or of whole hosts, by their algorithms.


def _hierarchical(network: _Network, message_bytes: float) -> _Round:
  m, hosts = network.per_host, network.hosts
  inside = 2 * (m - 1) / m * message_bytes / network.inner_bandwidth
  inside += 2 * (m - 1) * network.inner_latency
  if hosts == 1:
    return inside, 0.0
  if m > 1:
    inside += message_bytes / network.inner_bandwidth
  between = network.latency + message_bytes / network.bandwidth
  return inside + between, message_bytes


def _ring_allreduce(network: _Network, message_bytes: float) -> _Round:
  n, m = network.size, network.per_host
  bytes_out = 2 * (n - 1) / n * message_bytes
  if network.hosts == 1:
    seconds = bytes_out / network.inner_bandwidth
    return seconds + 2 * (n - 1) * network.inner_latency, 0.0
  hop = (network.latency + (m - 1) * network.inner_latency) / m
  rate = min(network.bandwidth, network.inner_bandwidth if m > 1 else math.inf)
  return bytes_out / rate + 2 * (n - 1) * hop, bytes_out


def _tree_allreduce(network: _Network, message_bytes: float) -> _Round:
  m, hosts = network.per_host, network.hosts
  inside = 2 * _depth(m) * network.inner_latency
  if hosts == 1:
    return inside + 2 * message_bytes / network.inner_bandwidth, 0.0
  rate = min(network.bandwidth, network.inner_bandwidth if m > 1 else math.inf)
  between = 2 * _depth(hosts) * network.latency
  return inside + between + 2 * message_bytes / rate, 2 * message_bytes


def _halving_doubling(network: _Network, message_bytes: float) -> _Round:
  m, hosts = network.per_host, network.hosts
  bytes_out = 2 * (hosts - 1) / hosts * message_bytes
  seconds = bytes_out / network.bandwidth + 2 * _depth(hosts) * network.latency
  seconds += 2 * (m - 1) / m * message_bytes / network.inner_bandwidth
  seconds += 2 * _depth(m) * network.inner_latency
  return seconds, bytes_out


def _depth(count: int) -> int:
  """`ceil(log2(count))`."""
  return (count - 1).bit_length()


_COLLECTIVES: dict[str, Callable[[_Network, float], _Round]] = {
  "hierarchical_one_peer_exponential": _hierarchical,
  "ring_allreduce": _ring_allreduce,
  "tree_allreduce": _tree_allreduce,
  "halving_doubling_allreduce": _halving_doubling,
}
