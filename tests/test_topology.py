"""The `Topology` value: identity, accessors, pictures and bad input."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# Wrong arguments and assignments are what some of these tests are about.

import copy
import pickle
import sys

import networkx as nx
import numpy as np
import pytest
from support import reference
from support.graphs import EVERY_SIZE

from jfog import topology as jt


@pytest.fixture
def axes():
  matplotlib = pytest.importorskip("matplotlib")
  matplotlib.use("agg")
  from matplotlib import pyplot

  yield pyplot
  pyplot.close("all")


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
