"""Topology: one weighted graph over the ranks, as an immutable value."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jfog import _validation
from jfog.topology import _plot, _weights

if TYPE_CHECKING:
  import networkx as nx

TOLERANCE = 1e-9  # of the sums of rows and columns, and of symmetry


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class Topology:
  """A graph over `size` ranks and the weights of averaging on it.

  The mixing matrix is in receive form: one round of averaging is
  `x[i] <- sum_j W[i, j] x[j]`, so `W[dst, src]` is the weight that `dst` gives
  to what it receives from `src`, and every nonzero entry off the diagonal is
  an edge along which a message travels. The weights `W[i, i]` never count as
  neighbors or in degrees.

  A topology is frozen and hashable, so that it can be static under `jax.jit`;
  two are equal if all their weights are. It is a schedule of period one:
  `len(topology)` is 1 and `topology[t]` is itself.

  Args:
    mixing_matrix: array of shape `(size, size)`; rows (averaging) or columns
      (push-sum) sum to 1 up to 1e-9.
    check: `False` permits negative weights.
    connected: `False` permits a graph that is not strongly connected, as a
      single round of a `Schedule` may be.

  Raises:
    ValueError: if the matrix is not square, is empty, has non-finite or
      negative weights, is neither row- nor column-stochastic, or if its graph
      is not strongly connected.
    TypeError: if the matrix is complex.

  Example:
    >>> topology = Topology([[0.5, 0.5], [0.25, 0.75]])
    >>> topology
    Topology(size=2, degree=1, spectral_gap=0.75)
    >>> topology.src_weights(0)
    {1: 0.5}
    >>> topology.is_row_stochastic, topology.is_doubly_stochastic
    (True, False)

  Source: `set_topology` and `topology_util.py` of BlueFog, whose matrices are
  the transposed ones.
  """

  mixing_matrix: np.ndarray  # shape=(size, size), dtype=float64, read-only

  def __init__(
    self, mixing_matrix: Any, *, check: bool = True, connected: bool = True
  ) -> None:
    matrix = _checked(mixing_matrix, negative=not check)
    # Frozen for users; read-only, because the hash and cached properties depend
    # on the entries.
    object.__setattr__(self, "mixing_matrix", immutable(matrix))
    if connected and not self.is_connected:
      unreached = first_unreachable(self.mixing_matrix != 0)
      raise ValueError(
        f"the graph is not strongly connected: no path joins rank 0 and rank "
        f"{unreached} in both directions; add edges, or make the matrix a "
        "round of a Schedule whose union is connected."
      )

  @classmethod
  def from_matrix(cls, matrix: Any, check: bool = True) -> "Topology":
    """Makes a topology of a mixing matrix in receive form.

    Args:
      matrix: array of shape `(size, size)`, `W[dst, src]`.
      check: `False` permits negative weights.

    Returns:
      The `Topology` with these weights.

    Raises:
      ValueError: as the constructor.

    Example:
      >>> Topology.from_matrix(np.full((4, 4), 0.25)).degree
      3
    """
    return cls(matrix, check=check)

  @classmethod
  def from_networkx(cls, graph: "nx.Graph", weights: Any = None) -> "Topology":
    """Makes a topology of a networkx graph: see `from_networkx`.

    Example:
      >>> import networkx as nx
      >>> Topology.from_networkx(nx.cycle_graph(5)).degree
      2
    """
    return cls(matrix_of(graph, weights, stacklevel=3))

  @property
  def size(self) -> int:
    """The number of ranks."""
    return len(self.mixing_matrix)

  @property
  def rounds(self) -> "tuple[Topology, ...]":
    """The one topology of the period, as a `Schedule` has several."""
    return (self,)

  def __len__(self) -> int:
    return 1

  def __getitem__(self, step: int) -> "Topology":
    _validation.step(step)
    return self

  def __iter__(self) -> "Iterator[Topology]":
    return iter(self.rounds)

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    return np.array(self.mixing_matrix, dtype=dtype, copy=copy)

  def in_neighbors(self, rank: int) -> tuple[int, ...]:
    """Returns the ranks that `rank` receives from, ascending, without self.

    Example:
      >>> Topology([[0.5, 0.5], [0.5, 0.5]]).in_neighbors(0)
      (1,)
    """
    return self._in_neighbors[_validation.rank(rank, self.size)]

  def out_neighbors(self, rank: int) -> tuple[int, ...]:
    """Returns the ranks that `rank` sends to, ascending, without self.

    Example:
      >>> Topology([[0.5, 0.5], [0.5, 0.5]]).out_neighbors(0)
      (1,)
    """
    return self._out_neighbors[_validation.rank(rank, self.size)]

  def self_weight(self, rank: int) -> float:
    """Returns `W[rank, rank]`, the weight of `rank` for its own value.

    Example:
      >>> Topology([[0.5, 0.5], [0.25, 0.75]]).self_weight(1)
      0.75
    """
    rank = _validation.rank(rank, self.size)
    return float(self.mixing_matrix[rank, rank])

  def src_weights(self, rank: int) -> dict[int, float]:
    """Returns `{src: W[rank, src]}` over the in-neighbors of `rank`.

    Example:
      >>> Topology([[0.5, 0.5], [0.25, 0.75]]).src_weights(1)
      {0: 0.25}
    """
    # Python floats: they go into attributes and traced constants, where the
    # dtype of the leaf decides.
    row = self.mixing_matrix[_validation.rank(rank, self.size)]
    return {src: float(row[src]) for src in self.in_neighbors(rank)}

  def dst_weights(self, rank: int) -> dict[int, float]:
    """Returns `{dst: W[dst, rank]}` over the out-neighbors of `rank`.

    Example:
      >>> Topology([[0.5, 0.5], [0.25, 0.75]]).dst_weights(1)
      {0: 0.5}
    """
    column = self.mixing_matrix[:, _validation.rank(rank, self.size)]
    return {dst: float(column[dst]) for dst in self.out_neighbors(rank)}

  @functools.cached_property
  def degree(self) -> int:
    """The most neighbors that one rank sends to or receives from."""
    neighbors = (*self._in_neighbors, *self._out_neighbors)
    return max(len(ranks) for ranks in neighbors)

  @functools.cached_property
  def is_symmetric(self) -> bool:
    """Whether `W` equals its transpose, up to 1e-9."""
    # With a tolerance: weights from a quotient may differ in the last bit.
    difference = self.mixing_matrix - self.mixing_matrix.T
    return bool(np.abs(difference).max() <= TOLERANCE)

  @functools.cached_property
  def is_row_stochastic(self) -> bool:
    """Whether every row sums to 1 up to 1e-9, so that equal values stay so."""
    return _sums_to_one(self.mixing_matrix, axis=1)

  @functools.cached_property
  def is_column_stochastic(self) -> bool:
    """Whether every column sums to 1 up to 1e-9, so that the mean is kept."""
    return _sums_to_one(self.mixing_matrix, axis=0)

  @property
  def is_doubly_stochastic(self) -> bool:
    """Whether rows and columns sum to 1."""
    return self.is_row_stochastic and self.is_column_stochastic

  @functools.cached_property
  def is_regular(self) -> bool:
    """Whether all ranks have equally many in- and out-neighbors."""
    neighbors = (*self._in_neighbors, *self._out_neighbors)
    return len({len(ranks) for ranks in neighbors}) == 1

  @functools.cached_property
  def is_connected(self) -> bool:
    """Whether every rank reaches every other along directed edges."""
    return first_unreachable(self.mixing_matrix != 0) is None

  @functools.cached_property
  def eigenvalues(self) -> np.ndarray:
    """The eigenvalues of `W` by descending modulus, then real part.

    A read-only array of shape `(size,)`: float64 for a symmetric matrix,
    complex128 otherwise.
    """
    return eigenvalues(self.mixing_matrix, self.is_symmetric)

  @property
  def spectral_gap(self) -> float:
    """`1 - |lambda_2|`, `lambda_2` the second eigenvalue in modulus.

    1 for a single rank. On the doubly stochastic topologies of this package
    disagreement shrinks by `1 - spectral_gap` per round.
    """
    return spectral_gap(self.eigenvalues)

  @functools.cached_property
  def stationary_distribution(self) -> np.ndarray:
    """The `pi` with `pi W = pi` and `sum(pi) = 1`, read-only, shape `(size,)`.

    Averaging on a row-stochastic matrix converges to `sum_i pi[i] x[i]`, which
    is the mean only if `pi` is uniform. Reading it raises `ValueError` if the
    matrix has several such vectors, which a connected graph never has.
    """
    return stationary_distribution(self.mixing_matrix)

  def rounds_to_exact_average(self) -> int | None:
    """Returns 1 if one round gives every rank the mean, else `None`.

    Example:
      >>> Topology([[0.5, 0.5], [0.5, 0.5]]).rounds_to_exact_average()
      1
    """
    return 1 if is_exact_average(self.mixing_matrix) else None

  def transpose(self) -> "Topology":
    """Returns the topology with every edge turned around, `W.T`.

    Example:
      >>> Topology([[0.5, 0.5], [0.25, 0.75]]).transpose().src_weights(0)
      {1: 0.25}
    """
    # Row and column sums change places; neither the sums nor strong
    # connectivity has to be checked again.
    return _restore(self.mixing_matrix.T)

  def lazy(self) -> "Topology":
    """Returns the topology of `(I + W) / 2`, whose ranks keep more.

    If `W` is symmetric and doubly stochastic its eigenvalues lie in `[0, 1]`.

    Example:
      >>> Topology([[0.0, 1.0], [1.0, 0.0]]).lazy().mixing_matrix
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    # The eigenvalues become (1 + lambda) / 2: none of a symmetric W is below 0.
    return _restore((np.eye(self.size) + self.mixing_matrix) / 2)

  def to_networkx(self) -> "nx.DiGraph":
    """Returns the directed graph whose edge `(j, i)` has `weight = W[i, j]`.

    Self loops carry `W[i, i]`; the nodes are `0 .. size-1` in this order, so
    that `nx.to_numpy_array` of it is the transposed mixing matrix.

    Example:
      >>> graph = Topology([[0.5, 0.5], [0.25, 0.75]]).to_networkx()
      >>> graph.edges[1, 0]["weight"]
      0.5
    """
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(self.size))
    # argwhere is in receive form [dst, src], an edge in send form.
    for dst, src in np.argwhere(self.mixing_matrix).tolist():
      weight = float(self.mixing_matrix[dst, src])
      graph.add_edge(src, dst, weight=weight)
    return graph

  def plot(self, ax: Any = None) -> Any:
    """Draws the graph with matplotlib, ranks on a circle.

    Args:
      ax: the matplotlib axes to draw on; `None` makes a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing; `pip install "jfog[plot]"`.

    Example:
      >>> import matplotlib
      >>> matplotlib.use("agg")
      >>> Topology([[0.5, 0.5], [0.5, 0.5]]).plot().get_title()
      'Topology(size=2, degree=1, spectral_gap=1)'
    """
    return _plot.plot(self, ax)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Topology):
      return NotImplemented
    return self is other or (
      # The hash is cached and settles nearly all unequal pairs.
      hash(self) == hash(other)
      and np.array_equal(self.mixing_matrix, other.mixing_matrix)
    )

  def __repr__(self) -> str:
    return (
      f"Topology(size={self.size}, degree={self.degree}, "
      f"spectral_gap={format_gap(self.spectral_gap)})"
    )

  def _repr_svg_(self) -> str:
    return _plot.svg(self)

  def __reduce__(self) -> tuple:
    return _restore, (np.array(self.mixing_matrix),)

  @functools.cached_property
  def _hash(self) -> int:
    # Not Python's hash of bytes, which differs from process to process: equal
    # topologies have equal hashes on all ranks.
    digest = hashlib.blake2b(self.mixing_matrix.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)

  @functools.cached_property
  def _in_neighbors(self) -> tuple[tuple[int, ...], ...]:
    edges = _weights.edges_of(self.mixing_matrix)
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in edges)

  @functools.cached_property
  def _out_neighbors(self) -> tuple[tuple[int, ...], ...]:
    edges = _weights.edges_of(self.mixing_matrix)
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in edges.T)


