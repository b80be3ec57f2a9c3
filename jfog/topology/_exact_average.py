"""Schedules and protocols that reach the exact average in few rounds."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jfog import _validation
from jfog.topology._schedule import Schedule

Matrices = list[np.ndarray]  # of the rounds, each of shape (size, size)


def hyper_hypercube(
  size: int, radices: Sequence[int] | None = None
) -> Schedule:
  """Averages over one digit of the rank per round, in a mixed radix.

  With stride `st = prod(radices[:k])` and `digit = (i // st) mod radices[k]`,
  round `k` averages rank `i` uniformly over the `radices[k]` ranks that differ
  from it only in that digit.

  Args:
    size: number of ranks.
    radices: integers of at least 2 whose product is `size`; `None` takes the
      prime factors in ascending order.

  Returns:
    A symmetric, doubly stochastic `Schedule` of `len(radices)` rounds (one
    identity round for a single rank), exact after them, whatever their order.

  Raises:
    ValueError: if `size < 1` or the product of the radices is another.

  Example:
    >>> schedule = hyper_hypercube(6)
    >>> [graph.in_neighbors(0) for graph in schedule]
    [(1,), (2, 4)]
    >>> schedule.rounds_to_exact_average()
    2

  Source: Y. Takezawa et al., "Beyond exponential graph", arXiv 2305.11420.
  """
  size = _validation.size(size)
  if radices is None:
    radices = _smooth_factors(size, size)
  remedy = f"pass integers whose product is {size}"
  radices = [_validation.integer(r, "a radix", 2, remedy) for r in radices]
  if math.prod(radices) != size:
    raise ValueError(
      f"the product of radices {radices} is {math.prod(radices)}; {remedy}."
    )
  return _schedule(size, _hyper_hypercube(radices))


def simple_base(size: int, k: int) -> Schedule:
  """Reaches the exact average for every size, with at most `k` neighbors.

  The ranks are cut into parts by the digits of `size` in base `k + 1`. Each
  part averages inside, every block of a part is adjusted by an exchange with
  the later parts so that its mean is the global one, and averages again.

  Args:
    size: number of ranks.
    k: the most neighbors of a rank in a round.

  Returns:
    A symmetric, doubly stochastic `Schedule`, exact after its period.

  Raises:
    ValueError: if `size < 1` or `k < 1`.

  Example:
    >>> [len(simple_base(size, k=1)) for size in (3, 5, 6, 8, 12)]
    [3, 5, 5, 3, 7]

  Source: Y. Takezawa et al., "Beyond exponential graph", arXiv 2305.11420,
  the simple base-(k+1) graph.
  """
  size, k = _sizes(size, k)
  return _schedule(size, _simple_base(size, k))


def base_k(size: int, k: int) -> Schedule:
  """Reaches the exact average for every size, in fewer rounds.

  With `size = p q`, `p` the largest divisor whose prime factors are at most
  `k + 1`: `simple_base(q, k)` over groups of ranks, then a hyper-hypercube of
  `p` ranks. If `simple_base(size, k)` is shorter, it is taken.

  Args:
    size: number of ranks.
    k: the most neighbors of a rank in a round.

  Returns:
    A symmetric, doubly stochastic `Schedule`, exact after its period, which is
    at most `2 log(size) / log(k + 1) + 2`.

  Raises:
    ValueError: if `size < 1` or `k < 1`.

  Example:
    >>> [len(base_k(size, k=1)) for size in (6, 7, 12, 24)]
    [4, 5, 5, 6]

  Source: Y. Takezawa et al., "Beyond exponential graph", arXiv 2305.11420,
  the base-(k+1) graph.
  """
  size, k = _sizes(size, k)
  # Ranks are pairs (a, b) with a < p and b < q: first the mean over b in all p
  # groups at once, then over a. p has no factor above k + 1, so the second part
  # is exact with at most k neighbors; only q needs the longer construction.
  p = math.prod(_smooth_factors(size, k + 1))
  q = size // p
  candidate = [
    *(np.kron(np.eye(p), matrix) for matrix in _simple_base(q, k)),
    *(
      np.kron(matrix, np.eye(q))
      for matrix in _hyper_hypercube(_radices(p, largest=k + 1))
    ),
  ]
  simple = _simple_base(size, k)
  shorter = simple if len(simple) < len(candidate) else candidate
  return _schedule(size, shorter)


class Hop(NamedTuple):
  """One round of `ExactAverage`: every rank sends to `rank + shift`.

  Example:
    >>> ExactAverage(3).rounds[1]
    Hop(shift=1, send_inclusive=False)
  """

  shift: int  # rank i receives from (i - shift) mod size
  send_inclusive: bool  # whether S travels, the sum with the own value, or T


@dataclasses.dataclass(frozen=True, repr=False)
class ExactAverage:
  """A protocol that gives every rank the mean, for every size.

  Each rank keeps two sums over itself and the ranks behind it, starting from
  `S = x` and `T = 0`: `S` includes its own value, `T` does not. In each of the
  `ceil(log2(size))` rounds every rank sends one of the two, receives `R` from
  `rank - shift`, and adds it to both: `S += R`, `T += R`. Finally `S / size`
  is the mean.

  The protocol is not a product of matrices acting on `x` alone, so functions of
  a graph for single steps of averaging do not take it.

  Args:
    size: number of ranks.

  Raises:
    ValueError: if `size < 1`.

  Example:
    >>> protocol = ExactAverage(5)
    >>> protocol
    ExactAverage(size=5, rounds=3)
    >>> len(protocol)
    3
    >>> protocol.reduce([1.0, 2.0, 3.0, 4.0, 10.0])
    array([4., 4., 4., 4., 4.])

  Source: the idea of L. Ding et al., "DSGD-CECA: Decentralized SGD with
  communication-optimal exact consensus algorithm", 2023, arXiv 2306.00256.
  """

  size: int

  def __post_init__(self) -> None:
    object.__setattr__(self, "size", _validation.size(self.size))

  @functools.cached_property
  def rounds(self) -> tuple[Hop, ...]:
    """The hop of each round, the same for all ranks."""
    hops = []
    covered = 1  # ranks that S sums over
    for target in self._targets():
      # S covers `covered` ranks from this one backward, T the same without this
      # one. Sending S from `covered` away doubles what is covered; sending T
      # from one nearer extends it to 2 * covered - 1, for odd targets.
      inclusive = target == 2 * covered
      hops.append(Hop(covered if inclusive else covered - 1, inclusive))
      covered = target
    return tuple(hops)

  def __len__(self) -> int:
    return len(self.rounds)

  def __bool__(self) -> bool:
    return True  # also for a single rank, which has no rounds

  def reduce(self, values: Any) -> np.ndarray:
    """Executes the protocol on the values of all ranks.

    Args:
      values: array of shape `(size, ...)`, one entry per rank.

    Returns:
      An array of the same shape whose every entry is the mean, in float64
      (complex128 for complex values).

    Raises:
      ValueError: if the first axis is not one of `size` entries.

    Example:
      >>> ExactAverage(3).reduce([[0, 1], [0, 2], [3, 3]])
      array([[1., 2.],
             [1., 2.],
             [1., 2.]])
    """
    values = np.asarray(values)
    if values.shape[:1] != (self.size,):
      raise ValueError(
        f"values has shape {values.shape}; its first axis must have one entry "
        f"for each of the {self.size} ranks."
      )
    dtype = np.complex128 if np.iscomplexobj(values) else np.float64
    inclusive = values.astype(dtype)
    exclusive = np.zeros_like(inclusive)
    for shift, send_inclusive in self.rounds:
      sent = inclusive if send_inclusive else exclusive
      # Rank i receives from i - shift. Both sums grow by what came, so T stays
      # S without the own value.
      received = np.roll(sent, shift, axis=0)
      inclusive, exclusive = inclusive + received, exclusive + received
    return inclusive / self.size

  def rounds_to_exact_average(self) -> int:
    """Returns the number of rounds, after which every rank has the mean.

    Example:
      >>> ExactAverage(6).rounds_to_exact_average()
      3
    """
    return len(self)

  def __repr__(self) -> str:
    return f"ExactAverage(size={self.size}, rounds={len(self)})"

  def _targets(self) -> list[int]:
    """`size`, its half rounded up, and so on above 1, in reverse."""
    targets = []
    target = self.size
    # Halved from the top: ceil(log2(size)) targets, each at most twice and at
    # least twice less one the target before, which are the two hops of
    # `rounds`.
    while target > 1:
      targets.append(target)
      target = (target + 1) // 2
    return targets[::-1]


def ceca(size: int) -> ExactAverage:
  """Returns the exact average in `ceil(log2(size))` rounds, for every size.

  Args:
    size: number of ranks.

  Returns:
    An `ExactAverage`, the protocol: one message per rank and round.

  Raises:
    ValueError: if `size < 1`.

  Example:
    >>> ceca(6).rounds
    (Hop(shift=1, send_inclusive=True), Hop(shift=1, send_inclusive=False), \
Hop(shift=3, send_inclusive=True))

  Source: the idea of L. Ding et al., arXiv 2306.00256.
  """
  return ExactAverage(size)


def _sizes(size: int, k: int) -> tuple[int, int]:
  size = _validation.size(size)
  return size, _validation.integer(
    k, "k", 1, "pass the most neighbors of a rank"
  )


def _schedule(size: int, matrices: Iterable[np.ndarray]) -> Schedule:
  """A single rank has nothing to do: one identity round."""
  return Schedule(list(matrices) or [np.eye(size)])


def _smooth_factors(size: int, largest: int) -> list[int]:
  """The prime factors of `size` that are at most `largest`, ascending."""
  factors = []
  for factor in range(2, min(size, largest) + 1):
    while size % factor == 0:
      factors.append(factor)
      size //= factor
  return factors


def _radices(size: int, largest: int) -> list[int]:
  """Divides out `largest`, `largest - 1`, .., 2 in turn, nothing is left."""
  radices = []
  # Large ones first: fewer rounds for the same product.
  for radix in range(largest, 1, -1):
    while size % radix == 0:
      radices.append(radix)
      size //= radix
  assert size == 1, "a prime factor exceeds the largest radix"
  return sorted(radices)


def _hyper_hypercube(radices: Sequence[int]) -> Matrices:
  size = math.prod(radices)
  matrices = []
  stride = 1
  for radix in radices:
    # The mean over one digit of the rank in the mixed radix. Means over
    # different digits commute, and together are the mean over all.
    mean = np.full((radix, radix), 1 / radix)
    inner, outer = np.eye(stride), np.eye(size // (stride * radix))
    matrices.append(np.kron(outer, np.kron(mean, inner)))
    stride *= radix
  return matrices


class _Part(NamedTuple):
  """The ranks of one digit: `blocks` blocks of `base**power` ranks each."""

  first: int  # its first rank
  blocks: int  # the digit
  block_size: int
  power: int

  @property
  def size(self) -> int:
    return self.blocks * self.block_size


def _simple_base(size: int, k: int) -> Matrices:
  base = k + 1
  if math.prod(_smooth_factors(size, base)) == size:
    return _hyper_hypercube(_radices(size, base))
  # Phases: every part averages within itself; then part after part exchanges
  # with all later ones, so that each of its blocks has the mean of all ranks;
  # its blocks average within themselves, beside the exchanges of later parts.
  parts = _parts(size, base)
  whole = [_hyper_hypercube(_radices(part.size, base)) for part in parts]
  block = [_hyper_hypercube([base] * part.power) for part in parts]
  # Rounds of the first part within itself: one for each power of the base, and
  # one over its blocks.
  alone = parts[0].power + (parts[0].blocks > 1)
  matrices = []
  for t in range(alone + 1 + parts[0].power):
    matrix = np.eye(size)
    for index, part in enumerate(parts):
      since = t - alone - index  # rounds since the exchange with later parts
      if t < min(alone, len(whole[index])):
        _put(matrix, part.first, whole[index][t])
      elif index == len(parts) - 1:
        continue  # no part is later, nothing left to do
      elif since == 0:
        _exchange(matrix, part)
      elif 1 <= since <= part.power:
        for b in range(part.blocks):
          first = part.first + b * part.block_size
          _put(matrix, first, block[index][since - 1])
    matrices.append(matrix)
  return matrices


def _parts(size: int, base: int) -> list[_Part]:
  """Cuts the ranks by the nonzero digits of `size`, the highest first."""
  parts = []
  power = 0
  while base ** (power + 1) <= size:
    power += 1
  first = 0
  for p in range(power, -1, -1):
    # The digit of this power; the higher ones are cut off already.
    blocks = (size - first) // base**p
    if blocks:
      parts.append(_Part(first, blocks, base**p, p))
      first += parts[-1].size
  return parts


def _put(matrix: np.ndarray, first: int, block: np.ndarray) -> None:
  last = first + len(block)
  matrix[first:last, first:last] = block


def _exchange(matrix: np.ndarray, part: _Part) -> None:
  """Moves the mean of every block of `part` to that of it and later parts."""
  # Rank c of the later parts meets rank c of each block: at most `blocks`
  # neighbors. There are enough, for the later parts hold fewer ranks than one
  # block.
  total = len(matrix) - part.first
  weight = part.size / (total * part.blocks)
  for c, i in enumerate(range(part.first + part.size, len(matrix))):
    matrix[i, i] = 1 - part.size / total
    for b in range(part.blocks):
      j = part.first + b * part.block_size + c
      matrix[i, j] = matrix[j, i] = weight
      matrix[j, j] = 1 - weight
