"""Static graphs: pure functions of sizes to topologies."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jfog import _validation
from jfog.topology import _weights
from jfog.topology._topology import Topology, matrix_of

if TYPE_CHECKING:
  import networkx as nx

_DRAWS = 100  # of a random graph, until one is connected


def exponential(size: int, base: int = 2) -> Topology:
  """Each rank receives from the ranks `base**p` behind it, for `p = 0, 1, ...`.

  `W[i, i - s] = 1 / (1 + number of powers)` for the shifts `s = 0` and all
  powers of `base` below `size`, ranks modulo `size`.

  Args:
    size: number of ranks.
    base: the integer whose powers are the shifts.

  Returns:
    A circulant, doubly stochastic, directed `Topology`. For base 2 and even
    sizes its spectral gap is `2 / (1 + ceil(log2(size)))`.

  Raises:
    ValueError: if `size < 1` or `base < 2`.

  Example:
    >>> exponential(4).mixing_matrix[0].round(2)
    array([0.33, 0.  , 0.33, 0.33])

  Source: `ExponentialGraph` of BlueFog, `topology_util.py`; B. Ying et al.,
  "Exponential graph is provably efficient for decentralized deep training",
  arXiv 2110.13363.
  """
  size = _validation.size(size)
  return _uniform_circulant(size, _powers_below(size, base))


def symmetric_exponential(size: int, base: int = 4) -> Topology:
  """Each rank exchanges with the ranks a power of `base` away, both ways.

  `W[i, i - d] = 1 / (1 + number of shifts)` for `d = 0` and all shifts `d` for
  which the shorter way round, `d` or `size - d`, is a power of `base`.

  Args:
    size: number of ranks.
    base: the integer whose powers are the distances.

  Returns:
    A circulant, symmetric, doubly stochastic `Topology`.

  Raises:
    ValueError: if `size < 1` or `base < 2`.

  Example:
    >>> symmetric_exponential(12).in_neighbors(0)
    (1, 4, 8, 11)

  Source: `SymmetricExponentialGraph` of BlueFog, `topology_util.py`.
  """
  size = _validation.size(size)
  powers = _powers_below(size, base)
  # d and size - d are one distance, so the matrix is symmetric.
  distances = {d: min(d, size - d) for d in range(1, size)}
  return _uniform_circulant(
    size, [d for d, distance in distances.items() if distance in powers]
  )


def ring(
  size: int, direction: Literal["both", "left", "right"] = "both"
) -> Topology:
  """Ranks on a circle talk to their nearest neighbors.

  `"both"`: `W[i, i] = W[i, i-1] = W[i, i+1] = 1/3` (two ranks: 1/2 each).
  `"left"`: rank `i` sends to `i - 1`; `"right"`: to `i + 1`; weights 1/2.

  Args:
    size: number of ranks.
    direction: where the data flows.

  Returns:
    A circulant, doubly stochastic `Topology`, symmetric for `"both"`.

  Raises:
    ValueError: if `size < 1` or for another `direction`.

  Example:
    >>> ring(5).in_neighbors(0), ring(5, "right").in_neighbors(0)
    ((1, 4), (4,))

  Source: `RingGraph` of BlueFog, `topology_util.py`, styles 0, 1 and 2.
  """
  size = _validation.size(size)
  # A set: on two ranks 1 and size - 1 are one shift, whose edge counts once.
  shifts = {"both": {1, size - 1}, "left": {-1}, "right": {1}}
  if direction not in shifts:
    raise ValueError(
      f"unknown direction {direction!r}; choose 'both', 'left' or 'right'."
    )
  return _uniform_circulant(size, shifts[direction] if size > 1 else ())


def chain(size: int) -> Topology:
  """Ranks on a line exchange with the one before and the one after.

  Metropolis-Hastings weights: 1/3 on every edge, the two ends keep 2/3.

  Args:
    size: number of ranks.

  Returns:
    A symmetric, doubly stochastic `Topology`.

  Raises:
    ValueError: if `size < 1`.

  Example:
    >>> chain(3).mixing_matrix.round(2)
    array([[0.67, 0.33, 0.  ],
           [0.33, 0.33, 0.33],
           [0.  , 0.33, 0.67]])

  Source: the path graph of L. Xiao, S. Boyd, 2004.
  """
  import networkx as nx

  return _metropolis(nx.path_graph(_validation.size(size)))


def mesh_grid_2d(size: int, shape: tuple[int, int] | None = None) -> Topology:
  """Ranks on a grid exchange with those above, below, left and right.

  Rank `row * columns + column` stands at `(row, column)`; weights are
  Metropolis-Hastings.

  Args:
    size: number of ranks.
    shape: rows and columns; `None` takes the two closest factors of `size`,
      rows <= columns, so that a prime makes one row.

  Returns:
    A symmetric, doubly stochastic `Topology`.

  Raises:
    ValueError: if `size < 1` or the shape does not hold `size` ranks.

  Example:
    >>> mesh_grid_2d(6).in_neighbors(4)
    (1, 3, 5)

  Source: `MeshGrid2DGraph` of BlueFog, `topology_util.py`.
  """
  return _metropolis(_grid(size, shape, periodic=False))


def torus_2d(size: int, shape: tuple[int, int] | None = None) -> Topology:
  """Ranks on a grid whose opposite sides are joined.

  As `mesh_grid_2d`, with edges from the last row and column to the first. On a
  side of length 2 the two parallel edges count once, a side of 1 has none; if
  both sides are at least 3 all weights are 1/5.

  Args:
    size: number of ranks.
    shape: rows and columns, as for `mesh_grid_2d`.

  Returns:
    A symmetric, doubly stochastic, regular `Topology`.

  Raises:
    ValueError: if `size < 1` or the shape does not hold `size` ranks.

  Example:
    >>> torus_2d(9).in_neighbors(0)
    (1, 2, 3, 6)

  Source: X. Lian et al., arXiv 1705.09056, compare rings and tori.
  """
  return _metropolis(_grid(size, shape, periodic=True))


def star(size: int, center: int = 0) -> Topology:
  """One rank exchanges with all others, which do not know each other.

  `W[center, j] = W[j, center] = 1/size`; a leaf keeps `1 - 1/size`.

  Args:
    size: number of ranks.
    center: the rank in the middle.

  Returns:
    A symmetric, doubly stochastic `Topology`.

  Raises:
    ValueError: if `size < 1` or `center` is out of range.

  Example:
    >>> star(4).mixing_matrix
    array([[0.25, 0.25, 0.25, 0.25],
           [0.25, 0.75, 0.  , 0.  ],
           [0.25, 0.  , 0.75, 0.  ],
           [0.25, 0.  , 0.  , 0.75]])

  Source: `StarGraph` of BlueFog, `topology_util.py`.
  """
  size = _validation.size(size)
  center = _validation.integer(
    center, "center", 0, f"it is a rank from 0 to {size - 1}"
  )
  if center >= size:
    raise ValueError(
      f"center {center} is out of range; pass a rank from 0 to {size - 1}."
    )
  # Metropolis-Hastings: the center has degree size - 1, so every edge weighs 1
  # / size, and a leaf keeps the rest.
  matrix = np.eye(size) * (1 - 1 / size)
  matrix[center] = matrix[:, center] = 1 / size
  return Topology(matrix)


def fully_connected(size: int) -> Topology:
  """Every rank averages over all: `W[i, j] = 1/size`.

  Args:
    size: number of ranks.

  Returns:
    A symmetric, doubly stochastic `Topology`, exact in one round.

  Raises:
    ValueError: if `size < 1`.

  Example:
    >>> fully_connected(4).rounds_to_exact_average()
    1

  Source: `FullyConnectedGraph` of BlueFog, `topology_util.py`.
  """
  size = _validation.size(size)
  return Topology(np.full((size, size), 1 / size))


def hypercube(size: int) -> Topology:
  """Ranks exchange with those whose number differs in one bit.

  `W[i, i xor 2**b] = W[i, i] = 1 / (1 + log2(size))` for every bit `b`.

  Args:
    size: number of ranks, a power of two.

  Returns:
    A symmetric, doubly stochastic `Topology` of spectral gap
    `2 / (1 + log2(size))`.

  Raises:
    ValueError: if `size` is not a power of two.

  Example:
    >>> hypercube(8).in_neighbors(0)
    (1, 2, 4)

  Source: S. Boyd, P. Diaconis, L. Xiao, "Fastest mixing Markov chain on a
  graph", 2004.
  """
  size = _validation.size(size)
  if size & (size - 1):
    raise ValueError(
      f"the size of a hypercube is a power of two, got {size}; use "
      "hyper_hypercube, exponential or another graph for this size."
    )
  bits = size.bit_length() - 1
  matrix = np.eye(size)
  for bit in range(bits):
    # An involution of the ranks: its matrix is a symmetric permutation, and a
    # sum of such is symmetric and doubly stochastic once scaled.
    matrix[np.arange(size), np.arange(size) ^ (1 << bit)] = 1.0
  return Topology(matrix / (1 + bits))


def erdos_renyi(size: int, p: float, seed: int) -> Topology:
  """Joins every pair of ranks with probability `p`, independently.

  Drawn as `networkx.gnp_random_graph` does, again and again from one stream
  until the graph is connected; weights are Metropolis-Hastings.

  Args:
    size: number of ranks.
    p: probability of an edge.
    seed: of `numpy.random.RandomState`, the same on every rank, which then
      all draw the same graph without communication.

  Returns:
    A symmetric, doubly stochastic `Topology`.

  Raises:
    ValueError: if `size < 1`, `p` is outside [0, 1], or none of 100 draws is
      connected.

  Example:
    >>> erdos_renyi(8, 0.5, seed=1) == erdos_renyi(8, 0.5, seed=1)
    True

  Source: P. Erdos, A. Renyi, "On random graphs", 1959.
  """
  size = _validation.size(size)
  if isinstance(p, bool) or not isinstance(p, (int, float, np.number)):
    raise TypeError(f"p must be a number, got {p!r}; pass one from 0 to 1.")
  if not 0 <= p <= 1:
    raise ValueError(f"p must be in [0, 1], got {p}; it is a probability.")
  stream = _validation.random_state(seed)
  import networkx as nx

  return _metropolis(
    _first_connected(
      lambda: nx.gnp_random_graph(size, p, seed=stream),
      f"erdos_renyi with size={size} and p={p}; raise p",
    )
  )


def random_regular(size: int, degree: int, seed: int) -> Topology:
  """Gives every rank `degree` random neighbors.

  `W[i, j] = 1 / (1 + degree)` on edges and for `j = i`. Drawn as
  `networkx.random_regular_graph` does, again and again from one stream until
  the graph is connected.

  Args:
    size: number of ranks.
    degree: number of neighbors; `size * degree` is even, `degree < size`.
    seed: of `numpy.random.RandomState`, the same on every rank.

  Returns:
    A symmetric, doubly stochastic, regular `Topology`.

  Raises:
    ValueError: if `size < 1`, no such graph exists, or none of 100 draws is
      connected.

  Example:
    >>> random_regular(10, degree=3, seed=0).degree
    3

  Source: A. Steger, N. Wormald, "Generating random regular graphs quickly",
  1999.
  """
  size = _validation.size(size)
  degree = _validation.integer(
    degree, "degree", 0, "pass the number of neighbors of each rank"
  )
  if degree >= size or size * degree % 2:
    raise ValueError(
      f"no graph of {size} ranks has degree {degree}; choose a degree below "
      "the size, and one of the two even."
    )
  # A graph of degree 1 is a set of pairs: connected on two ranks only.
  if size > 1 and degree < min(2, size - 1):
    raise ValueError(
      f"a graph of {size} ranks with degree {degree} is not connected; choose "
      "a degree of at least 2."
    )
  import networkx as nx

  stream = _validation.random_state(seed)
  graph = _first_connected(
    lambda: nx.random_regular_graph(degree, size, seed=stream),
    f"random_regular with size={size} and degree={degree}; raise the degree",
  )
  # Regular: the same divisor for all rows makes columns sum to 1 as well.
  edges = _weights.edges_of(graph)
  return Topology((edges + np.eye(size)) / (1 + degree))


def from_networkx(graph: "nx.Graph", weights: Any = None) -> Topology:
  """Makes a topology of a networkx graph, data flowing along its edges.

  An edge `(j, i)` means that `i` receives from `j`; in an undirected graph
  both receive. Self loops say nothing but the self weight of `"given"`.

  Args:
    graph: a graph on the nodes `0 .. n-1`, (strongly) connected.
    weights: the name of a weight rule (`"metropolis_hastings"`,
      `"max_degree"`, `"uniform_in"`, `"uniform_out"`); or `"given"`:
      `W[i, j]` is the attribute `weight` of the edge `(j, i)`; or a matrix
      `W` whose nonzero entries are edges (an edge of weight 0 is dropped); or
      a function from the graph to a matrix. By default
      `"metropolis_hastings"`, with a `UserWarning` if edges carry weights,
      which it does not read.

  Returns:
    The `Topology`.

  Raises:
    ValueError: if the nodes are not `0 .. n-1`, if the weights do not fit the
      graph or the rule does not suit it, and as the constructor of `Topology`.
    TypeError: if `graph` is not a networkx graph.

  Example:
    >>> import networkx as nx
    >>> from_networkx(nx.star_graph(3)) == star(4)
    True
    >>> from_networkx(ring(5).to_networkx(), "given") == ring(5)
    True

  Source: `set_topology` of BlueFog: `"uniform_in"` are the weights of its
  `is_weighted=False`, and `"given"` those of `is_weighted=True`.
  """
  return Topology(matrix_of(graph, weights, stacklevel=3))


def circulant(size: int, shifts: Mapping[int, float]) -> np.ndarray:
  """Returns the matrix `W[i, (i - s) mod size] += shifts[s]`.

  Example:
    >>> circulant(3, {0: 0.75, 1: 0.25})
    array([[0.75, 0.  , 0.25],
           [0.25, 0.75, 0.  ],
           [0.  , 0.25, 0.75]])
  """
  matrix = np.zeros((size, size))
  ranks = np.arange(size)
  for shift, weight in shifts.items():
    # +=, for shifts that are equal modulo size.
    matrix[ranks, (ranks - shift) % size] += weight
  return matrix


def _uniform_circulant(size: int, shifts: Any) -> Topology:
  """Weighs the rank itself and those at the given shifts equally."""
  weight = 1 / (1 + len(shifts))
  return Topology(circulant(size, dict.fromkeys([0, *shifts], weight)))


def _powers_below(size: int, base: int) -> list[int]:
  """Powers by integer multiplication: a floating logarithm misses 3**5."""
  base = _validation.integer(base, "base", 2, "the shifts are its powers")
  powers = []
  power = 1
  while power < size:
    powers.append(power)
    power *= base
  return powers


def _metropolis(graph: "nx.Graph") -> Topology:
  return Topology(_weights.metropolis_hastings(graph))


def _grid(
  size: int, shape: tuple[int, int] | None, periodic: bool
) -> "nx.Graph":
  size = _validation.size(size)
  if shape is None:
    rows = math.isqrt(size)
    # Downward from the root: the first divisor belongs to the closest pair.
    while size % rows:
      rows -= 1
    shape = (rows, size // rows)
  remedy = f"pass rows and columns with rows * columns == {size}"
  try:
    rows, columns = shape
  except (TypeError, ValueError):
    raise ValueError(
      f"shape must be a pair, got {shape!r}; {remedy}."
    ) from None
  rows = _validation.integer(rows, "shape[0]", 1, remedy)
  columns = _validation.integer(columns, "shape[1]", 1, remedy)
  if rows * columns != size:
    raise ValueError(f"shape {shape} does not hold {size} ranks; {remedy}.")
  import networkx as nx

  graph = nx.empty_graph(size)
  for row in range(rows):
    for column in range(columns):
      # The graph is simple, so on a side of 2 the edge around is the direct
      # one; on a side of 1 it is a self loop, which the weights ignore.
      if periodic or row + 1 < rows:
        below = (row + 1) % rows * columns + column
        graph.add_edge(row * columns + column, below)
      if periodic or column + 1 < columns:
        right = row * columns + (column + 1) % columns
        graph.add_edge(row * columns + column, right)
  return graph


def _first_connected(draw: "Callable[[], nx.Graph]", what: str) -> "nx.Graph":
  import networkx as nx

  # All draws come from one stream, so that ranks with one seed reject the same
  # ones and agree without communication.
  for _ in range(_DRAWS):
    graph = draw()
    if nx.is_connected(graph):
      return graph
  raise ValueError(f"none of {_DRAWS} draws is connected: {what}.")
