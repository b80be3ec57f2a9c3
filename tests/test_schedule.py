"""The `Schedule` value and the schedules of one message per round."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# Wrong arguments and assignments are what some of these tests are about.

import itertools
import math

import networkx as nx
import numpy as np
import pytest
from support import reference

from jfog import topology as jt

PAIRS = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
OTHERS = [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]


def matrices(schedule):
  return [np.array(graph.mixing_matrix) for graph in schedule.rounds]


# The value itself.


def test_indexing_is_modulo_the_period():
  schedule = jt.Schedule([PAIRS, OTHERS])
  assert len(schedule) == 2 and schedule.size == 3
  assert list(schedule) == list(schedule.rounds)
  for step in range(-5, 6):
    assert schedule[step] is schedule.rounds[step % 2]
  assert schedule[np.int64(10**12 + 1)] is schedule.rounds[1]
  assert schedule[2**70] is schedule.rounds[0]


def test_rounds_may_be_topologies_matrices_or_both():
  round_0 = jt.Topology(PAIRS, connected=False)
  schedule = jt.Schedule([round_0, np.array(OTHERS)])
  assert schedule == jt.Schedule([PAIRS, OTHERS])
  assert not schedule[0].is_connected and schedule.is_connected
  assert jt.Schedule(jt.ring(4)).rounds == (jt.ring(4),)
  assert jt.Schedule(np.asarray(schedule)) == schedule


def test_equality_and_hash():
  schedule = jt.Schedule([PAIRS, OTHERS])
  assert hash(schedule) == hash(jt.Schedule([PAIRS, OTHERS]))
  assert schedule != jt.Schedule([OTHERS, PAIRS])
  assert schedule != jt.Schedule([PAIRS, OTHERS] * 2)
  assert schedule != 3
  assert len({schedule, jt.Schedule([PAIRS, OTHERS])}) == 1
  with pytest.raises(AttributeError):
    schedule.rounds = ()


def test_average_matrix_multiplies_in_order_of_time():
  first = np.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]])
  second = np.array([[1, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])
  schedule = jt.Schedule([first, second])
  reference.assert_close(schedule.average_matrix(), second @ first)
  assert np.abs(schedule.average_matrix() - first @ second).max() > 0.1
  with pytest.raises(ValueError, match="read-only"):
    schedule.average_matrix()[0, 0] = 0


def test_spectral_gap_is_that_of_the_period():
  for schedule in (
    jt.one_peer_exponential(6),
    jt.inner_outer_ring(6, 3),
    jt.Schedule([PAIRS, OTHERS]),
  ):
    product = reference.product(matrices(schedule))
    modulus = np.sort(np.abs(np.linalg.eigvals(product)))[::-1]
    reference.assert_close(schedule.spectral_gap, 1 - modulus[1], 1e-9)
    reference.assert_close(np.abs(schedule.eigenvalues), modulus, 1e-7)
  assert jt.one_peer_exponential(1).spectral_gap == 1.0


def test_flags_hold_for_all_rounds():
  rows = [[0.5, 0.5], [0.25, 0.75]]
  schedule = jt.Schedule([rows, np.full((2, 2), 0.5)])
  assert schedule.is_row_stochastic
  assert not schedule.is_column_stochastic
  assert not schedule.is_doubly_stochastic
  assert not schedule.is_symmetric
  turned = schedule.transpose()
  assert turned.is_column_stochastic and not turned.is_row_stochastic
  assert jt.Schedule([PAIRS, OTHERS]).is_symmetric
  assert jt.Schedule([PAIRS, OTHERS]).is_doubly_stochastic
  assert not jt.Schedule([PAIRS, OTHERS]).is_regular
  assert jt.one_peer_exponential(6).is_regular


def test_transpose_turns_every_round():
  schedule = jt.one_peer_exponential(6)
  turned = schedule.transpose()
  for step in range(3):
    assert (turned[step].mixing_matrix == schedule[step].mixing_matrix.T).all()
  assert turned.transpose() == schedule and turned != schedule


def test_lazy_schedule():
  schedule = jt.Schedule([PAIRS, OTHERS])
  for lazy, matrix in zip(jt.lazy(schedule), matrices(schedule), strict=True):
    reference.assert_close(lazy.mixing_matrix, (np.eye(3) + matrix) / 2)
  assert jt.lazy(schedule) == schedule.lazy()


def test_stationary_distribution_is_what_values_converge_to():
  schedule = jt.one_peer(jt.star(4))
  assert not schedule.is_column_stochastic
  product = reference.product(matrices(schedule))
  limit = np.linalg.matrix_power(product, 400)
  for row in limit:
    reference.assert_close(schedule.stationary_distribution, row, 1e-9)
  with pytest.raises(ValueError, match="not unique"):
    idle = [[0.5, 0.5, 0], [0.25, 0.75, 0], [0, 0, 1]]
    _ = jt.Topology(idle, connected=False).stationary_distribution


def test_rounds_to_exact_average_is_the_smallest():
  mean = np.full((2, 2), 0.5)
  assert jt.Schedule([np.eye(2), mean, mean]).rounds_to_exact_average() == 2
  assert jt.Schedule([PAIRS, OTHERS]).rounds_to_exact_average() is None
  nearly = mean + 1e-7 * np.array([[1, -1], [-1, 1]])
  assert jt.Schedule([nearly]).rounds_to_exact_average() is None


def test_degree_is_of_the_busiest_round():
  schedule = jt.Schedule([PAIRS, np.full((3, 3), 1 / 3)])
  assert schedule.degree == 2


def test_drawings():
  schedule = jt.one_peer_exponential(8)
  text = "Schedule(size=8, period=3, degree=1, spectral_gap=1)"
  assert repr(schedule) == text
  drawn = schedule._repr_svg_()
  assert drawn.count("<circle") == 8 and drawn.count("<path") == 8 + 8 + 4
  assert text in drawn
  colors = {part.split('"')[0] for part in drawn.split('stroke="#')[1:]}
  assert len(colors) == 3 + 1  # and the circles'


def test_plot_of_a_schedule():
  matplotlib = pytest.importorskip("matplotlib")
  matplotlib.use("agg")
  from matplotlib import pyplot

  schedule = jt.one_peer_exponential(4)
  ax = schedule.plot()
  assert ax.get_title() == repr(schedule)
  pyplot.close("all")


@pytest.mark.parametrize(
  ("rounds", "error", "message"),
  [
    ([], ValueError, "has no rounds; pass at least one"),
    (
      [jt.ring(4), jt.ring(5)],
      ValueError,
      r"different sizes \[4, 5\]; make all",
    ),
    ([PAIRS], ValueError, "union of the 1 rounds .* rank 0 and rank 2"),
    ([PAIRS, PAIRS], ValueError, "union of the 2 rounds is not strongly"),
    ([[[1, 2], [3, 4]]], ValueError, "neither row- nor column-stochastic"),
    ([[[1.5, -0.5], [-0.5, 1.5]]], ValueError, "negative .* check=False"),
    ([[0.5, 0.5]], ValueError, r"not empty, got shape \(2,\)"),
    ([jt.one_peer_exponential(4)], ValueError, r"got shape \(2, 4, 4\)"),
  ],
)
def test_bad_rounds(rounds, error, message):
  with pytest.raises(error, match=message):
    jt.Schedule(rounds)


def test_negative_rounds_on_request():
  negative = [[1.5, -0.5], [-0.5, 1.5]]
  assert jt.Schedule([negative], check=False)[0].in_neighbors(0) == (1,)


@pytest.mark.parametrize("step", [0.0, True, None, "0", slice(1)])
def test_bad_step(step):
  with pytest.raises(TypeError, match="indexed by an integer step"):
    jt.one_peer_exponential(4)[step]


# One peer.


@pytest.mark.parametrize("size", range(1, 65))
def test_one_peer_exponential(size):
  schedule = jt.one_peer_exponential(size)
  tau = int(np.ceil(np.log2(size)))
  assert len(schedule) == max(1, tau)
  rounds = matrices(schedule)
  for t in range(tau):
    truth = reference.circulant(size, {0: 0.5, 2**t: 0.5})
    reference.assert_close(rounds[t], truth)
  exact = size == 2 ** (size.bit_length() - 1)
  for start in range(len(rounds)):
    product = reference.product(rounds[start:] + rounds[:start])
    error = np.abs(product - reference.mean(size)).max()
    assert (error < 1e-15) == exact
  count = schedule.rounds_to_exact_average()
  assert count == (len(rounds) if exact else None)
  assert schedule.degree == min(1, size - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12, 13, 16])
def test_one_peer_of_exponential(size):
  assert jt.one_peer(jt.exponential(size)) == jt.one_peer_exponential(size)


@pytest.mark.parametrize(
  "graph",
  [
    jt.star(5),
    jt.star(5, center=2),
    jt.ring(5),
    jt.ring(4, "left"),
    jt.mesh_grid_2d(6),
    jt.erdos_renyi(7, 0.4, 2),
    jt.from_networkx(
      nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 3), (3, 0), (0, 2)]), "uniform_in"
    ),
  ],
  ids=repr,
)
def test_one_peer_from_the_picks(graph):
  size = graph.size
  network = graph.to_networkx()
  outs = []
  for i in range(size):
    targets = [r for r in network.successors(i) if r != i]
    outs.append(sorted(targets, key=lambda r, i=i: (r - i) % size))
  schedule = jt.one_peer(graph)
  assert len(schedule) == math.lcm(*map(len, outs))
  permuted = True
  for t, matrix in enumerate(matrices(schedule)):
    picks = [out[t % len(out)] for out in outs]
    permuted &= sorted(picks) == list(range(size))
    for i in range(size):
      received = [j for j in range(size) if picks[j] == i]
      for j in range(size):
        weight = 1 / (1 + len(received)) if j in [i, *received] else 0.0
        reference.assert_close(matrix[i, j], weight)
  assert schedule.is_row_stochastic
  assert schedule.is_doubly_stochastic == permuted


def test_one_peer_on_a_star_is_heard_by_one_leaf():
  for t, graph in enumerate(jt.one_peer(jt.star(4))):
    assert graph.in_neighbors(0) == (1, 2, 3)
    heard = [leaf for leaf in (1, 2, 3) if graph.in_neighbors(leaf)]
    assert heard == [t + 1]


def test_one_peer_refuses_an_endless_period():
  # Paths of complete graphs: degrees whose least common multiple explodes.
  parts = [nx.complete_graph(k) for k in (4, 6, 8, 12, 14, 18, 20, 24)]
  graph = nx.disjoint_union_all(parts)
  first = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
  graph.add_edges_from(itertools.pairwise(first))
  with pytest.raises(ValueError, match=r"period of \d+ rounds.*matchings"):
    jt.one_peer(jt.from_networkx(graph))


def test_hierarchical():
  machine = jt.one_peer_exponential(4)
  schedule = jt.hierarchical(machine, local_size=3)
  assert schedule.size == 12 and len(schedule) == 2
  values = np.random.RandomState(0).randn(12)
  for graph, between in zip(schedule, matrices(machine), strict=True):
    local = values.reshape(4, 3).mean(axis=1)
    reference.assert_close(
      graph.mixing_matrix @ values, np.repeat(between @ local, 3)
    )
  assert schedule.rounds_to_exact_average() == 2
  assert schedule.is_doubly_stochastic


def test_hierarchical_of_a_topology():
  graph = jt.hierarchical(jt.ring(5), local_size=2)
  assert isinstance(graph, jt.Topology) and graph.size == 10
  assert graph.is_connected and graph.is_doubly_stochastic
  assert jt.hierarchical(jt.ring(5), 1) == jt.ring(5)
  assert jt.hierarchical(jt.ring(1), 4) == jt.fully_connected(4)
  round_0 = jt.Topology(PAIRS, connected=False)
  assert not jt.hierarchical(round_0, 2).is_connected


# Inner and outer.


@pytest.mark.parametrize(
  ("make", "size", "local_size", "table"),
  [
    # table[t][rank]: the source of the rank; the rank itself: none.
    (jt.inner_outer_ring, 3, 3, [[0, 2, 1], [2, 1, 0], [1, 0, 2]]),
    (jt.inner_outer_exponential, 3, 3, [[0, 2, 1], [2, 1, 0], [1, 0, 2]]),
    (
      jt.inner_outer_ring,
      6,
      3,
      [[3, 2, 1, 0, 5, 4], [2, 4, 0, 5, 1, 3], [1, 0, 5, 4, 3, 2]],
    ),
    (
      jt.inner_outer_ring,
      4,
      4,
      [[0, 3, 1, 2], [3, 1, 0, 2], [3, 0, 2, 1], [2, 0, 1, 3]],
    ),
    (
      jt.inner_outer_exponential,
      4,
      4,
      # Hops 1, 2, 1, 2 on the three ranks that stay inside.
      [[0, 3, 1, 2], [2, 1, 3, 0], [3, 0, 2, 1], [1, 2, 0, 3]],
    ),
  ],
)
def test_inner_outer_by_hand(make, size, local_size, table):
  schedule = make(size, local_size)
  assert len(schedule) == len(table)
  for graph, sources in zip(schedule, table, strict=True):
    truth = (np.eye(size) + np.eye(size)[sources]) / 2
    reference.assert_close(graph.mixing_matrix, truth)


@pytest.mark.parametrize("local_size", [3, 4, 5, 6, 8, 9])
@pytest.mark.parametrize("machines", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("exponential", [False, True])
def test_inner_outer_on_the_cycle_of_those_who_stay(
  local_size, machines, exponential
):
  size = machines * local_size
  outer = len(f"{machines - 1:b}")  # one digit for 0 too
  inner = len(f"{local_size - 2:b}")
  if exponential:
    schedule = jt.inner_outer_exponential(size, local_size)
    period = math.lcm(local_size, outer, inner)
  else:
    schedule = jt.inner_outer_ring(size, local_size)
    period = local_size
  assert len(schedule) == period
  assert schedule.is_doubly_stochastic and schedule.degree == 1
  for t in range(period):
    out = t % local_size
    stay = [local for local in range(local_size) if local != out]
    inner_hop = 2 ** (t % inner) if exponential else 1
    outer_hop = 2 ** (t % outer) if exponential else 1
    for machine in range(machines):
      own = machine * local_size
      other = (machine + outer_hop) % machines * local_size + out
      graph = schedule[t]
      if machines == 1:
        assert graph.out_neighbors(own + out) == ()
        assert graph.self_weight(own + out) == 1.0
      else:
        assert graph.dst_weights(own + out) == {other: 0.5}
        assert graph.self_weight(own + out) == 0.5
      for k, local in enumerate(stay):
        target = own + stay[(k + inner_hop) % len(stay)]
        assert graph.dst_weights(own + local) == {target: 0.5}
        assert graph.self_weight(own + local) == 0.5


def test_two_machines_exchange():
  for graph in jt.inner_outer_ring(6, 3):
    for rank in range(6):
      for other in graph.in_neighbors(rank):
        if rank // 3 != other // 3:
          assert graph.out_neighbors(rank) == (other,)


# Random.


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_one_peer_equidyn(size):
  schedule = jt.one_peer_equidyn(size, seed=4, period=12)
  shifts = np.random.RandomState(4).randint(1, size, size=12)
  c = 0.5 * (size - 1) / size
  assert len(schedule) == 12
  for matrix, shift in zip(matrices(schedule), shifts, strict=True):
    reference.assert_close(
      matrix, reference.circulant(size, {0: 1 - c, shift: c})
    )
  assert schedule.is_doubly_stochastic and schedule.degree == 1
  assert schedule == jt.one_peer_equidyn(size, seed=4, period=12)


def test_equidyn_contracts_by_its_identity():
  size = 7
  values = np.random.RandomState(1).randn(size)
  distance = ((values - values.mean()) ** 2).sum()
  by_shift = {}
  for seed in range(40):
    shift = np.random.RandomState(seed).randint(1, size, size=1)[0]
    graph = jt.one_peer_equidyn(size, seed=seed, period=1)
    mixed = graph[0].mixing_matrix @ values
    by_shift[shift] = ((mixed - values.mean()) ** 2).sum()
  assert sorted(by_shift) == list(range(1, size))
  mean = np.mean(list(by_shift.values()))
  reference.assert_close(mean, (size - 1) / (2 * size) * distance)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9, 16])
def test_random_matchings(size):
  schedule = jt.random_matchings(size, seed=5, period=20)
  stream = np.random.RandomState(5)
  assert len(schedule) == 20
  for graph in schedule:
    perm = stream.permutation(size).tolist()
    truth = np.eye(size)
    for k in range(0, size - 1, 2):
      i, j = perm[k], perm[k + 1]
      truth[i, i] = truth[j, j] = truth[i, j] = truth[j, i] = 0.5
    reference.assert_close(graph.mixing_matrix, truth)
  assert schedule.is_symmetric and schedule.is_doubly_stochastic
  assert schedule == jt.random_matchings(size, seed=5, period=20)


def test_other_seeds_give_other_schedules():
  for make in (jt.random_matchings, jt.one_peer_equidyn):
    assert make(8, seed=0, period=20) != make(8, seed=1, period=20)


def test_random_schedules_of_one_rank():
  for make in (jt.random_matchings, jt.one_peer_equidyn):
    schedule = make(1, seed=0, period=3)
    assert len(schedule) == 3 and schedule[0] == jt.ring(1)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: jt.one_peer_exponential(0), ValueError, "size .* got 0"),
    (lambda: jt.one_peer_exponential(True), TypeError, "size .* got True"),
    (lambda: jt.hierarchical(jt.ring(4), 0), ValueError, "local_size .* got 0"),
    (lambda: jt.hierarchical(np.eye(2), 2), TypeError, "got ndarray"),
    (lambda: jt.hierarchical(jt.ceca(4), 2), TypeError, "got ExactAverage"),
    (lambda: jt.one_peer(4), TypeError, "needs a Topology, got int"),
    (
      lambda: jt.one_peer(jt.one_peer_exponential(4)),
      TypeError,
      "needs a Topology, got Schedule",
    ),
    (
      lambda: jt.inner_outer_ring(4, 2),
      ValueError,
      "local_size .* >= 3, got 2",
    ),
    (lambda: jt.inner_outer_ring(8, 3), ValueError, "3 does not divide size 8"),
    (
      lambda: jt.inner_outer_exponential(4, 2),
      ValueError,
      "local_size .* >= 3, got 2",
    ),
    (
      lambda: jt.inner_outer_exponential(10, 4),
      ValueError,
      "4 does not divide size 10",
    ),
    (lambda: jt.inner_outer_ring(0, 3), ValueError, "size .* got 0"),
    (lambda: jt.one_peer_equidyn(4, 0, 0), ValueError, "period .* got 0"),
    (lambda: jt.one_peer_equidyn(4, None, 3), TypeError, "seed .* got None"),
    (lambda: jt.one_peer_equidyn(-4, 0, 3), ValueError, "size .* got -4"),
    (lambda: jt.random_matchings(4, 0, 2.0), TypeError, "period .* got 2.0"),
    (lambda: jt.random_matchings(4, -1, 2), ValueError, "seed .* got -1"),
    (
      lambda: jt.random_matchings(4, 0, 1),
      ValueError,
      "union of the 1 rounds .* longer period",
    ),
  ],
)
def test_bad_argument(call, error, message):
  with pytest.raises(error, match=message):
    call()