def immutable(array: np.ndarray) -> np.ndarray:
  """Returns a read-only copy over bytes, so that no flag makes it writable.

  Example:
    >>> immutable(np.zeros(2)).flags.writeable
    False
  """
  # An array that owns its memory could be made writable by its flags.
  return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def first_unreachable(edges: np.ndarray) -> int | None:
  """Returns a rank not joined to rank 0 in both directions, or `None`.

  Example:
    >>> first_unreachable(np.array([[True, False], [True, True]]))
    1
  """
  # Strongly connected: rank 0 reaches all along the edges, and all reach it,
  # which is the same search on the reversed edges.
  for reads in (edges, edges.T):
    reached = np.arange(len(edges)) == 0
    frontier = reached
    while frontier.any():
      frontier = reads[:, frontier].any(axis=1) & ~reached
      reached = reached | frontier
    if not reached.all():
      return int(np.argmin(reached))
  return None


def eigenvalues(matrix: np.ndarray, symmetric: bool) -> np.ndarray:
  """Returns the eigenvalues by descending modulus, then real part.

  Example:
    >>> eigenvalues(np.eye(2) / 2, symmetric=True)
    array([0.5, 0.5])
  """
  if symmetric:
    # Real by construction; the general solver may return tiny imaginary parts.
    values = np.linalg.eigvalsh(matrix)
  else:
    values = np.linalg.eigvals(matrix).astype(np.complex128)
  # Rounded moduli: the order of equal ones does not depend on rounding errors.
  real, modulus = values.real.round(9), np.abs(values).round(9)
  return immutable(values[np.lexsort((values.imag, -real, -modulus))])


