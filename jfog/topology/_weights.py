"""Weight rules: from the edges of a graph to a mixing matrix."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import networkx as nx

WeightRule = Callable[[Any], np.ndarray]


def metropolis_hastings(graph: Any) -> np.ndarray:
  """Weighs every edge by the larger degree of its two ends.

  `W[i, j] = 1 / (1 + max(deg[i], deg[j]))` on edges and
  `W[i, i] = 1 - sum_j W[i, j]`, degrees without self.

  Args:
    graph: an undirected networkx graph on the nodes `0 .. n-1`, or a square
      array whose entry `[dst, src]` is nonzero where `dst` receives from
      `src`. Weights and self loops in it are ignored.

  Returns:
    A symmetric, doubly stochastic float64 matrix of shape `(n, n)`.

  Raises:
    ValueError: if an edge has no reverse edge, or for a malformed graph.

  Example:
    >>> import networkx as nx
    >>> metropolis_hastings(nx.path_graph(3)).round(2)
    array([[0.67, 0.33, 0.  ],
           [0.33, 0.33, 0.33],
           [0.  , 0.33, 0.67]])

  Source: L. Xiao, S. Boyd, "Fast linear iterations for distributed
  averaging", 2004; `GetRecvWeights` of BlueFog, `topology_util.py`.
  """
  edges = undirected_edges(graph, "metropolis_hastings")
  # The weight of an edge is symmetric in its ends, so W is symmetric; a row has
  # at most degree entries of at most 1 / (1 + degree), so the remainder is
  # positive.
  degree = edges.sum(axis=1)
  return _with_remainder(edges / (1 + np.maximum.outer(degree, degree)))


def max_degree(graph: Any) -> np.ndarray:
  """Weighs every edge by the largest degree of the whole graph.

  `W[i, j] = 1 / (1 + max_k deg[k])` on edges and
  `W[i, i] = 1 - sum_j W[i, j]`.

  Args:
    graph: as for `metropolis_hastings`.

  Returns:
    A symmetric, doubly stochastic float64 matrix of shape `(n, n)`.

  Raises:
    ValueError: if an edge has no reverse edge, or for a malformed graph.

  Example:
    >>> import networkx as nx
    >>> max_degree(nx.star_graph(2)).round(2)
    array([[0.33, 0.33, 0.33],
           [0.33, 0.67, 0.  ],
           [0.33, 0.  , 0.67]])

  Source: L. Xiao, S. Boyd, "Fast linear iterations for distributed
  averaging", 2004.
  """
  edges = undirected_edges(graph, "max_degree")
  # One weight for all edges; the rank of the largest degree keeps as much.
  return _with_remainder(edges / (1 + edges.sum(axis=1).max()))


def uniform_in(graph: Any) -> np.ndarray:
  """Weighs a rank and its in-neighbors equally: rows sum to 1.

  `W[i, j] = 1 / (1 + indeg[i])` for `j` equal to `i` and for its in-neighbors.

  Args:
    graph: a networkx graph or array as for `metropolis_hastings`; directed
      graphs are welcome.

  Returns:
    A row-stochastic float64 matrix of shape `(n, n)`, doubly stochastic only
    if the graph is regular. On an undirected graph the consensus is weighted
    with `pi[i] = (1 + deg[i]) / sum_k (1 + deg[k])`, not uniformly.

  Raises:
    ValueError: for a malformed graph.

  Example:
    >>> import networkx as nx
    >>> uniform_in(nx.star_graph(2)).round(2)
    array([[0.33, 0.33, 0.33],
           [0.5 , 0.5 , 0.  ],
           [0.5 , 0.  , 0.5 ]])

  Source: the unweighted averaging of BlueFog, `neighbor_allreduce`.
  """
  reads = _with_self(edges_of(graph))
  # Divides by what each rank receives: rows sum to 1.
  return reads / reads.sum(axis=1, keepdims=True)


def uniform_out(graph: Any) -> np.ndarray:
  """Splits a rank's value equally over itself and its out-neighbors.

  `W[i, j] = 1 / (1 + outdeg[j])` for `i` equal to `j` and for its
  out-neighbors: the matrix of push-sum.

  Args:
    graph: a networkx graph or array as for `metropolis_hastings`; directed
      graphs are welcome.

  Returns:
    A column-stochastic float64 matrix of shape `(n, n)`.

  Raises:
    ValueError: for a malformed graph.

  Example:
    >>> import networkx as nx
    >>> uniform_out(nx.star_graph(2)).round(2)
    array([[0.33, 0.5 , 0.5 ],
           [0.33, 0.5 , 0.  ],
           [0.33, 0.  , 0.5 ]])

  Source: D. Kempe, A. Dobra, J. Gehrke, "Gossip-based computation of
  aggregate information", 2003.
  """
  reads = _with_self(edges_of(graph))
  # Divides by what each rank sends: columns sum to 1, sums are preserved.
  return reads / reads.sum(axis=0, keepdims=True)


RULES: dict[str, WeightRule] = {
  "metropolis_hastings": metropolis_hastings,
  "uniform_in": uniform_in,
  "uniform_out": uniform_out,
  "max_degree": max_degree,
}


def given(graph: "nx.Graph") -> np.ndarray:
  """Reads the `weight` attributes: `W[i, j]` is that of the edge `(j, i)`.

  Example:
    >>> import networkx as nx
    >>> graph = nx.DiGraph()
    >>> graph.add_weighted_edges_from([(0, 0, 1.0), (0, 1, 1.0)])
    >>> given(graph)
    array([[1., 0.],
           [1., 0.]])
  """
  _check_nodes(graph)
  for src, dst, weight in graph.edges(data="weight"):
    if weight is None:
      raise ValueError(
        f"edge ({src}, {dst}) has no weight; set its 'weight' attribute, or "
        f"choose one of the rules {', '.join(RULES)}."
      )
  nodes = range(len(graph))
  import networkx as nx

  # networkx has [src, dst], W has [dst, src].
  return nx.to_numpy_array(graph, nodelist=nodes).T


def is_networkx(graph: Any) -> bool:
  """Whether it is a graph of networkx, which is imported where it is needed alone.

  Example:
    >>> is_networkx([[0, 1], [1, 0]])
    False
  """
  networkx = sys.modules.get("networkx")
  return networkx is not None and isinstance(graph, networkx.Graph)


def edges_of(graph: Any) -> np.ndarray:
  """Returns the edges as booleans `[dst, src]`, without self loops.

  Example:
    >>> import networkx as nx
    >>> edges_of(nx.DiGraph([(0, 1)])).astype(int)
    array([[0, 0],
           [1, 0]])
  """
  if is_networkx(graph):
    _check_nodes(graph)
    edges = np.zeros((len(graph), len(graph)), dtype=bool)
    for src, dst in graph.edges:
      edges[dst, src] = True
      # An edge of an undirected graph comes up once, in either order.
      edges[src, dst] |= not graph.is_directed()
  else:
    edges = np.asarray(graph) != 0
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or not edges.size:
      raise ValueError(
        f"an adjacency matrix is square and not empty, got shape {edges.shape};"
        " pass one row and one column per rank."
      )
  return edges & ~np.eye(len(edges), dtype=bool)


def undirected_edges(graph: Any, name: str) -> np.ndarray:
  """Returns `edges_of(graph)` if every edge has its reverse edge.

  Example:
    >>> import networkx as nx
    >>> undirected_edges(nx.path_graph(2), "chain").astype(int)
    array([[0, 1],
           [1, 0]])
  """
  edges = edges_of(graph)
  # The first offending edge, if there is one.
  for dst, src in np.argwhere(edges & ~edges.T)[:1]:
    raise ValueError(
      f"{name} needs an undirected graph, but the edge ({src}, {dst}) has no "
      f"reverse edge ({dst}, {src}); add it, or use uniform_in or uniform_out "
      "weights."
    )
  return edges


def _check_nodes(graph: "nx.Graph") -> None:
  if graph.is_multigraph():
    raise ValueError(
      "a multigraph may hold parallel edges; convert it with nx.Graph(graph) "
      "or nx.DiGraph(graph)."
    )
  size = len(graph)
  if size == 0:
    raise ValueError("the graph has 0 nodes; add one node per rank.")
  for node in graph:
    if isinstance(node, bool) or node not in range(size):
      raise ValueError(
        f"node {node!r} is not a rank; name the nodes 0 to {size - 1}, for "
        "example with nx.convert_node_labels_to_integers."
      )


def _with_self(edges: np.ndarray) -> np.ndarray:
  return edges + np.eye(len(edges))


def _with_remainder(matrix: np.ndarray) -> np.ndarray:
  """Sets the diagonal to 1 minus the sum of each row's other weights."""
  return matrix + np.diag(1.0 - matrix.sum(axis=1))
