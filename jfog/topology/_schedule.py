"""Schedule: a finite period of topologies, read at a step."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jfog import _validation
from jfog.topology import _plot, _topology
from jfog.topology._topology import Topology


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class Schedule:
  """A graph that changes from step to step, with a finite period.

  Step `t` averages with `W_{t mod P}`, where `P = len(schedule)`. A single
  round need not be connected, the union of the rounds must be. A schedule is
  frozen and hashable; two are equal if all their rounds are, in order.

  Args:
    rounds: topologies, or matrices in receive form, of equal size.
    check: `False` permits negative weights.

  Raises:
    ValueError: if there are no rounds, if their sizes differ, if a matrix is
      malformed (see `Topology`), or if the union of all rounds is not strongly
      connected.

  Example:
    >>> pairs = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    >>> others = [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    >>> schedule = Schedule([pairs, others])
    >>> schedule
    Schedule(size=3, period=2, degree=1, spectral_gap=0.75)
    >>> schedule[3].src_weights(1)
    {2: 0.5}

  Source: the dynamic topologies of BlueFog, `GetDynamicOnePeerSendRecvRanks`,
  there iterators.
  """

  rounds: tuple[Topology, ...]

  def __init__(self, rounds: Iterable[Any], *, check: bool = True) -> None:
    topologies = tuple(
      graph
      if isinstance(graph, Topology)
      # A round alone need not be connected; the union has to be, checked below.
      else Topology(graph, check=check, connected=False)
      for graph in rounds
    )
    sizes = sorted({topology.size for topology in topologies})
    if not sizes:
      raise ValueError("a Schedule has no rounds; pass at least one Topology.")
    if len(sizes) > 1:
      raise ValueError(
        f"the rounds of a Schedule have different sizes {sizes}; make all "
        "graphs over the same ranks."
      )
    # Frozen for users; the constructor converts first.
    object.__setattr__(self, "rounds", topologies)
    unreached = _topology.first_unreachable(self._union)
    if unreached is not None:
      raise ValueError(
        f"the union of the {len(self)} rounds is not strongly connected: no "
        f"path joins rank 0 and rank {unreached} in both directions; add "
        "rounds, or draw a longer period."
      )

  @property
  def size(self) -> int:
    """The number of ranks."""
    return self.rounds[0].size

  def __len__(self) -> int:
    return len(self.rounds)

  def __getitem__(self, step: int) -> Topology:
    return self.rounds[_validation.step(step) % len(self)]

  def __iter__(self) -> Iterator[Topology]:
    return iter(self.rounds)

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy  # A stack of the rounds is always a new array.
    return np.stack([t.mixing_matrix for t in self.rounds]).astype(
      np.float64 if dtype is None else dtype
    )

  @functools.cached_property
  def degree(self) -> int:
    """The most neighbors that one rank has in one round."""
    return max(topology.degree for topology in self.rounds)

  @property
  def is_symmetric(self) -> bool:
    """Whether the matrices of all rounds are symmetric."""
    return all(topology.is_symmetric for topology in self.rounds)

  @property
  def is_row_stochastic(self) -> bool:
    """Whether the rows of all rounds sum to 1."""
    return all(topology.is_row_stochastic for topology in self.rounds)

  @property
  def is_column_stochastic(self) -> bool:
    """Whether the columns of all rounds sum to 1."""
    return all(topology.is_column_stochastic for topology in self.rounds)

  @property
  def is_doubly_stochastic(self) -> bool:
    """Whether the rows and columns of all rounds sum to 1."""
    return all(topology.is_doubly_stochastic for topology in self.rounds)

  @property
  def is_regular(self) -> bool:
    """Whether every round is regular, the degree possibly changing."""
    return all(topology.is_regular for topology in self.rounds)

  @functools.cached_property
  def is_connected(self) -> bool:
    """Whether the union of all rounds is strongly connected."""
    return _topology.first_unreachable(self._union) is None

  @functools.cached_property
  def eigenvalues(self) -> np.ndarray:
    """The eigenvalues of `average_matrix()`, as those of a `Topology`."""
    # Of the product of a period: a single round need not contract at all.
    product = self._product
    symmetric = np.abs(product - product.T).max() <= _topology.TOLERANCE
    return _topology.eigenvalues(product, bool(symmetric))

  @property
  def spectral_gap(self) -> float:
    """`1 - |lambda_2|` of `average_matrix()`: per period, not per round."""
    return _topology.spectral_gap(self.eigenvalues)

  @functools.cached_property
  def stationary_distribution(self) -> np.ndarray:
    """The `pi` with `pi W = pi` for `W = average_matrix()`, of sum 1.

    What the values converge to from step 0 on is `sum_i pi[i] x[i]`. Reading
    it raises `ValueError` if several such vectors exist.
    """
    return _topology.stationary_distribution(self._product)

  def average_matrix(self) -> np.ndarray:
    """Returns the product of a period, `W_{P-1} ... W_1 W_0`.

    Returns:
      A read-only float64 array of shape `(size, size)`: what one period does
      to the values.

    Example:
      >>> Schedule([np.full((2, 2), 0.5)] * 3).average_matrix()
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    return self._product

  def rounds_to_exact_average(self) -> int | None:
    """Returns after how many rounds every rank has the mean, from step 0.

    Returns:
      The smallest `r` up to the period with `W_{r-1} ... W_0 = 11^T / size`,
      all entries relatively within 1e-12; `None` if there is none.

    Example:
      >>> Schedule([np.full((2, 2), 0.5)] * 3).rounds_to_exact_average()
      1
    """
    return self._rounds_to_exact_average

  def transpose(self) -> "Schedule":
    """Returns the schedule whose every round has its edges turned around.

    The order of the rounds stays, so that step `t` of one is the adjoint of
    step `t` of the other.

    Example:
      >>> schedule = Schedule([[[0.5, 0.5], [0.25, 0.75]]])
      >>> schedule.transpose()[0] == schedule[0].transpose()
      True
    """
    # In the same order: each step has its adjoint. The product of a period is
    # transposed only if read backward.
    return Schedule(topology.transpose() for topology in self.rounds)

  def lazy(self) -> "Schedule":
    """Returns the schedule of `(I + W_t) / 2`.

    Example:
      >>> Schedule([[[0, 1], [1, 0]]]).lazy().rounds_to_exact_average()
      1
    """
    return Schedule(topology.lazy() for topology in self.rounds)

  def plot(self, ax: Any = None) -> Any:
    """Draws the union of the rounds with matplotlib, one color per round.

    Args:
      ax: the matplotlib axes to draw on; `None` makes a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing; `pip install "jfog[plot]"`.

    Example:
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> Schedule([np.full((2, 2), 0.5)]).plot().get_title()
      'Schedule(size=2, period=1, degree=1, spectral_gap=1)'
    """
    return _plot.plot(self, ax)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Schedule):
      return NotImplemented
    # Identity first: a static argument of jit is compared in every call.
    return self is other or self.rounds == other.rounds

  def __repr__(self) -> str:
    gap = _topology.format_gap(self.spectral_gap)
    return (
      f"Schedule(size={self.size}, period={len(self)}, degree={self.degree}, "
      f"spectral_gap={gap})"
    )

  def _repr_svg_(self) -> str:
    return _plot.svg(self)

  def __reduce__(self) -> tuple:
    return Schedule, (self.rounds,)

  @functools.cached_property
  def _hash(self) -> int:
    return hash(self.rounds)

  @functools.cached_property
  def _union(self) -> np.ndarray:
    edges = np.zeros((self.size, self.size), dtype=bool)
    for topology in self.rounds:
      # A path in the union need not exist in one round: over enough periods its
      # edges come up one after the other.
      edges |= topology.mixing_matrix != 0
    return edges

  @functools.cached_property
  def _product(self) -> np.ndarray:
    product = np.eye(self.size)
    for topology in self.rounds:
      product = topology.mixing_matrix @ product
    return _topology.immutable(product)

  @functools.cached_property
  def _rounds_to_exact_average(self) -> int | None:
    product = np.eye(self.size)
    for count, topology in enumerate(self.rounds, start=1):
      product = topology.mixing_matrix @ product
      if _topology.is_exact_average(product):
        return count
    return None


def lazy(graph: Any) -> Any:
  """Mixes a graph with the identity: `(I + W) / 2`.

  Args:
    graph: a `Topology`, a `Schedule`, or a mixing matrix.

  Returns:
    The same kind of graph, or a float64 matrix. The eigenvalues of a symmetric
    doubly stochastic matrix come to lie in `[0, 1]`.

  Raises:
    ValueError: if `graph` is a malformed matrix, as `Topology`.

  Example:
    >>> lazy([[0.0, 1.0], [1.0, 0.0]])
    array([[0.5, 0.5],
           [0.5, 0.5]])

  Source: the lazy random walk; `(I + W) / 2` in exact diffusion, K. Yuan et
  al., arXiv 1702.05122.
  """
  if isinstance(graph, (Topology, Schedule)):
    return graph.lazy()
  # Unchecked: (I + W) / 2 has its use for negative weights too.
  topology = Topology(graph, check=False, connected=False)
  return np.array(topology.lazy().mixing_matrix)