def spectral_gap(values: np.ndarray) -> float:
  """Returns 1 minus the second modulus of sorted eigenvalues.

  Example:
    >>> spectral_gap(np.array([1.0, 0.25, 0.0]))
    0.75
  """
  return 1.0 - float(np.abs(values[1])) if len(values) > 1 else 1.0


def stationary_distribution(matrix: np.ndarray) -> np.ndarray:
  """Returns the `pi` of sum 1 with `pi W = pi`.

  Example:
    >>> stationary_distribution(np.array([[0.5, 0.5], [0.25, 0.75]])).round(3)
    array([0.333, 0.667])
  """
  size = len(matrix)
  # 1 W = 1: the mean is preserved, pi is uniform, also where it is not unique.
  if _sums_to_one(matrix, axis=0):
    return immutable(np.full(size, 1.0 / size))
  # (W.T - I) pi = 0 and sum(pi) = 1: size + 1 equations of rank size, if pi is
  # unique.
  equations = np.vstack([matrix.T - np.eye(size), np.ones(size)])
  right = np.append(np.zeros(size), 1.0)
  solution, _, rank, _ = np.linalg.lstsq(equations, right, rcond=None)
  if rank < size:
    raise ValueError(
      "the stationary distribution is not unique: the graph falls apart into "
      "groups that never hear each other; use the whole Schedule."
    )
  return immutable(solution)


