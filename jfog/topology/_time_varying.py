"""Schedules of one message per rank and round, and of machines."""

import math
from collections.abc import Callable
from typing import overload

import numpy as np

from jfog import _validation
from jfog.topology._schedule import Schedule
from jfog.topology._static import circulant
from jfog.topology._topology import Topology

_MOST_ENTRIES = 2**27  # weights of all rounds together, 1 GiB


def one_peer_exponential(size: int) -> Schedule:
  """Each rank receives from one rank, 1, 2, 4, ... behind it in turn.

  `W_t[i, i] = W_t[i, i - 2**(t mod tau)] = 1/2` with `tau = ceil(log2(size))`.

  Args:
    size: number of ranks.

  Returns:
    A `Schedule` of period `tau` (one identity round for a single rank), doubly
    stochastic. If `size` is a power of two any `tau` consecutive rounds give
    the exact average; otherwise none do, and convergence is geometric.

  Raises:
    ValueError: if `size < 1`.

  Example:
    >>> [graph.in_neighbors(0) for graph in one_peer_exponential(8)]
    [(7,), (6,), (4,)]
    >>> one_peer_exponential(8).rounds_to_exact_average()
    3

  Source: B. Ying et al., "Exponential graph is provably efficient for
  decentralized deep training", arXiv 2110.13363.
  """
  size = _validation.size(size)
  period = max(1, (size - 1).bit_length())
  return Schedule(
    # For a power of two the product of a period is (1/size) sum of all shifts:
    # each shift has one binary expansion, so it is the exact average.
    circulant(size, {0: 0.5, 2**t: 0.5}) if size > 1 else np.eye(1)
    for t in range(period)
  )


@overload
def hierarchical(graph: Topology, local_size: int) -> Topology: ...
@overload
def hierarchical(graph: Schedule, local_size: int) -> Schedule: ...
def hierarchical(
  graph: Topology | Schedule, local_size: int
) -> Topology | Schedule:
  """Turns a graph over machines into one over their ranks.

  `W = kron(W_machine, J)` with `J[i, j] = 1/local_size`: the mean inside each
  machine, averaging between machines, and the result to every local rank.
  Rank `machine * local_size + local_rank`, so machines are consecutive.

  Args:
    graph: a `Topology` or `Schedule` over the machines.
    local_size: number of ranks of each machine.

  Returns:
    The same kind of graph over `graph.size * local_size` ranks; after one
    round all ranks of a machine hold the same.

  Raises:
    ValueError: if `local_size < 1`.
    TypeError: if `graph` is neither a `Topology` nor a `Schedule`.

  Example:
    >>> hierarchical(one_peer_exponential(2), local_size=2)[0].mixing_matrix[0]
    array([0.25, 0.25, 0.25, 0.25])

  Source: `GetExp2DynamicSendRecvMachineRanks` and
  `hierarchical_neighbor_allreduce` of BlueFog.
  """
  local_size = _validation.integer(
    local_size, "local_size", 1, "pass the number of ranks of each machine"
  )
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(
      f"a machine graph is a Topology or Schedule, got {type(graph).__name__}; "
      "make one with Topology.from_matrix or a generator."
    )
  # kron(W, J): the mean over the ranks of a machine, then W between machines.
  # Every rank of a machine then has the same value.
  mean = np.full((local_size, local_size), 1 / local_size)
  matrices = [np.kron(t.mixing_matrix, mean) for t in graph.rounds]
  if isinstance(graph, Schedule):
    return Schedule(matrices, check=False)
  return Topology(matrices[0], check=False, connected=graph.is_connected)


