"""Edge colorings and MATCHA."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# Wrong arguments and assignments are what some of these tests are about.

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from jfog import topology as jt
from jfog.topology import _matchings

GRAPHS = {
  "ring": jt.ring(8),
  "odd ring": jt.ring(7),
  "chain": jt.chain(6),
  "star": jt.star(6),
  "mesh": jt.mesh_grid_2d(12),
  "torus": jt.torus_2d(16),
  "random": jt.erdos_renyi(14, 0.4, seed=3),
  "complete": jt.fully_connected(6),
  "odd complete": jt.fully_connected(7),
  "hypercube": jt.hypercube(8),
}


def edges_of(graph):
  return sorted(
    (i, j) for i, j in np.argwhere(graph.mixing_matrix).tolist() if i < j
  )


def check_matchings(graph):
  schedule = jt.matchings(graph)
  seen = []
  for t in range(len(schedule)):
    matrix = reference.mixing(schedule, t)
    assert ((matrix > 0).sum(axis=1) <= 2).all()
    assert set(np.unique(matrix)) <= {0.0, 0.5, 1.0}
    assert (matrix == matrix.T).all()
    reference.assert_close(matrix @ matrix, matrix)
    seen.append(edges_of(schedule[t]))
  assert sorted(itertools.chain(*seen)) == edges_of(graph)
  assert len(schedule) <= graph.degree + 1
  smallest = [edges[0] for edges in seen if edges]
  assert smallest == sorted(smallest)
  assert all(seen) or graph.size == 1
  assert schedule.is_symmetric and schedule.is_doubly_stochastic
  assert jt.matchings(graph) == schedule
  return seen


@pytest.mark.parametrize("name", GRAPHS)
def test_every_edge_is_in_exactly_one_round(name):
  check_matchings(GRAPHS[name])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(0.1, 1.0))
def test_every_edge_of_random_graphs(size, seed, p):
  stream = np.random.RandomState(seed)
  network = nx.gnp_random_graph(size, p, seed=stream)
  network.add_edges_from(itertools.pairwise(stream.permutation(size).tolist()))
  check_matchings(jt.from_networkx(network))


@pytest.mark.parametrize("d", [3, 4, 5])
def test_regular_graphs_with_odd_size_or_without_a_perfect_coloring(d):
  for n in range(d + 1, 16):
    if n * d % 2 == 0:
      for seed in range(6):
        check_matchings(jt.random_regular(n, d, seed))
  check_matchings(jt.from_networkx(nx.petersen_graph()))


@pytest.mark.parametrize("size", range(1, 20))
def test_fully_connected_is_a_tournament(size):
  seen = check_matchings(jt.fully_connected(size))
  if size > 1:
    assert len(seen) == (size - 1 if size % 2 == 0 else size)
    assert {len(edges) for edges in seen} == {size // 2}


@pytest.mark.parametrize("bits", range(1, 6))
def test_hypercube_is_its_dimensions_and_exact(bits):
  size = 2**bits
  graph = jt.hypercube(size)
  seen = check_matchings(graph)
  assert [{i ^ j for i, j in edges} for edges in seen] == [
    {2**b} for b in range(bits)
  ]
  schedule = jt.matchings(graph)
  assert schedule.rounds_to_exact_average() == bits


def test_bipartite_graphs_that_greed_colors_well():
  assert len(jt.matchings(jt.chain(7))) == 2
  assert len(jt.matchings(jt.ring(8))) == 2
  assert len(jt.matchings(jt.ring(7))) == 3
  assert len(jt.matchings(jt.star(6))) == 5


# MATCHA.


def laplacian(size, edges):
  matrix = np.zeros((size, size))
  for i, j in edges:
    matrix[[i, j], [i, j]] += 1
    matrix[[i, j], [j, i]] -= 1
  return matrix


def plan_of(graph, budget):
  colors = [edges_of(t) for t in jt.matchings(graph)]
  laplacians = np.stack([laplacian(graph.size, edges) for edges in colors])
  return laplacians, _matchings.matcha_plan(laplacians, budget)


def second(matrix):
  return np.sort(np.linalg.eigvalsh(matrix))[1]


CONNECTED = ["chain", "mesh", "random", "star", "odd ring"]


@pytest.mark.parametrize("name", CONNECTED)
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_probabilities_are_feasible_and_the_best(name, budget):
  laplacians, plan = plan_of(GRAPHS[name], budget)
  p = plan.probabilities
  count = len(laplacians)
  assert ((p >= 0) & (p <= 1)).all() and p.sum() <= budget * count + 1e-7
  best = second(np.tensordot(p, laplacians, axes=1))
  stream = np.random.RandomState(0)
  for scale in (1.0, 0.1, 0.01, 0.001):
    for _ in range(60):
      other = stream.dirichlet(np.ones(count)) * budget * count
      other = np.clip(p + scale * (other - p), 0, 1)
      value = second(np.tensordot(other, laplacians, axes=1))
      assert value <= best + 1e-7
  uniform = second(budget * laplacians.sum(axis=0))
  assert best >= uniform - 1e-7


def test_probabilities_favor_the_bridge():
  # Two triangles and a bridge between them, which one matching holds alone.
  network = nx.Graph([(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (2, 3)])
  graph = jt.from_networkx(network)
  laplacians, plan = plan_of(graph, 0.5)
  bridge = [m for m, L in enumerate(laplacians) if L[2, 3]]
  assert plan.probabilities[bridge] == plan.probabilities.max()
  value = second(np.tensordot(plan.probabilities, laplacians, axes=1))
  assert value > second(0.5 * laplacians.sum(axis=0)) + 1e-3


@pytest.mark.parametrize("name", CONNECTED)
@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
def test_rho_is_the_expected_contraction_and_the_least(name, budget):
  graph = GRAPHS[name]
  laplacians, plan = plan_of(graph, budget)

  def contraction(alpha):
    """E[W' W] - J over all outcomes of the draws."""
    expected = np.zeros((graph.size, graph.size))
    for outcome in itertools.product((0, 1), repeat=len(laplacians)):
      drawn = np.array(outcome)
      chance = np.prod(
        np.where(drawn, plan.probabilities, 1 - plan.probabilities)
      )
      if chance:
        W = np.eye(graph.size) - alpha * np.tensordot(drawn, laplacians, 1)
        expected += chance * (W @ W)
    return reference.contraction(expected)

  assert plan.rho < 1 and plan.alpha > 0
  reference.assert_close(contraction(plan.alpha), plan.rho, 1e-9)
  for factor in (0.5, 0.99, 1.01, 1.5):
    assert contraction(factor * plan.alpha) >= plan.rho - 1e-9


@pytest.mark.parametrize("name", CONNECTED)
def test_full_budget_is_the_fixed_graph(name):
  graph = GRAPHS[name]
  L = laplacian(graph.size, edges_of(graph))
  values = np.sort(np.linalg.eigvalsh(L))
  truth = np.eye(graph.size) - 2 / (values[1] + values[-1]) * L
  schedule = jt.matcha(graph, budget=1.0, seed=0, period=4)
  assert len(schedule) == 4 and len(set(schedule.rounds)) == 1
  reference.assert_close(schedule[0].mixing_matrix, truth, 1e-10)
  assert jt.matcha(graph, 1, seed=9, period=4) == schedule


@pytest.mark.parametrize("name", [*CONNECTED, "torus", "complete", "hypercube"])
def test_rounds_are_drawn_matching_by_matching(name):
  graph = GRAPHS[name]
  laplacians, plan = plan_of(graph, 0.4)
  schedule = jt.matcha(graph, budget=0.4, seed=11, period=40)
  stream = np.random.RandomState(11)
  assert len(schedule) == 40
  for t in range(40):
    matrix = np.eye(graph.size)
    for L, p in zip(laplacians, plan.probabilities, strict=True):
      if stream.random_sample() < p:
        matrix -= plan.alpha * L
    reference.assert_close(schedule[t].mixing_matrix, matrix)
  assert schedule.is_symmetric and schedule.is_doubly_stochastic
  assert schedule == jt.matcha(graph, budget=0.4, seed=11, period=40)
  assert schedule != jt.matcha(graph, budget=0.4, seed=12, period=40)


def test_the_share_of_active_matchings_is_the_budget():
  graph = GRAPHS["mesh"]
  schedule = jt.matcha(graph, budget=0.3, seed=0, period=2000)
  colors = [set(edges_of(t)) for t in jt.matchings(graph)]
  active = sum(
    bool(colors[m] & set(edges_of(t)))
    for t in schedule
    for m in range(len(colors))
  )
  assert active / (2000 * len(colors)) == pytest.approx(0.3, abs=0.02)


def test_one_rank_has_nothing_to_match():
  assert jt.matchings(jt.ring(1)).rounds == (jt.ring(1),)
  assert (
    jt.matcha(jt.ring(1), 0.5, seed=0, period=3).rounds == (jt.ring(1),) * 3
  )


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda: jt.matchings(jt.ring(4, "left")),
      ValueError,
      "matchings needs an undirected graph",
    ),
    (lambda: jt.matchings(4), TypeError, "matchings needs a Topology, got int"),
    (
      lambda: jt.matchings(jt.one_peer_exponential(4)),
      TypeError,
      "matchings needs a Topology, got Schedule",
    ),
    (
      lambda: jt.matcha(jt.exponential(5), 0.5, 0, 9),
      ValueError,
      "matcha needs an undirected graph",
    ),
    (lambda: jt.matcha(jt.ring(4), 0.0, 0, 9), ValueError, "budget .* got 0.0"),
    (lambda: jt.matcha(jt.ring(4), 1.5, 0, 9), ValueError, "budget .* got 1.5"),
    (lambda: jt.matcha(jt.ring(4), np.nan, 0, 9), ValueError, "got nan"),
    (lambda: jt.matcha(jt.ring(4), "1", 0, 9), TypeError, "budget .* got '1'"),
    (lambda: jt.matcha(jt.ring(4), 0.5, 0, 0), ValueError, "period .* got 0"),
    (lambda: jt.matcha(jt.ring(4), 0.5, 0.5, 9), TypeError, "seed .* got 0.5"),
    (
      lambda: jt.matcha(jt.ring(8), 0.01, 0, 2),
      ValueError,
      "union of the 2 rounds .* longer period",
    ),
  ],
)
def test_bad_argument(call, error, message):
  with pytest.raises(error, match=message):
    call()
