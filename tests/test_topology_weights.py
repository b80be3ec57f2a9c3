"""Weight rules, graphs of networkx, and stationary distributions."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.graphs import EVERY_SIZE

from jfog import topology as jt

CLASS = settings(deadline=None, derandomize=True, max_examples=40)


@st.composite
def strong_digraphs(draw):
  """A directed ring in random order and random edges besides."""
  size = draw(st.integers(1, 9))
  order = draw(st.permutations(range(size)))
  edges = np.zeros((size, size), dtype=bool)
  for src, dst in zip(order, [*order[1:], order[0]], strict=True):
    edges[dst, src] = True
  ranks = st.integers(0, size - 1)
  for src, dst in draw(st.lists(st.tuples(ranks, ranks), max_size=20)):
    edges[dst, src] = True
  np.fill_diagonal(edges, False)
  return edges


def as_networkx(edges, directed=True):
  graph = nx.DiGraph() if directed else nx.Graph()
  graph.add_nodes_from(range(len(edges)))
  graph.add_edges_from((j, i) for i, j in np.argwhere(edges).tolist())
  return graph


@CLASS
@given(strong_digraphs())
def test_uniform_rules_on_directed_graphs(edges):
  size = len(edges)
  graph = as_networkx(edges)
  rows, columns = jt.uniform_in(graph), jt.uniform_out(graph)
  assert reference.is_stochastic(rows, axis=1)
  assert reference.is_stochastic(columns, axis=0)
  for i in range(size):
    for j in range(size):
      reads = edges[i, j] or i == j
      reference.assert_close(rows[i, j], reads / (1 + edges[i].sum()))
      reference.assert_close(columns[i, j], reads / (1 + edges[:, j].sum()))
  reference.assert_close(jt.uniform_in(edges), rows)
  reference.assert_close(jt.uniform_out(edges), columns)
  assert jt.Topology(rows) == jt.from_networkx(graph, "uniform_in")
  assert jt.Topology(columns) == jt.from_networkx(graph, jt.uniform_out)
  assert jt.Topology(rows).is_row_stochastic
  assert jt.Topology(columns).is_column_stochastic


@CLASS
@given(strong_digraphs())
def test_symmetric_rules_on_undirected_graphs(directed):
  edges = directed | directed.T
  graph = as_networkx(edges, directed=False)
  metropolis, most = jt.metropolis_hastings(graph), jt.max_degree(graph)
  reference.assert_close(metropolis, reference.metropolis(edges))
  for matrix in (metropolis, most):
    assert (matrix == matrix.T).all()
    assert reference.is_stochastic(matrix, axis=0)
    assert (matrix[~edges & ~np.eye(len(edges), dtype=bool)] == 0).all()
  reference.assert_close(most[edges], 1 / (1 + edges.sum(axis=0).max()))
  # Both directions of a directed graph make it undirected too.
  reference.assert_close(jt.metropolis_hastings(as_networkx(edges)), metropolis)
  assert jt.from_networkx(graph) == jt.Topology(metropolis)
  assert jt.from_networkx(graph, "max_degree") == jt.Topology(most)


@CLASS
@given(strong_digraphs(), st.integers(0, 2**31))
def test_networkx_round_trip_and_transpose(edges, seed):
  stream = np.random.RandomState(seed)
  weights = (edges | np.eye(len(edges), dtype=bool)) * (
    0.1 + stream.random_sample(edges.shape)
  )
  matrix = weights / weights.sum(axis=1, keepdims=True)
  graph = jt.Topology.from_matrix(matrix)
  network = graph.to_networkx()
  assert list(network) == list(range(graph.size))
  assert (nx.to_numpy_array(network) == matrix.T).all()
  assert jt.from_networkx(network, weights="given") == graph
  assert jt.Topology.from_networkx(as_networkx(edges), weights=matrix) == graph
  assert (graph.transpose().mixing_matrix == matrix.T).all()
  assert graph.transpose().transpose() == graph
  assert graph.transpose().is_column_stochastic
  assert graph.is_connected == nx.is_strongly_connected(network)
  assert graph.degree == max(edges.sum(axis=0).max(), edges.sum(axis=1).max())
  for rank in range(graph.size):
    others = set(range(graph.size)) - {rank}
    sources = sorted(set(network.predecessors(rank)) & others)
    targets = sorted(set(network.successors(rank)) & others)
    assert graph.in_neighbors(rank) == tuple(sources)
    assert graph.out_neighbors(rank) == tuple(targets)
    assert graph.src_weights(rank) == {j: matrix[rank, j] for j in sources}
    assert graph.dst_weights(rank) == {i: matrix[i, rank] for i in targets}
    assert list(graph.src_weights(rank)) == sources
  reference.assert_close(reference.mixing(graph), matrix)


def test_the_weights_of_bluefog():
  """`set_topology(G)` averages evenly over a rank and its in-neighbors."""
  star = nx.DiGraph(nx.star_graph(3))
  x = np.arange(4.0)
  graph = jt.from_networkx(star, "uniform_in")
  np.testing.assert_allclose(graph.mixing_matrix @ x, [1.5, 0.5, 1, 1.5])


@pytest.mark.parametrize("make", [jt.from_networkx, jt.Topology.from_networkx])
def test_weights_that_the_default_rule_does_not_read(make):
  graph = nx.path_graph(3)
  assert make(graph) == make(graph, "metropolis_hastings")
  graph.edges[0, 1]["weight"] = 0.25
  with pytest.warns(UserWarning, match="weights='given'") as caught:
    default = make(graph)
  assert caught[0].filename == __file__
  assert default == make(graph, "metropolis_hastings")  # said, so no warning


def test_self_loops_and_weights_do_not_matter_to_rules():
  plain = nx.path_graph(4)
  marked = nx.path_graph(4)
  marked.add_edge(1, 1, weight=9.0)
  marked.edges[0, 1]["weight"] = 3.0
  for rule in ("metropolis_hastings", "max_degree", "uniform_in"):
    assert jt.from_networkx(marked, rule) == jt.from_networkx(plain, rule)


def test_node_order_does_not_matter():
  graph = nx.DiGraph([(2, 0), (0, 1), (1, 2)])
  assert jt.from_networkx(graph, "uniform_in") == jt.ring(3, "right")


def test_given_weights_of_an_undirected_graph():
  graph = nx.Graph()
  graph.add_weighted_edges_from([(0, 1, 0.25), (0, 0, 0.75), (1, 1, 0.75)])
  reference.assert_close(
    jt.from_networkx(graph, "given").mixing_matrix, [[0.75, 0.25], [0.25, 0.75]]
  )


def test_an_edge_of_weight_zero_is_dropped():
  weights = np.array(jt.chain(3).mixing_matrix)
  graph = jt.from_networkx(nx.complete_graph(3), weights=weights)
  assert graph == jt.chain(3)
  assert graph.in_neighbors(0) == (1,)


def test_irregular_uniform_in_has_the_stationary_distribution_of_degrees():
  for size in (3, 5, 8):
    graph = jt.from_networkx(nx.star_graph(size - 1), "uniform_in")
    truth = np.full(size, 2 / (3 * size - 2))
    truth[0] = size / (3 * size - 2)
    reference.assert_close(graph.stationary_distribution, truth)
    assert graph.is_row_stochastic and not graph.is_doubly_stochastic
    limit = np.linalg.matrix_power(graph.mixing_matrix, 4000)
    reference.assert_close(limit, np.tile(truth, (size, 1)), 1e-9)
  with pytest.raises(ValueError, match="read-only"):
    graph.stationary_distribution[0] = 1


@pytest.mark.parametrize("name", EVERY_SIZE)
def test_doubly_stochastic_graphs_have_a_uniform_distribution(name):
  reference.assert_close(
    EVERY_SIZE[name](6).stationary_distribution, np.full(6, 1 / 6)
  )


def test_column_stochastic_graphs_have_a_uniform_distribution():
  graph = jt.from_networkx(nx.star_graph(4), "uniform_out")
  reference.assert_close(
    graph.stationary_distribution @ graph.mixing_matrix, np.full(5, 0.2)
  )


def test_lazy():
  graph = jt.ring(6)
  truth = (np.eye(6) + graph.mixing_matrix) / 2
  reference.assert_close(graph.lazy().mixing_matrix, truth)
  assert jt.lazy(graph) == graph.lazy()
  reference.assert_close(jt.lazy(graph.mixing_matrix), truth)
  assert isinstance(jt.lazy(truth), np.ndarray)
  assert graph.eigenvalues.min() < 0 <= graph.lazy().eigenvalues.min() + 1e-12
