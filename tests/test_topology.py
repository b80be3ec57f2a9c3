"""Static graphs, weight rules and the `Topology` value."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# Wrong arguments and assignments are what some of these tests are about.

import copy
import pickle
import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from jfog import topology as jt

SIZES = [*range(1, 18), 23, 30, 31, 32, 33, 36, 47, 64]
EVERY_SIZE = {
  "exponential": jt.exponential,
  "exponential_3": lambda n: jt.exponential(n, base=3),
  "symmetric_exponential": jt.symmetric_exponential,
  "symmetric_exponential_2": lambda n: jt.symmetric_exponential(n, base=2),
  "ring": jt.ring,
  "ring_left": lambda n: jt.ring(n, "left"),
  "ring_right": lambda n: jt.ring(n, "right"),
  "chain": jt.chain,
  "mesh_grid_2d": jt.mesh_grid_2d,
  "torus_2d": jt.torus_2d,
  "star": jt.star,
  "star_last": lambda n: jt.star(n, center=n - 1),
  "fully_connected": jt.fully_connected,
  "erdos_renyi": lambda n: jt.erdos_renyi(n, 0.5, seed=n),
}
DIRECTED = {"exponential", "exponential_3", "ring_left", "ring_right"}
REGULAR = {
  "exponential",
  "exponential_3",
  "symmetric_exponential",
  "symmetric_exponential_2",
  "ring",
  "ring_left",
  "ring_right",
  "torus_2d",
  "fully_connected",
}
CLASS = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture
def axes():
  matplotlib = pytest.importorskip("matplotlib")
  matplotlib.use("agg")
  from matplotlib import pyplot

  yield pyplot
  pyplot.close("all")


# Generators, against formulas.


@pytest.mark.parametrize("name", EVERY_SIZE)
def test_every_generator_is_doubly_stochastic_and_connected(name):
  for size in SIZES:
    graph = EVERY_SIZE[name](size)
    matrix = np.array(graph.mixing_matrix)
    assert matrix.shape == (size, size) and matrix.dtype == np.float64
    assert (matrix >= 0).all()
    assert reference.is_stochastic(matrix, axis=0)
    assert reference.is_stochastic(matrix, axis=1)
    assert graph.is_doubly_stochastic
    assert reference.is_strongly_connected(matrix) and graph.is_connected
    symmetric = np.allclose(matrix, matrix.T)
    assert graph.is_symmetric == symmetric
    if name not in DIRECTED:
      assert symmetric
    if name in REGULAR:
      assert graph.is_regular
    reference.assert_close(
      graph.spectral_gap, 1 - reference.contraction(matrix), 1e-9
    )


@pytest.mark.parametrize("name", sorted(DIRECTED))
def test_directed_generators_are_not_symmetric(name):
  assert not EVERY_SIZE[name](7).is_symmetric


@pytest.mark.parametrize("name", ["star", "chain", "mesh_grid_2d"])
def test_irregular_generators(name):
  assert not EVERY_SIZE[name](8).is_regular


@pytest.mark.parametrize("name", EVERY_SIZE)
def test_one_rank_keeps_everything(name):
  graph = EVERY_SIZE[name](1)
  assert graph.mixing_matrix.tolist() == [[1.0]]
  assert graph.in_neighbors(0) == () and graph.degree == 0
  assert graph.spectral_gap == 1.0 and graph.is_regular
  assert graph.rounds_to_exact_average() == 1


@pytest.mark.parametrize("base", [2, 3, 4, 10])
def test_exponential_is_the_circulant_of_powers(base):
  for size in SIZES:
    shifts = [0, *reference.powers_below(size, base)]
    truth = reference.circulant(size, dict.fromkeys(shifts, 1 / len(shifts)))
    reference.assert_close(jt.exponential(size, base=base).mixing_matrix, truth)


def test_exponential_gap():
  for size in SIZES[1:]:
    tau = int(np.ceil(np.log2(size)))
    gap = jt.exponential(size).spectral_gap
    if size % 2 == 0:
      reference.assert_close(gap, 2 / (1 + tau))
    else:
      assert gap > 2 / (1 + tau) + 1e-9


@pytest.mark.parametrize(
  ("size", "base", "shift"),
  [(300, 3, 243), (60000, 9, 59049), (1001, 10, 1000), (126, 5, 125)],
)
def test_no_power_is_missed(size, base, shift):
  if size < 2000:
    assert size - shift in jt.exponential(size, base=base).in_neighbors(0)
  from jfog.topology import _static

  assert shift in _static._powers_below(size, base)


@pytest.mark.parametrize("base", [2, 3, 4])
def test_symmetric_exponential_is_the_circulant_of_distances(base):
  for size in SIZES:
    powers = reference.powers_below(10**6, base)
    shifts = [0] + [
      d for d in range(1, size) if (d if d <= size // 2 else size - d) in powers
    ]
    weights = dict.fromkeys(shifts, 1 / len(shifts))
    graph = jt.symmetric_exponential(size, base=base)
    reference.assert_close(
      graph.mixing_matrix, reference.circulant(size, weights)
    )
    reference.assert_close(
      graph.spectral_gap, reference.circulant_gap(size, weights), 1e-9
    )


def test_ring_gap_and_least_eigenvalue():
  for size in SIZES[3:]:
    graph = jt.ring(size)
    reference.assert_close(
      graph.spectral_gap, 2 / 3 * (1 - np.cos(2 * np.pi / size)), 1e-9
    )
    if size % 2 == 0:
      reference.assert_close(graph.eigenvalues.min(), -1 / 3)
  reference.assert_close(
    [jt.ring(2).spectral_gap, jt.ring(3).spectral_gap], [1, 1]
  )
  reference.assert_close(jt.ring(2).mixing_matrix, np.full((2, 2), 0.5))


def test_directed_rings_flow_as_named():
  for size in SIZES[1:]:
    right, left = jt.ring(size, "right"), jt.ring(size, "left")
    for rank in range(size):
      assert right.out_neighbors(rank) == ((rank + 1) % size,)
      assert left.out_neighbors(rank) == ((rank - 1) % size,)
      assert right.self_weight(rank) == left.self_weight(rank) == 0.5
    reference.assert_close(right.spectral_gap, 1 - np.cos(np.pi / size), 1e-9)
    reference.assert_close(left.spectral_gap, 1 - np.cos(np.pi / size), 1e-9)


def test_chain_eigenvalues():
  for size in SIZES[2:]:
    k = np.arange(size)
    truth = 1 / 3 + 2 / 3 * np.cos(np.pi * k / size)
    reference.assert_close(np.sort(jt.chain(size).eigenvalues), np.sort(truth))
    gap = 2 / 3 * (1 - np.cos(np.pi / size))
    reference.assert_close(jt.chain(size).spectral_gap, gap)
  reference.assert_close(jt.chain(2).mixing_matrix, np.full((2, 2), 0.5))


@pytest.mark.parametrize(
  ("size", "shape", "rows"),
  [
    (12, None, 3),
    (16, None, 4),
    (7, None, 1),
    (2, None, 1),
    (12, (2, 6), 2),
    (6, (3, 2), 3),
    (8, (8, 1), 8),
    (9, None, 3),
    (20, (4, 5), 4),
  ],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_grids_against_distance_on_the_grid(size, shape, rows, wrap):
  columns = size // rows
  place = [divmod(rank, columns) for rank in range(size)]
  edges = np.zeros((size, size), dtype=bool)
  for i, (r, c) in enumerate(place):
    for j, (s, d) in enumerate(place):
      dr, dc = abs(r - s), abs(c - d)
      if wrap:
        dr, dc = min(dr, rows - dr), min(dc, columns - dc)
      edges[i, j] = dr + dc == 1
  make = jt.torus_2d if wrap else jt.mesh_grid_2d
  graph = make(size, shape)
  reference.assert_close(graph.mixing_matrix, reference.metropolis(edges))
  if wrap and min(rows, columns) >= 3:
    reference.assert_close(
      graph.spectral_gap,
      0.4 * (1 - np.cos(2 * np.pi / max(rows, columns))),
    )
    assert set(np.unique(graph.mixing_matrix.round(12))) <= {0.0, 0.2}


def test_mesh_2_by_4_has_a_very_negative_eigenvalue():
  assert jt.mesh_grid_2d(8).eigenvalues.min() < -1 / 3


def test_star_weights():
  for size in SIZES[2:]:
    graph = jt.star(size, center=1)
    reference.assert_close(graph.spectral_gap, 1 / size)
    reference.assert_close(graph.eigenvalues.min(), 0)
    assert graph.self_weight(1) == 1 / size
    assert graph.self_weight(0) == 1 - 1 / size
    assert graph.in_neighbors(0) == (1,)
    assert graph.degree == size - 1


def test_fully_connected_is_the_mean():
  for size in SIZES:
    graph = jt.fully_connected(size)
    reference.assert_close(graph.mixing_matrix, reference.mean(size))
    reference.assert_close(graph.spectral_gap, 1.0)
    assert graph.rounds_to_exact_average() == 1
  assert jt.ring(4).rounds_to_exact_average() is None


@pytest.mark.parametrize("bits", range(7))
def test_hypercube(bits):
  size = 2**bits
  graph = jt.hypercube(size)
  truth = [
    [(1 / (1 + bits)) * (bin(i ^ j).count("1") <= 1) for j in range(size)]
    for i in range(size)
  ]
  reference.assert_close(graph.mixing_matrix, truth)
  if bits:
    reference.assert_close(graph.spectral_gap, 2 / (1 + bits))
    reference.assert_close(graph.eigenvalues.min(), -(bits - 1) / (bits + 1))


def test_erdos_renyi_is_the_first_connected_draw():
  for seed in range(5):
    stream = np.random.RandomState(seed)
    draw = nx.gnp_random_graph(12, 0.2, seed=stream)
    while not nx.is_connected(draw):
      draw = nx.gnp_random_graph(12, 0.2, seed=stream)
    graph = jt.erdos_renyi(12, 0.2, seed)
    truth = reference.metropolis(nx.to_numpy_array(draw))
    reference.assert_close(graph.mixing_matrix, truth)
    assert graph == jt.erdos_renyi(12, 0.2, seed)
  assert jt.erdos_renyi(12, 0.4, 0) != jt.erdos_renyi(12, 0.4, 1)
  assert jt.erdos_renyi(6, 1, 0).degree == 5


@pytest.mark.parametrize(
  ("size", "degree"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (10, 9), (16, 2)]
)
def test_random_regular(size, degree):
  graph = jt.random_regular(size, degree, seed=7)
  assert graph.is_symmetric and graph.is_regular and graph.is_connected
  assert graph.degree == degree
  weights = graph.mixing_matrix[graph.mixing_matrix > 0]
  reference.assert_close(weights, 1 / (1 + degree))
  assert graph == jt.random_regular(size, degree, seed=7)


def test_random_generators_leave_the_global_stream_alone():
  np.random.seed(3)
  first = np.random.random_sample()
  np.random.seed(3)
  jt.erdos_renyi(8, 0.5, 0)
  jt.random_regular(8, 3, 0)
  assert np.random.random_sample() == first


# Weight rules.


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


# The value itself.


def test_mixing_matrix_cannot_be_written():
  graph = jt.ring(4)
  with pytest.raises(ValueError, match="read-only"):
    graph.mixing_matrix[0, 0] = 1
  with pytest.raises(ValueError, match="WRITEABLE"):
    graph.mixing_matrix.setflags(write=True)
  with pytest.raises(ValueError, match="read-only"):
    graph.eigenvalues[0] = 1
  with pytest.raises(AttributeError):
    graph.mixing_matrix = np.eye(4)
  with pytest.raises(AttributeError):
    graph.size = 5


def test_the_given_array_is_copied():
  matrix = np.full((2, 2), 0.5)
  graph = jt.Topology(matrix)
  matrix[0, 0] = 7.0
  assert graph.self_weight(0) == 0.5


def test_equality_includes_the_weights():
  graph = jt.ring(4)
  assert graph == jt.Topology.from_matrix(np.array(graph.mixing_matrix))
  assert hash(graph) == hash(jt.ring(4))
  assert graph != graph.lazy() and graph != jt.ring(5)
  assert graph != jt.Schedule([graph]) and graph != "ring"
  assert len({graph, jt.ring(4), graph.lazy()}) == 2


def test_negative_zero_is_zero():
  matrix = np.eye(2) * [[1.0, -1.0], [-1.0, 1.0]]
  graph = jt.Topology(matrix, connected=False)
  other = jt.Topology(np.eye(2), connected=False)
  assert graph == other and hash(graph) == hash(other)


@pytest.mark.parametrize(
  "clone", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_are_equal_and_read_only(clone):
  for graph in (jt.star(5), jt.one_peer_exponential(4)):
    other = clone(graph)
    assert other == graph and hash(other) == hash(graph)
    assert not other[0].mixing_matrix.flags.writeable


def test_a_topology_is_a_schedule_of_period_one():
  graph = jt.ring(4)
  assert len(graph) == 1 and graph.rounds == (graph,) and list(graph) == [graph]
  for step in (0, 5, -3, np.int64(2)):
    assert graph[step] is graph


def test_arrays_of_a_topology():
  graph = jt.ring(4)
  assert np.array_equal(np.asarray(graph), graph.mixing_matrix)
  assert np.array(graph).flags.writeable


def test_negative_weights_are_allowed_on_request():
  matrix = [[1.5, -0.5], [-0.5, 1.5]]
  graph = jt.Topology.from_matrix(matrix, check=False)
  assert graph.is_doubly_stochastic and graph.in_neighbors(0) == (1,)
  assert graph.transpose() == graph


def test_sums_are_checked_to_1e_9():
  near = np.full((2, 2), 0.5) * (1 + 1e-10)
  assert jt.Topology(near).is_row_stochastic
  with pytest.raises(ValueError, match="neither row- nor column"):
    jt.Topology(np.full((2, 2), 0.5) * (1 + 1e-8))


def test_a_pure_move_has_no_self_weights():
  graph = jt.Topology(np.roll(np.eye(4), 1, axis=0))
  assert graph.self_weight(0) == 0.0 and graph.in_neighbors(0) == (3,)
  reference.assert_close(graph.spectral_gap, 0.0)
  reference.assert_close(np.abs(graph.eigenvalues), np.ones(4))
  assert graph.eigenvalues[0].real == pytest.approx(1.0)


def test_eigenvalues_are_sorted_by_modulus():
  values = jt.mesh_grid_2d(8).eigenvalues
  assert values.dtype == np.float64
  assert (np.diff(np.abs(values)) <= 1e-9).all()
  values = jt.exponential(9).eigenvalues
  assert values.dtype == np.complex128
  assert (np.diff(np.abs(values)) <= 1e-9).all()


def test_repr_names_size_degree_and_gap():
  text = "Topology(size=8, degree=2, spectral_gap=0.1953)"
  assert repr(jt.ring(8)) == text
  assert "spectral_gap=1)" in repr(jt.fully_connected(7))


def test_svg():
  text = jt.ring(8, "right")._repr_svg_()
  assert text.startswith("<svg") and text.endswith("</svg>")
  assert text.count("<circle") == 8 and text.count("<path") == 8
  assert repr(jt.ring(8, "right")) in text
  # An edge used both ways is one line.
  assert jt.ring(8)._repr_svg_().count("<path") == 8
  assert jt.fully_connected(200)._repr_svg_().count("<path") == 0
  assert jt.ring(1)._repr_svg_().count("<circle") == 1
  import xml.etree.ElementTree as xml

  assert xml.fromstring(text).tag.endswith("svg")


def test_plot(axes):
  _, ax = axes.subplots()
  graph = jt.exponential(6)
  assert graph.plot(ax=ax) is ax
  assert ax.get_title() == repr(graph)
  other = graph.plot()
  assert other is not ax
  assert {text.get_text() for text in other.texts} >= set("012345")


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"jfog\[plot\]"):
    jt.ring(4).plot()


# Bad input.

HALF = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
  ("matrix", "message"),
  [
    (np.ones((2, 3)) / 3, r"not empty, got shape \(2, 3\)"),
    (np.zeros((0, 0)), r"got shape \(0, 0\)"),
    ([0.5, 0.5], r"got shape \(2,\)"),
    (1.0, r"got shape \(\)"),
    (np.full((2, 2, 2), 0.5), r"got shape \(2, 2, 2\)"),
    ([[np.nan, 1.0], [0.5, 0.5]], r"non-finite weight W\[0, 0\] = nan"),
    ([[0.5, 0.5], [np.inf, 0.5]], r"non-finite weight W\[1, 0\] = inf"),
    ([[0.5, 0.5], [-np.inf, 0.5]], r"non-finite weight W\[1, 0\] = -inf"),
    ([[1.5, -0.5], [0.5, 0.5]], r"negative weight W\[0, 1\] = -0.5.*check"),
    (
      [[0.5, 0.25], [0.5, 0.5]],
      r"neither row- nor column-stochastic: row 0 sums to 0.75, column 1 to",
    ),
    (np.eye(2), "not strongly connected: .* rank 0 and rank 1"),
    ([[1.0, 0.0], [0.5, 0.5]], "not strongly connected"),
    ([[0.5, 0.5], [0.0, 1.0]], "not strongly connected"),
  ],
)
def test_bad_matrix(matrix, message):
  with pytest.raises(ValueError, match=message):
    jt.Topology.from_matrix(matrix)


def test_check_false_still_checks_the_rest():
  for matrix in (np.eye(2), [[1.0, np.nan], [0, 1]], [[2.0, 0], [0, -3.0]]):
    with pytest.raises(ValueError):
      jt.Topology.from_matrix(matrix, check=False)


def test_complex_matrix():
  with pytest.raises(TypeError, match="real mixing matrix, got complex"):
    jt.Topology(np.full((2, 2), 0.5 + 0j))


@pytest.mark.parametrize("name", EVERY_SIZE)
@pytest.mark.parametrize(
  ("size", "error"),
  [(0, ValueError), (-3, ValueError), (True, TypeError), (4.0, TypeError)],
)
def test_bad_size_names_value_and_remedy(name, size, error):
  if name in ("erdos_renyi", "star_last"):  # Their own arguments depend on it.
    make = jt.star if name == "star_last" else lambda n: jt.erdos_renyi(n, 1, 0)
  else:
    make = EVERY_SIZE[name]
  message = f"size must be an integer >= 1, got {size}; pass the number"
  with pytest.raises(error, match=message):
    make(size)


@pytest.mark.parametrize(
  "accessor",
  [
    "in_neighbors",
    "out_neighbors",
    "self_weight",
    "src_weights",
    "dst_weights",
  ],
)
@pytest.mark.parametrize(
  ("rank", "error", "message"),
  [
    (4, ValueError, "rank 4 is out of range; ranks of this graph are 0 to 3"),
    (-1, ValueError, "rank must be an integer >= 0, got -1"),
    (True, TypeError, "got True"),
    (1.0, TypeError, "got 1.0"),
    ("1", TypeError, "got '1'"),
    (None, TypeError, "got None"),
  ],
)
def test_bad_rank(accessor, rank, error, message):
  with pytest.raises(error, match=message):
    getattr(jt.ring(4), accessor)(rank)


def test_numpy_ranks_are_ranks():
  assert jt.ring(4).in_neighbors(np.int32(0)) == (1, 3)
  assert all(type(r) is int for r in jt.ring(4).in_neighbors(np.int32(0)))
  assert type(jt.ring(4).self_weight(0)) is float


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: jt.exponential(4, base=1), ValueError, "base .* >= 2, got 1"),
    (lambda: jt.exponential(4, base=2.0), TypeError, "base .* got 2.0"),
    (lambda: jt.symmetric_exponential(4, 0), ValueError, "base .* got 0"),
    (lambda: jt.ring(4, "up"), ValueError, "unknown direction 'up'"),
    (lambda: jt.star(4, center=4), ValueError, "center 4 is out of range"),
    (lambda: jt.star(4, center=-1), ValueError, "center .* got -1"),
    (lambda: jt.star(4, center=True), TypeError, "center .* got True"),
    (lambda: jt.hypercube(6), ValueError, "power of two, got 6"),
    (
      lambda: jt.mesh_grid_2d(6, (2, 2)),
      ValueError,
      r"shape \(2, 2\) does not hold 6 ranks",
    ),
    (lambda: jt.torus_2d(6, (-2, -3)), ValueError, r"shape\[0\] .* got -2"),
    (lambda: jt.torus_2d(6, (2.0, 3)), TypeError, r"shape\[0\] .* got 2.0"),
    (lambda: jt.mesh_grid_2d(6, 6), ValueError, "must be a pair, got 6"),
    (lambda: jt.mesh_grid_2d(6, (1, 2, 3)), ValueError, "must be a pair"),
    (lambda: jt.erdos_renyi(4, 1.5, 0), ValueError, r"p must be in \[0, 1\]"),
    (lambda: jt.erdos_renyi(4, np.nan, 0), ValueError, "got nan"),
    (lambda: jt.erdos_renyi(4, "1", 0), TypeError, "p must be a number"),
    (lambda: jt.erdos_renyi(4, 0.0, 0), ValueError, "none of 100 draws"),
    (lambda: jt.erdos_renyi(4, 0.5, None), TypeError, "seed .* got None"),
    (lambda: jt.erdos_renyi(4, 0.5, -1), ValueError, "seed .* got -1"),
    (lambda: jt.erdos_renyi(4, 0.5, 2**32), ValueError, "seed is too large"),
    (lambda: jt.random_regular(5, 3, 0), ValueError, "5 ranks has degree 3"),
    (lambda: jt.random_regular(4, 4, 0), ValueError, "4 ranks has degree 4"),
    (lambda: jt.random_regular(4, 1, 0), ValueError, "not connected; choose"),
    (lambda: jt.random_regular(4, 0, 0), ValueError, "not connected; choose"),
    (lambda: jt.random_regular(4, -1, 0), ValueError, "degree .* got -1"),
    (lambda: jt.random_regular(4, 2.0, 0), TypeError, "degree .* got 2.0"),
    (lambda: jt.ring(4)[0.5], TypeError, "integer step, got 0.5"),
    (lambda: jt.ring(4)[True], TypeError, "integer step, got True"),
    (lambda: jt.ring(4)[0:1], TypeError, "integer step, got slice"),
  ],
)
def test_bad_argument(call, error, message):
  with pytest.raises(error, match=message):
    call()


def parallel():
  return nx.MultiGraph([(0, 1), (0, 1)])


@pytest.mark.parametrize(
  ("graph", "weights", "error", "message"),
  [
    (nx.Graph(), "uniform_in", ValueError, "0 nodes"),
    (
      nx.path_graph(["a", "b"]),
      "uniform_in",
      ValueError,
      "node 'a' is not a rank",
    ),
    (nx.path_graph([1, 2]), "given", ValueError, "2 is not a rank.*0 to 1"),
    (nx.grid_2d_graph(2, 2), "uniform_in", ValueError, r"node \(0, 0\)"),
    (parallel(), "uniform_in", ValueError, "multigraph"),
    (nx.path_graph(2), "uniform", ValueError, "unknown weights 'uniform'"),
    (nx.path_graph(2), "given", ValueError, r"edge \(0, 1\) has no weight"),
    (
      nx.DiGraph([(0, 1), (1, 2), (2, 0)]),
      "metropolis_hastings",
      ValueError,
      r"metropolis_hastings needs an undirected graph, but the edge \(2, 0\)",
    ),
    (
      nx.DiGraph([(0, 1), (1, 2), (2, 0)]),
      "max_degree",
      ValueError,
      "max_degree needs an undirected graph",
    ),
    (nx.empty_graph(2), "uniform_in", ValueError, "not strongly connected"),
    (nx.path_graph(3), np.eye(2), ValueError, r"shape \(2, 2\).* 3 nodes"),
    (
      nx.path_graph(3),
      np.full((3, 3), 1 / 3),
      ValueError,
      r"weights\[0, 2\] is 0.33.*no edge \(2, 0\)",
    ),
    (HALF, "uniform_in", TypeError, "expected a networkx graph, got list"),
  ],
)
def test_bad_networkx_graph(graph, weights, error, message):
  with pytest.raises(error, match=message):
    jt.from_networkx(graph, weights)


def test_given_weights_without_self_weights_name_the_remedy():
  graph = nx.DiGraph()
  graph.add_weighted_edges_from([(0, 1, 0.5), (1, 0, 0.5)])
  with pytest.raises(ValueError, match=r"self weights W\[i, i\] included"):
    jt.from_networkx(graph, "given")


@pytest.mark.parametrize("rule", [jt.uniform_in, jt.metropolis_hastings])
@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros((0, 0)), [1, 0]])
def test_rules_refuse_what_is_no_adjacency(rule, array):
  with pytest.raises(ValueError, match="adjacency matrix is square"):
    rule(array)
