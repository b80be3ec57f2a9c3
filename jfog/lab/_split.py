"""Splits of a labeled data set among ranks, equal in length and not in content."""

from typing import Any

import numpy as np

from jfog import _validation


def split_by_label(labels: Any, size: int) -> np.ndarray:
  """Sorts examples by label and gives each rank one run of them.

  Rank i gets the elements `i m` to `(i + 1) m - 1` of the order by label, ties in
  the order of the data, with `m = len(labels) // size`. The last
  `len(labels) - m size` are left out. It is the most heterogeneous split.

  Args:
    labels: the label of each example, one-dimensional.
    size: the number of ranks.

  Returns:
    Indices of examples, of shape `(size, m)`.

  Raises:
    ValueError: if there are fewer examples than ranks.

  Example:
    >>> import jfog
    >>> jfog.lab.split_by_label([1, 0, 1, 0], 2).tolist()
    [[1, 3], [0, 2]]
  """
  labels = _check(labels, size)
  return _cut(np.argsort(labels, kind="stable"), size)


def split_shards(
  labels: Any, size: int, shards: int = 2, seed: int = 0
) -> np.ndarray:
  """Gives each rank several runs of the examples sorted by label.

  The order by label is cut into `size * shards` runs of equal length, which are
  dealt out at random, `shards` to a rank.

  Args:
    labels: the label of each example, one-dimensional.
    size: the number of ranks.
    shards: runs for each rank; with k of them a rank has few more than k labels.
    seed: of the random order of the runs.

  Returns:
    Indices of examples, of shape `(size, shards * m)`.

  Raises:
    ValueError: if there are fewer examples than runs.

  Example:
    >>> import jfog
    >>> jfog.lab.split_shards([0, 0, 1, 1, 2, 2, 3, 3], 2).shape
    (2, 4)

  Source: McMahan et al., "Communication-efficient learning of deep networks from
    decentralized data", 2017, section 3.
  """
  _validation.positive(shards, "shards")
  labels = _check(labels, size * shards)
  runs = _cut(np.argsort(labels, kind="stable"), size * shards)
  order = np.random.RandomState(seed).permutation(size * shards)
  return runs[order].reshape(size, -1)


def split_dirichlet(
  labels: Any, size: int, alpha: float, seed: int = 0
) -> np.ndarray:
  """Gives each rank labels in proportions drawn from a Dirichlet distribution.

  Rank by rank, proportions `p ~ Dirichlet(alpha q)` are drawn, `q` being those of
  the whole data; then each of its `m = len(labels) // size` examples has label c
  with probability `p[c]` among the labels that are not used up. A large `alpha`
  gives every rank the whole's proportions, a small one a single label.

  Args:
    labels: the label of each example, one-dimensional.
    size: the number of ranks.
    alpha: the concentration, positive.
    seed: of all draws.

  Returns:
    Indices of examples, each at most once, of shape `(size, m)`.

  Raises:
    ValueError: if `alpha` is not positive, or there are fewer examples than ranks.

  Example:
    >>> import jfog
    >>> labels = [0, 1] * 50
    >>> jfog.lab.split_dirichlet(labels, 4, alpha=0.1).shape
    (4, 25)

  Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data
    distribution for federated visual classification", 2019, section 3.
  """
  labels = _check(labels, size)
  if not alpha > 0:
    raise ValueError(f"split_dirichlet: alpha={alpha} is not positive.")
  rng = np.random.RandomState(seed)
  classes, counts = np.unique(labels, return_counts=True)
  left = [list(rng.permutation(np.flatnonzero(labels == c))) for c in classes]
  share = counts / counts.sum()
  split = []
  for _ in range(size):
    # Through gamma variables: a tiny alpha gives zeros only, which have no sum.
    weights = np.log(rng.gamma(alpha * share + 1)) + np.log(
      rng.uniform(size=len(share))
    ) / (alpha * share)
    own: list[int] = []
    while len(own) < len(labels) // size:
      open_classes = np.array([bool(examples) for examples in left])
      masked = np.where(open_classes, weights, -np.inf)
      chances = np.exp(masked - masked.max())
      chosen = rng.choice(len(classes), p=chances / chances.sum())
      own.append(left[chosen].pop())
    split.append(own)
  return np.array(split)


def _check(labels: Any, parts: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1:
    raise ValueError(
      f"labels have shape {labels.shape}; pass one label for each example."
    )
  _validation.positive(parts, "size")
  if len(labels) < parts:
    raise ValueError(
      f"there are {len(labels)} examples for {parts} parts; take fewer parts."
    )
  return labels


def _cut(order: np.ndarray, parts: int) -> np.ndarray:
  length = len(order) // parts
  return order[: length * parts].reshape(parts, length)
