"""Schedules and protocols that reach the exact average."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# Wrong arguments and assignments are what some of these tests are about.

import math
import pickle

import numpy as np
import pytest
from support import reference

from jfog import topology as jt


def is_smooth(size, largest):
  for factor in range(2, largest + 1):
    while size % factor == 0:
      size //= factor
  return size == 1


def assert_exact(schedule, size, degree):
  """Exact after the period and not before, by accessors and by values."""
  rounds = [reference.mixing(schedule, t) for t in range(len(schedule))]
  for matrix in rounds:
    assert (matrix >= 0).all() and (matrix == matrix.T).all()
    assert reference.is_stochastic(matrix, axis=0)
    assert ((matrix > 0).sum(axis=1) - (np.diag(matrix) > 0) <= degree).all()
  values = np.random.RandomState(size).randn(size, 2)
  done = values
  for matrix in rounds:
    done = matrix @ done
  reference.assert_close(done, np.tile(values.mean(axis=0), (size, 1)), 1e-13)
  product = reference.product(rounds)
  reference.assert_close(product, reference.mean(size), 1e-14)
  assert schedule.rounds_to_exact_average() == len(rounds)


@pytest.mark.parametrize("size", range(1, 65))
def test_every_size_is_exact(size):
  assert_exact(jt.hyper_hypercube(size), size, degree=max(1, size - 1))
  for k in (1, 2, 3, 4):
    simple, base = jt.simple_base(size, k), jt.base_k(size, k)
    assert_exact(simple, size, degree=k)
    assert_exact(base, size, degree=k)
    assert len(base) <= len(simple)
    assert len(base) <= 2 * math.log(size, k + 1) + 2 + 1e-9


@pytest.mark.parametrize(
  ("k", "lengths"),
  [
    (1, {1: 1, 2: 1, 3: 3, 4: 2, 5: 5, 6: 5, 7: 5, 12: 7, 24: 9, 64: 6}),
    (2, {3: 1, 6: 2, 9: 2, 5: 3, 25: 6}),
    (3, {4: 1, 12: 2, 16: 2, 64: 3}),
  ],
)
def test_rounds_of_simple_base(k, lengths):
  assert {n: len(jt.simple_base(n, k)) for n in lengths} == lengths


@pytest.mark.parametrize(
  ("k", "lengths"),
  [
    (1, {1: 1, 6: 4, 7: 5, 10: 6, 12: 5, 15: 7, 24: 6, 64: 6}),
    (2, {5: 3, 7: 4, 10: 4, 25: 6}),
    (5, {6: 1, 36: 2}),
  ],
)
def test_rounds_of_base_k(k, lengths):
  assert {n: len(jt.base_k(n, k)) for n in lengths} == lengths


def test_smooth_sizes_are_a_hyper_hypercube():
  for k, size, radices in (
    (1, 8, (2, 2, 2)),
    (2, 12, (2, 2, 3)),
    (3, 24, (2, 3, 4)),
    (3, 8, (2, 4)),
    (5, 12, (2, 6)),
  ):
    assert jt.simple_base(size, k) == jt.hyper_hypercube(size, radices)
    assert jt.base_k(size, k) == jt.hyper_hypercube(size, radices)


@pytest.mark.parametrize("size", range(2, 65))
def test_length_of_simple_base_from_the_digits(size):
  for k in (1, 2, 3, 4):
    if is_smooth(size, k + 1):
      continue
    power = max(p for p in range(7) if (k + 1) ** p <= size)
    digit = size // (k + 1) ** power
    length = power + (digit > 1) + 1 + power
    assert len(jt.simple_base(size, k)) == length


def test_simple_base_3_by_hand():
  # Ranks 0 and 1 average; 1/3 and 2/3 of weight meet; 0 and 1 average again.
  half = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
  meet = [[1 / 3, 0, 2 / 3], [0, 1, 0], [2 / 3, 0, 1 / 3]]
  for graph, truth in zip(
    jt.simple_base(3, 1), [half, meet, half], strict=True
  ):
    reference.assert_close(graph.mixing_matrix, truth)


def test_simple_base_5_with_two_neighbors_by_hand():
  # 5 = 1 * 3 + 2 * 1: parts {0, 1, 2} and {3, 4}.
  inside = np.zeros((5, 5))
  inside[:3, :3] = 1 / 3
  first = inside.copy()
  first[3:, 3:] = 1 / 2
  meet = np.eye(5)
  for i, j in ((3, 0), (4, 1)):
    meet[i, i], meet[j, j] = 1 - 3 / 5, 1 - 3 / 5
    meet[i, j] = meet[j, i] = 3 / 5
  inside[3:, 3:] = np.eye(2)
  schedule = jt.simple_base(5, 2)
  for graph, truth in zip(schedule, [first, meet, inside], strict=True):
    reference.assert_close(graph.mixing_matrix, truth)


def test_simple_base_7_with_two_neighbors_exchanges_with_every_block():
  # 7 = 2 * 3 + 1: rank 6 meets the first rank of both blocks of three.
  meet = jt.simple_base(7, 2)[2]
  assert meet.in_neighbors(6) == (0, 3)
  reference.assert_close(list(meet.src_weights(6).values()), [3 / 7, 3 / 7])
  reference.assert_close(meet.self_weight(6), 1 / 7)
  reference.assert_close(meet.self_weight(0), 4 / 7)


@pytest.mark.parametrize(
  ("size", "radices"),
  [
    (6, None),
    (6, (3, 2)),
    (12, None),
    (12, (4, 3)),
    (30, (5, 6)),
    (8, (8,)),
    (1, ()),
    (7, None),
  ],
)
def test_hyper_hypercube_averages_over_one_digit(size, radices):
  schedule = jt.hyper_hypercube(size, radices)
  if radices is None:
    radices = {6: (2, 3), 12: (2, 2, 3), 7: (7,)}[size]
  assert len(schedule) == max(1, len(radices))
  stride = 1
  for graph, radix in zip(schedule, radices, strict=size > 1):
    for i in range(size):
      for j in range(size):
        digit_i, digit_j = i // stride % radix, j // stride % radix
        same = i - digit_i * stride == j - digit_j * stride
        reference.assert_close(graph.mixing_matrix[i, j], same / radix)
    matrix = graph.mixing_matrix
    reference.assert_close(matrix @ matrix, matrix)
    for other in schedule:
      reference.assert_close(
        matrix @ other.mixing_matrix, other.mixing_matrix @ matrix
      )
    stride *= radix


# The protocol.


@pytest.mark.parametrize("size", range(1, 65))
def test_ceca_is_exact_for_every_size(size):
  protocol = jt.ceca(size)
  rounds = int(np.ceil(np.log2(size)))
  assert len(protocol) == len(protocol.rounds) == rounds
  assert protocol.rounds_to_exact_average() == rounds
  values = np.random.RandomState(size).randn(size, 3)
  truth = np.tile(values.mean(axis=0), (size, 1))
  reference.assert_close(protocol.reduce(values), truth, 1e-13)

  # The same rank by rank.
  total = [values[i] for i in range(size)]
  others = [np.zeros(3) for _ in range(size)]
  for shift, send_inclusive in protocol.rounds:
    sent = total if send_inclusive else others
    received = [sent[(i - shift) % size] for i in range(size)]
    total = [a + r for a, r in zip(total, received, strict=True)]
    others = [a + r for a, r in zip(others, received, strict=True)]
    assert size == 1 or 0 < shift < size
  reference.assert_close(np.array(total) / size, truth, 1e-13)


def test_ceca_by_hand():
  # 7 <- 4 <- 2 <- 1: double, double, then one less than double.
  assert jt.ceca(7).rounds == ((1, True), (2, True), (3, False))
  assert jt.ceca(8).rounds == ((1, True), (2, True), (4, True))
  assert jt.ceca(5).rounds == ((1, True), (1, False), (2, False))
  assert jt.ceca(1).rounds == ()


def test_exact_average_is_a_value():
  assert jt.ceca(6) == jt.ExactAverage(6) == jt.ceca(np.int64(6))
  assert hash(jt.ceca(6)) == hash(jt.ExactAverage(6))
  assert jt.ceca(6) != jt.ceca(7)
  assert type(jt.ceca(np.int64(6)).size) is int
  assert pickle.loads(pickle.dumps(jt.ceca(6))) == jt.ceca(6)
  assert repr(jt.ceca(6)) == "ExactAverage(size=6, rounds=3)"
  assert jt.ceca(1)
  with pytest.raises(AttributeError):
    jt.ceca(6).size = 7


def test_reduce_keeps_complex_and_averages_integers():
  reference.assert_close(
    jt.ceca(3).reduce([1j, 2j, 3 + 0j]), np.full(3, 1 + 1j)
  )
  result = jt.ceca(2).reduce(np.array([1, 2], dtype=np.int8))
  assert result.dtype == np.float64 and result.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: jt.hyper_hypercube(6, (2, 2)), ValueError, r"\[2, 2\] is 4; .* 6"),
    (lambda: jt.hyper_hypercube(6, (6, 1)), ValueError, "a radix .* got 1"),
    (lambda: jt.hyper_hypercube(6, (2.0, 3)), TypeError, "a radix .* got 2.0"),
    (lambda: jt.hyper_hypercube(0), ValueError, "size .* got 0"),
    (lambda: jt.simple_base(5, 0), ValueError, "k must .* got 0"),
    (lambda: jt.simple_base(0, 1), ValueError, "size .* got 0"),
    (lambda: jt.base_k(5, 1.0), TypeError, "k must .* got 1.0"),
    (lambda: jt.base_k(5, -1), ValueError, "k must .* got -1"),
    (lambda: jt.base_k(True, 1), TypeError, "size .* got True"),
    (lambda: jt.ceca(0), ValueError, "size .* got 0"),
    (lambda: jt.ceca(2.5), TypeError, "size .* got 2.5"),
    (
      lambda: jt.ceca(3).reduce([1.0, 2.0]),
      ValueError,
      r"shape \(2,\); .* 3 ranks",
    ),
    (lambda: jt.ceca(3).reduce(1.0), ValueError, r"shape \(\)"),
  ],
)
def test_bad_argument(call, error, message):
  with pytest.raises(error, match=message):
    call()
