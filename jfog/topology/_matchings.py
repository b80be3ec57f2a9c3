"""Schedules of matchings: every rank exchanges with at most one other."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jfog import _validation
from jfog.topology import _weights
from jfog.topology._schedule import Schedule
from jfog.topology._topology import Topology

Edge = tuple[int, int]  # (low, high)


def matchings(topology: Topology) -> Schedule:
  """Cuts a graph into matchings, in each of which a rank has one partner.

  `W_t[i, i] = W_t[i, j] = 1/2` for the partners of round `t`; unmatched ranks
  idle. Every edge appears in exactly one round.

  Args:
    topology: an undirected graph whose edges are used; its weights are not.

  Returns:
    A symmetric, doubly stochastic `Schedule` of at most `degree + 1` rounds,
    ordered by their smallest edge: the dimensions of a hypercube, the circle
    method for a fully connected graph, a Misra-Gries coloring otherwise.

  Raises:
    ValueError: if an edge has no reverse edge.
    TypeError: if `topology` is not a `Topology`.

  Example:
    >>> from ._static import chain
    >>> [graph.in_neighbors(1) for graph in matchings(chain(4))]
    [(0,), (2,)]

  Source: J. Misra, D. Gries, "A constructive proof of Vizing's theorem",
  1992.
  """
  rounds = colors_of(topology, "matchings")
  size = topology.size
  return Schedule([_pairs_matrix(size, c) for c in rounds] or [np.eye(size)])


def random_matchings(size: int, seed: int, period: int) -> Schedule:
  """Pairs all ranks at random in every round.

  With `perm = RandomState(seed).permutation(size)`, one draw per round, the
  pairs are `(perm[0], perm[1])`, `(perm[2], perm[3])`, .., weights 1/2; of an
  odd number of ranks the last of `perm` idles.

  Args:
    size: number of ranks.
    seed: of `numpy.random.RandomState`, the same on every rank.
    period: number of rounds drawn.

  Returns:
    A symmetric, doubly stochastic `Schedule`.

  Raises:
    ValueError: if `size < 1` or `period < 1`, or if the pairs drawn do not
      connect all ranks: draw a longer period.

  Example:
    >>> random_matchings(4, seed=0, period=3)[0].in_neighbors(0)
    (1,)

  Source: S. Boyd et al., "Randomized gossip algorithms", 2006.
  """
  size, period = _validation.size(size), _validation.period(period)
  stream = _validation.random_state(seed)
  matrices = []
  for _ in range(period):
    # Neighbors in a random order: all perfect matchings are equally likely. Of
    # an odd size the last rank stays alone.
    ranks = stream.permutation(size).tolist()
    pairs = zip(ranks[0::2], ranks[1::2], strict=False)
    matrices.append(_pairs_matrix(size, pairs))
  return Schedule(matrices)


def matcha(
  topology: Topology, budget: float, seed: int, period: int
) -> Schedule:
  """Uses each matching of a graph with its own probability, within a budget.

  With `L_m` the Laplacians of `matchings(topology)`, the probabilities `p`
  maximize the second smallest eigenvalue of `Lb = sum_m p_m L_m` under
  `sum_m p_m <= budget * count`, `0 <= p_m <= 1`, and `alpha` minimizes
  `rho = ||I - 2 alpha Lb + alpha**2 (Lb**2 + 2 Lt) - J||`,
  `Lt = sum_m p_m (1 - p_m) L_m`. Then `W_t = I - alpha sum_m B_m(t) L_m`, where
  `B_m(t)` is 1 with probability `p_m`, drawn round by round from one stream.

  Args:
    topology: an undirected graph whose edges are used; its weights are not.
    budget: the expected share of the matchings in a round, in (0, 1]; 1 uses
      the whole graph in every round.
    seed: of `numpy.random.RandomState`, the same on every rank.
    period: number of rounds drawn.

  Returns:
    A symmetric `Schedule` whose rows and columns sum to 1; self weights may
    be negative. `rho < 1` bounds the expected contraction per round.

  Raises:
    ValueError: if an edge has no reverse edge, if `budget` is outside (0, 1],
      or if the rounds drawn do not connect all ranks: draw a longer period.
    TypeError: if `topology` is not a `Topology`.

  Example:
    >>> from ._static import ring
    >>> matcha(ring(6), budget=0.5, seed=0, period=20).is_symmetric
    True

  Source: J. Wang et al., "MATCHA: speeding up decentralized SGD via matching
  decomposition sampling", arXiv 1905.09435.
  """
  if isinstance(budget, bool) or not isinstance(
    budget, (int, float, np.number)
  ):
    raise TypeError(f"budget must be a number, got {budget!r}; pass a share.")
  if not 0 < budget <= 1:
    raise ValueError(
      f"budget must be in (0, 1], got {budget}; it is the expected share of "
      "the matchings in a round."
    )
  colors = colors_of(topology, "matcha")
  period = _validation.period(period)
  stream = _validation.random_state(seed)
  if not colors:
    return Schedule([np.eye(1)] * period)
  laplacians = _laplacians(topology.size, colors)
  plan = matcha_plan(laplacians, budget)
  # All draws from one stream of one seed: ranks agree on the active matchings
  # without communication.
  draws = stream.random_sample((period, len(colors))) < plan.probabilities
  active = np.tensordot(draws.astype(np.float64), laplacians, axes=1)
  return Schedule(np.eye(topology.size) - plan.alpha * active, check=False)


class MatchaPlan(NamedTuple):
  """The probabilities and the step of `matcha`, computed before it draws."""

  probabilities: np.ndarray  # shape=(matchings,), dtype=float64
  alpha: float
  rho: float  # expected contraction of the squared distance to the mean


def matcha_plan(laplacians: np.ndarray, budget: float) -> MatchaPlan:
  """Solves the two optimization problems of `matcha`.

  Args:
    laplacians: of the matchings, shape `(matchings, size, size)`, whose sum
      is that of a connected graph of at least two ranks.
    budget: in (0, 1].

  Returns:
    The `MatchaPlan`. The probabilities are rounded to eight decimals, the step
    to twelve, so that the last bits of a linear algebra library do not make
    the graphs of two ranks differ.

  Example:
    >>> plan = matcha_plan(np.array([[[1.0, -1.0], [-1.0, 1.0]]]), budget=0.5)
    >>> plan.probabilities.round(6), plan.alpha, round(plan.rho, 6)
    (array([0.5]), 0.5, 0.5)

  Source: as `matcha`.
  """
  basis = _orthogonal_to_ones(laplacians.shape[1])
  # Without the eigenvalue 0 that every Laplacian has for equal values: the
  # least eigenvalue left is the algebraic connectivity.
  reduced = basis.T @ laplacians @ basis
  probabilities = _most_connected(reduced, budget * len(laplacians))
  mean = np.tensordot(probabilities, reduced, axes=1)
  # Of the independent draws. L**2 = 2 L for a matching, hence the factor 2
  # before `spread` in the expected square.
  variances = probabilities * (1 - probabilities)
  spread = np.tensordot(variances, reduced, axes=1)
  alpha = _best_step(mean, spread)
  expected = _expected_square(mean, spread, alpha)
  rho = float(np.abs(np.linalg.eigvalsh(expected)).max())
  return MatchaPlan(probabilities, alpha, rho)


def colors_of(topology: Topology, name: str) -> list[list[Edge]]:
  """Returns the edges of each matching, ordered by their smallest edge.

  Example:
    >>> from ._static import fully_connected
    >>> colors_of(fully_connected(3), "matchings")
    [[(0, 1)], [(0, 2)], [(1, 2)]]
  """
  if not isinstance(topology, Topology):
    raise TypeError(
      f"{name} needs a Topology, got {type(topology).__name__}; pass one "
      "static graph."
    )
  _weights.undirected_edges(topology, name)
  size = topology.size
  edges = [
    (low, high)
    for low in range(size)
    for high in topology.in_neighbors(low)
    if low < high
  ]
  if _is_hypercube(size, edges):
    colors = {(low, high): low ^ high for low, high in edges}
  elif len(edges) == size * (size - 1) // 2:
    colors = _circle_method(size, edges)
  else:
    colors = _misra_gries(size, edges)
  rounds: dict[int, list[Edge]] = {}
  for edge in edges:  # ascending, so that colors come by their smallest edge
    rounds.setdefault(colors[edge], []).append(edge)
  return list(rounds.values())


def _pairs_matrix(size: int, pairs: Iterable[Edge]) -> np.ndarray:
  matrix = np.eye(size)
  for i, j in pairs:
    matrix[[i, i, j, j], [i, j, i, j]] = 0.5
  return matrix


def _laplacians(size: int, colors: list[list[Edge]]) -> np.ndarray:
  # A matching averages with W = I - L/2.
  return np.stack(
    [2 * (np.eye(size) - _pairs_matrix(size, pairs)) for pairs in colors]
  )


def _is_hypercube(size: int, edges: list[Edge]) -> bool:
  bits = size.bit_length() - 1
  return (
    size == 1 << bits
    and 2 * len(edges) == size * bits
    and all((low ^ high).bit_count() == 1 for low, high in edges)
  )


def _circle_method(size: int, edges: list[Edge]) -> dict[Edge, int]:
  """The round-robin tournament: `size - 1` rounds, one more if it is odd."""
  seats = size - 1 + size % 2  # on the circle; of an even size the last stays
  colors = {}
  for low, high in edges:
    # The last rank of an even size meets the one with low + low = round.
    partner = low if high == seats else high
    colors[low, high] = (low + partner) % seats
  return colors


def _misra_gries(size: int, edges: list[Edge]) -> dict[Edge, int]:
  """Colors the edges with at most one color more than the largest degree."""
  # colored[u][c] is the other end of the edge of color c at u.
  colored: list[dict[int, int]] = [{} for _ in range(size)]

  palette = range(1 + max(np.bincount(np.ravel(edges), minlength=1)))

  def free(u: int) -> int:
    return next(c for c in palette if c not in colored[u])

  def color_of(u: int, v: int) -> int:
    return next(c for c, end in colored[u].items() if end == v)

  for u, v in edges:
    taken = colored[u].keys() | colored[v].keys()
    common = next((c for c in palette if c not in taken), None)
    if common is not None:
      colored[u][common], colored[v][common] = v, u
      continue
    fan = [v]
    while True:
      # A maximal fan: each next edge's color is free at the previous end.
      grown = (
        end
        for c, end in sorted(colored[u].items())
        if end not in fan and c not in colored[fan[-1]]
      )
      end = next(grown, None)
      if end is None:
        break
      fan.append(end)
    c, d = free(u), free(fan[-1])
    _invert_path(colored, u, c, d)
    # After the inversion d is free at u, and at the last of some prefix that
    # is still a fan.
    last = 0
    while d in colored[fan[last]]:
      last += 1
    # Rotate the prefix: each edge takes the color of the next one.
    for here, after in itertools.pairwise(fan[: last + 1]):
      moved = color_of(u, after)
      del colored[after][moved]
      colored[u][moved], colored[here][moved] = here, u
    colored[u][d], colored[fan[last]][d] = fan[last], u
  return {
    (u, v): c for u in range(size) for c, v in colored[u].items() if u < v
  }


def _invert_path(
  colored: list[dict[int, int]], start: int, c: int, d: int
) -> None:
  """Swaps the colors on the path of alternating `d`, `c`, .. from `start`."""
  path = [start]
  color = d
  while color in colored[path[-1]]:
    path.append(colored[path[-1]][color])
    color = c if color == d else d
  steps = list(itertools.pairwise(path))
  for k, (u, v) in enumerate(steps):
    old = d if k % 2 == 0 else c
    del colored[u][old], colored[v][old]
  for k, (u, v) in enumerate(steps):
    new = c if k % 2 == 0 else d
    colored[u][new], colored[v][new] = v, u


def _orthogonal_to_ones(size: int) -> np.ndarray:
  """An orthonormal basis of the vectors of sum 0, shape `(size, size - 1)`."""
  start = np.column_stack([np.ones(size), np.eye(size)[:, 1:]])
  return np.linalg.qr(start)[0][:, 1:]


def _most_connected(reduced: np.ndarray, total: float) -> np.ndarray:
  """The `p` of sum at most `total` with the largest least eigenvalue.

  Maximizes `s` under `sum_m p_m L_m - s I >= 0`, `0 <= p <= 1` and
  `sum(p) <= total` by the barrier method: for a growing `t`, Newton steps on
  `-t s - logdet(sum_m p_m L_m - s I) - sum(log(p)) - sum(log(1 - p))
  - log(total - sum(p))`, whose minimum is within `constraints / t` of the best.
  """
  count, size, _ = reduced.shape
  if total >= count:
    return np.ones(count)
  derivatives = np.concatenate([reduced, -np.eye(size)[None]])  # by (p, s)
  point = np.full(count + 1, 0.9 * total / count)
  least = np.linalg.eigvalsh(np.tensordot(point[:-1], reduced, axes=1))[0]
  point[-1] = 0.5 * least
  t = 1.0 / least
  while t < 1e9 / least:  # beyond, a choice of several is left to rounding
    for _ in range(50):
      gradient, hessian = _barrier_slopes(derivatives, point, total, t)
      step = -np.linalg.solve(hessian, gradient)
      decrement = float(-gradient @ step)
      if decrement < 1e-10:
        break
      # Damped Newton steps stay inside: the barrier is self-concordant.
      point = point + step / (1 + np.sqrt(decrement))
    t *= 8.0
  unit = min(1.0, total)
  return np.clip((point[:-1] / unit).round(8) * unit, 0.0, 1.0)


def _barrier_slopes(
  derivatives: np.ndarray, point: np.ndarray, total: float, t: float
) -> tuple[np.ndarray, np.ndarray]:
  p = point[:-1]
  slack = np.tensordot(point, derivatives, axes=1)
  scaled = np.linalg.inv(slack) @ derivatives
  gradient = -np.trace(scaled, axis1=1, axis2=2)
  # hessian[a, b] = trace(scaled[a] scaled[b])
  turned = scaled.transpose(0, 2, 1).reshape(len(point), -1)
  hessian = scaled.reshape(len(point), -1) @ turned.T
  rest = total - p.sum()
  gradient[:-1] += -1 / p + 1 / (1 - p) + 1 / rest
  gradient[-1] -= t
  hessian[:-1, :-1] += np.diag(1 / p**2 + 1 / (1 - p) ** 2) + 1 / rest**2
  return gradient, hessian


def _expected_square(
  mean: np.ndarray, spread: np.ndarray, alpha: float
) -> np.ndarray:
  identity = np.eye(len(mean))
  return identity - 2 * alpha * mean + alpha**2 * (mean @ mean + 2 * spread)


def _best_step(mean: np.ndarray, spread: np.ndarray) -> float:
  """The `alpha` with the least largest eigenvalue of the expected square.

  It is convex in `alpha`; bisection on the sign of a slope, which is
  `v' M'(alpha) v` for the eigenvector `v` of the largest eigenvalue.
  """
  curvature = mean @ mean + 2 * spread
  low, high = 0.0, 1.0 / float(np.linalg.eigvalsh(mean)[0])
  for _ in range(60):
    alpha = (low + high) / 2
    vector = np.linalg.eigh(_expected_square(mean, spread, alpha))[1][:, -1]
    if vector @ (alpha * curvature - mean) @ vector < 0:
      low = alpha
    else:
      high = alpha
  return round((low + high) / 2, 12)