def is_exact_average(matrix: np.ndarray) -> bool:
  """Returns whether all entries are `1/size`, relatively up to 1e-12.

  Example:
    >>> is_exact_average(np.full((3, 3), 1 / 3))
    True
  """
  # Relative to 1 / size, which becomes small.
  return bool(np.abs(matrix * len(matrix) - 1.0).max() <= 1e-12)


def format_gap(gap: float) -> str:
  """Returns a spectral gap for `repr`, without noise in the last digits.

  Example:
    >>> format_gap(1 - 1e-16), format_gap(-1e-16), format_gap(0.19526)
    ('1', '0', '0.1953')
  """
  # + 0.0 turns -0.0 into 0.0.
  return f"{round(gap, 12) + 0.0:.4g}"


def _restore(matrix: np.ndarray) -> Topology:
  """Unpickles a topology without checks; its matrix was checked before."""
  return Topology(matrix, check=False, connected=False)


def matrix_of(graph: "nx.Graph", weights: Any, stacklevel: int) -> np.ndarray:
  """The matrix of a networkx graph; see `from_networkx`.

  A warning points to the caller `stacklevel` frames above, this one included.
  """
  if not _weights.is_networkx(graph):
    raise TypeError(
      f"expected a networkx graph, got {type(graph).__name__}; use "
      "Topology.from_matrix for an array."
    )
  if weights is None:
    if any(w is not None for *_, w in graph.edges(data="weight")):
      warnings.warn(
        "the edges of this graph carry weights, which the default "
        "'metropolis_hastings' does not read; pass weights='given' to use them, "
        "or the name of a rule.",
        stacklevel=stacklevel,
      )
    weights = "metropolis_hastings"
  if isinstance(weights, str):
    if weights == "given":
      return _weights.given(graph)
    if weights in _weights.RULES:
      return _weights.RULES[weights](graph)
    names = ", ".join(["given", *_weights.RULES])
    raise ValueError(f"unknown weights {weights!r}; choose one of {names}.")
  if callable(weights):
    return np.asarray(weights(graph))
  edges, matrix = _weights.edges_of(graph), _checked(weights, negative=False)
  if matrix.shape != edges.shape:
    raise ValueError(
      f"weights has shape {matrix.shape}, but the graph has {len(edges)} "
      "nodes; pass one row and one column per node."
    )
  for dst, src in np.argwhere(_weights.edges_of(matrix) & ~edges)[:1]:
    raise ValueError(
      f"weights[{dst}, {src}] is {matrix[dst, src]}, but the graph has no edge "
      f"({src}, {dst}); add the edge, or remove the weight."
    )
  return matrix


