"""Dense NumPy truth that shares no code with the library."""

import functools

import numpy as np


def assert_close(actual, desired, tolerance=1e-12):
  """Asserts equality up to an absolute tolerance."""
  np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance)


def mixing(graph, step=0):
  """The matrix that the accessors of `graph[step]` describe, rank by rank."""
  topology = graph[step]
  matrix = np.zeros((graph.size, graph.size))
  for rank in range(graph.size):
    matrix[rank, rank] = topology.self_weight(rank)
    for src, weight in topology.src_weights(rank).items():
      matrix[rank, src] = weight
  return matrix


def mean(size):
  """The matrix of the exact average."""
  return np.ones((size, size)) / size


def product(matrices):
  """`M_last ... M_1 M_0`."""
  return functools.reduce(lambda done, matrix: matrix @ done, matrices)


def circulant(size, shifts):
  """`W[i, i - s] += shifts[s]`, as a sum of rolled identities."""
  return sum(
    weight * np.roll(np.eye(size), shift, axis=0)
    for shift, weight in shifts.items()
  )


def circulant_gap(size, shifts):
  """`1 - |lambda_2|` by the sum of exponentials."""
  k = np.arange(1, size)
  values = sum(
    weight * np.exp(-2j * np.pi * k * shift / size)
    for shift, weight in shifts.items()
  )
  return 1 - np.abs(values).max() if size > 1 else 1.0


def contraction(matrix):
  """`||W - J||_2`, by singular values."""
  return np.linalg.norm(matrix - mean(len(matrix)), 2)


def metropolis(edges):
  """Metropolis-Hastings weights of undirected edges, entry by entry."""
  size = len(edges)
  degree = [sum(bool(edges[i][j]) for j in range(size)) for i in range(size)]
  matrix = np.zeros((size, size))
  for i in range(size):
    for j in range(size):
      if edges[i][j]:
        matrix[i, j] = 1 / (1 + max(degree[i], degree[j]))
  for i in range(size):
    matrix[i, i] = 1 - sum(matrix[i])
  return matrix


def is_strongly_connected(matrix):
  """Whether all entries of a high power of `I + |W|` are positive."""
  size = len(matrix)
  step = ((np.abs(matrix) > 0) | np.eye(size, dtype=bool)).astype(float)
  reach = step
  for _ in range(size.bit_length() + 1):
    reach = (reach @ reach > 0).astype(float)
  return bool(reach.all())


def is_stochastic(matrix, axis):
  """Whether all sums along `axis` are 1."""
  return bool(np.allclose(np.sum(matrix, axis=axis), 1.0, rtol=0, atol=1e-12))


def powers_below(size, base):
  """1, `base`, `base**2`, .. below `size`."""
  return [base**p for p in range(64) if base**p < size]


# Local optimizers: each is a function of all ranks' gradients and parameters,
# one row for each rank, to all ranks' updates; its state is in its closure.


def sgd(rate, momentum=0.0, nesterov=False):
  """Gradient descent; `m <- g + b m`."""
  trace = 0.0

  def update(g, x):
    nonlocal trace
    del x
    trace = g + momentum * trace
    return -rate * (g + momentum * trace if nesterov else trace)

  return update


def adam(rate, decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
  """Adam, and AdamW where `decay` is not zero."""
  first, second, count = 0.0, 0.0, 0

  def update(g, x):
    nonlocal first, second, count
    count += 1
    first = b1 * first + (1 - b1) * g
    second = b2 * second + (1 - b2) * g**2
    scaled = np.sqrt(second / (1 - b2**count)) + eps
    return -rate * (first / (1 - b1**count) / scaled + decay * x)

  return update


def clipped(bound, inner):
  """Scales every rank's gradient to a norm of `bound` at most."""

  def update(g, x):
    norm = np.sqrt((g**2).sum(axis=1, keepdims=True))
    return inner(np.where(norm > bound, g * bound / norm, g), x)

  return update


# Decentralized optimizers: all iterates of all ranks, the start left out.


def adapt_then_combine(inner, matrices, gradient, x, steps, every=1):
  """`X <- W (X + U)`; the matrix is that of the t-th communication."""
  iterates = []
  for k in range(steps):
    x = x + inner(gradient(x), x)
    if (k + 1) % every == 0:
      x = matrices[k // every % len(matrices)] @ x
    iterates.append(x)
  return np.array(iterates)


def adapt_with_combine(inner, matrices, gradient, x, steps, every=1):
  """`X <- W X + U`."""
  iterates = []
  for k in range(steps):
    matrix = matrices[k // every % len(matrices)]
    combined = matrix @ x if (k + 1) % every == 0 else x
    x = combined + inner(gradient(x), x)
    iterates.append(x)
  return np.array(iterates)


def gradient_allreduce(inner, gradient, x, steps, every=1):
  """`X <- X + U`, with `U` of the mean of the gradients of `every` steps."""
  iterates, total = [], 0.0
  for k in range(steps):
    total = total + gradient(x)
    if (k + 1) % every == 0:
      x = x + inner(mean(len(x)) @ total / every, x)
      total = 0.0
    iterates.append(x)
  return np.array(iterates)