def one_peer(topology: Topology) -> Schedule:
  """Each rank sends to one of its out-neighbors at a time, in turn.

  With the out-neighbors of `i` sorted by `(r - i) mod n`, round `t` sends to
  number `t mod len(out)`. `recv[i]`, those who picked `i`, may be none or
  many: `W_t[i, i] = W_t[i, j] = 1 / (1 + len(recv[i]))` for `j` in `recv[i]`.

  Args:
    topology: whose edges are used; its weights are not.

  Returns:
    A row-stochastic `Schedule` whose period is the least common multiple of
    the out-degrees. It is doubly stochastic only if the picks of every round
    are a permutation, as on circulant graphs, where the weights are 1/2.

  Raises:
    ValueError: if the period is so long that its weights would not fit into
      1 GiB.
    TypeError: if `topology` is not a `Topology`.

  Example:
    >>> from ._static import exponential
    >>> one_peer(exponential(6)) == one_peer_exponential(6)
    True

  Source: `GetDynamicOnePeerSendRecvRanks` of BlueFog, `topology_util.py`.
  """
  if not isinstance(topology, Topology):
    raise TypeError(
      f"one_peer needs a Topology, got {type(topology).__name__}; pass one "
      "static graph."
    )
  size = topology.size
  outs = [
    # By distance ahead: on a circulant graph all ranks pick the same shift in a
    # round, which makes the round a permutation.
    sorted(topology.out_neighbors(i), key=lambda r, i=i: (r - i) % size)
    for i in range(size)
  ]
  degrees = sorted({len(out) for out in outs if out})
  # After it, every rank is at its first out-neighbor again.
  period = math.lcm(*degrees)
  if period * size**2 > _MOST_ENTRIES:
    raise ValueError(
      f"one_peer would have a period of {period} rounds, the least common "
      f"multiple of the out-degrees {degrees}; use a more regular graph, or "
      "matchings(topology)."
    )
  return Schedule(_picks(outs, t) for t in range(period))


def inner_outer_ring(size: int, local_size: int) -> Schedule:
  """One rank of each machine talks outside, the others form a ring inside.

  In round `t` the local rank `o = t mod local_size` of each machine sends to
  its counterpart on the next machine. The others send to the next local rank,
  skipping `o`. All weights are 1/2.

  Args:
    size: number of ranks, a multiple of `local_size`.
    local_size: number of ranks of each machine, at least 3; machines hold
      consecutive ranks.

  Returns:
    A doubly stochastic `Schedule` of period `local_size`. With one machine
    the outgoing rank idles.

  Raises:
    ValueError: if `local_size` is below 3 or does not divide `size`.

  Example:
    >>> inner_outer_ring(6, 3)[0].out_neighbors(0)
    (3,)
    >>> inner_outer_ring(6, 3)[0].out_neighbors(1)
    (2,)

  Source: `GetInnerOuterRingDynamicSendRecvRanks` of BlueFog.
  """
  size, local_size, machines = _machines(size, local_size)

  def source(t: int, machine: int, local: int) -> tuple[int, int]:
    outgoing = t % local_size
    if local == outgoing:
      return (machine - 1) % machines, local
    # The ring inside leaves the outgoing rank out: its source is one further.
    behind = (local - 1) % local_size
    if behind == outgoing:
      behind = (behind - 1) % local_size
    return machine, behind

  return _from_sources(size, local_size, local_size, source)


def inner_outer_exponential(size: int, local_size: int) -> Schedule:
  """As `inner_outer_ring`, with hops 1, 2, 4, ... outside and inside.

  With `M` machines of `L` ranks, `o = t mod L`, `eo = max(1, bits(M - 1))` and
  `ei = bits(L - 2)`: the local rank `o` hops `2**(t mod eo)` machines; the
  others hop `2**(t mod ei)` on the cycle of local ranks without `o`. All
  weights are 1/2.

  Args:
    size: number of ranks, a multiple of `local_size`.
    local_size: number of ranks of each machine, at least 3; machines hold
      consecutive ranks.

  Returns:
    A doubly stochastic `Schedule` of period `lcm(L, eo, ei)`. With one machine
    the outgoing rank idles. Outgoing rank and hop both follow from `t`, so
    some local ranks never use some of the outer hops.

  Raises:
    ValueError: if `local_size` is below 3 or does not divide `size`.

  Example:
    >>> schedule = inner_outer_exponential(12, 4)
    >>> [graph.out_neighbors(0) for graph in schedule]
    [(4,), (3,), (1,), (2,)]

  Source: `GetInnerOuterExpo2DynamicSendRecvRanks` of BlueFog.
  """
  size, local_size, machines = _machines(size, local_size)
  outer = max(1, (machines - 1).bit_length())
  inner = (local_size - 2).bit_length()

  def source(t: int, machine: int, local: int) -> tuple[int, int]:
    outgoing = t % local_size
    if local == outgoing:
      return (machine - 2 ** (t % outer)) % machines, local
    # Hops count the local_size - 1 ranks that stay inside. One that reaches or
    # passes the outgoing rank is longer by that rank.
    hop = 2 ** (t % inner)
    if hop >= (local - outgoing) % local_size:
      hop += 1
    return machine, (local - hop) % local_size

  # The outgoing rank and both hops turn at their own paces.
  period = math.lcm(local_size, outer, inner)
  return _from_sources(size, local_size, period, source)