def _checked(matrix: Any, negative: bool) -> np.ndarray:
  """Returns `matrix` as float64 after all checks but connectivity."""
  if np.iscomplexobj(matrix):
    raise TypeError(
      "expects a real mixing matrix, got complex weights; take .real."
    )
  matrix = np.array(matrix, dtype=np.float64) + 0.0  # -0.0 becomes 0.0
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
    raise ValueError(
      f"expects a square mixing matrix that is not empty, got shape {matrix.shape}; "
      "pass one row and one column per rank."
    )
  for wrong, remedy in (
    (~np.isfinite(matrix), "weights must be finite"),
    ((matrix < 0) & (not negative), "pass check=False to allow negative ones"),
  ):
    for dst, src in np.argwhere(wrong)[:1]:
      value = matrix[dst, src]
      kind = "negative" if value < 0 and np.isfinite(value) else "non-finite"
      raise ValueError(
        f"the mixing matrix has the {kind} weight W[{dst}, {src}] = {value}; "
        f"{remedy}."
      )
  # One of them suffices: rows for averaging, columns for push-sum.
  if not (_sums_to_one(matrix, axis=0) or _sums_to_one(matrix, axis=1)):
    rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
    row = np.argmax(np.abs(rows - 1))
    column = np.argmax(np.abs(columns - 1))
    raise ValueError(
      "the mixing matrix is neither row- nor column-stochastic: row "
      f"{row} sums to {rows[row]:.6g}, column {column} to "
      f"{columns[column]:.6g}; make the rows (averaging) or the columns "
      "(push-sum) sum to 1, the self weights W[i, i] included."
    )
  return matrix


def _sums_to_one(matrix: np.ndarray, axis: int) -> bool:
  return bool(np.abs(matrix.sum(axis=axis) - 1.0).max() <= TOLERANCE)
