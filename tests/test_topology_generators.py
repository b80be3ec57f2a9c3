"""Generators of static graphs, against formulas."""

import networkx as nx
import numpy as np
import pytest
from support import reference
from support.graphs import DIRECTED, EVERY_SIZE, REGULAR, SIZES

from jfog import topology as jt


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