def one_peer_equidyn(size: int, seed: int, period: int) -> Schedule:
  """Each rank receives from one rank, at a random shift common to all.

  `W_t[i, i] = 1 - c` and `W_t[i, i - a_t] = c` with `c = (n - 1) / (2 n)` and
  `a_t = RandomState(seed).randint(1, n, size=period)[t]`.

  Args:
    size: number of ranks.
    seed: of `numpy.random.RandomState`, the same on every rank.
    period: number of rounds drawn.

  Returns:
    A doubly stochastic `Schedule`. The squared distance to the mean shrinks,
    on average over all shifts, to `(n - 1) / (2 n)` of itself per round,
    however large `n` is.

  Raises:
    ValueError: if `size < 1` or `period < 1`, or if the shifts drawn do not
      connect all ranks: draw a longer period.

  Example:
    >>> one_peer_equidyn(5, seed=0, period=3)[0].mixing_matrix[0]
    array([0.6, 0. , 0. , 0. , 0.4])

  Source: Z. Song et al., "Communication-efficient topologies for
  decentralized learning with O(1) consensus rate", arXiv 2210.07881.
  """
  size, period = _validation.size(size), _validation.period(period)
  stream = _validation.random_state(seed)
  if size == 1:
    return Schedule([np.eye(1)] * period)
  # Of the EquiDyn paper: the expected round is then halfway between the
  # identity and the exact average.
  weight = (size - 1) / (2 * size)
  shifts = stream.randint(1, size, size=period).tolist()
  return Schedule(circulant(size, {0: 1 - weight, a: weight}) for a in shifts)


def _picks(outs: list[list[int]], t: int) -> np.ndarray:
  """The matrix of round `t` of `one_peer`."""
  matrix = np.eye(len(outs))
  for src, out in enumerate(outs):
    if out:
      matrix[out[t % len(out)], src] = 1.0
  # A rank may receive from several or none in one round, so each row is the
  # mean over the values that it has.
  return matrix / matrix.sum(axis=1, keepdims=True)


def _machines(size: int, local_size: int) -> tuple[int, int, int]:
  """Checks the sizes of inner-outer schedules and counts the machines."""
  size = _validation.size(size)
  local_size = _validation.integer(
    local_size, "local_size", 3, "one rank talks outside, two or more inside"
  )
  if size % local_size:
    raise ValueError(
      f"local_size {local_size} does not divide size {size}; all machines "
      "have equally many ranks."
    )
  return size, local_size, size // local_size


def _from_sources(
  size: int,
  local_size: int,
  period: int,
  source: Callable[[int, int, int], tuple[int, int]],
) -> Schedule:
  """Averages every rank with its source of the round, weights 1/2.

  `source(t, machine, local)` returns machine and local rank of the source.
  """
  matrices = np.zeros((period, size, size))
  for t in range(period):
    for rank in range(size):
      machine, local = source(t, *divmod(rank, local_size))
      # +=: a machine that is alone is its own source, and keeps all.
      matrices[t, rank, rank] += 0.5
      matrices[t, rank, machine * local_size + local] += 0.5
  return Schedule(matrices)
