"""Windows against a dense model of all ranks' slots, in every place.

Pretended machines, as in `mpi-3x1`, reach each other by messages instead of memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from support import reference

import jfog
from jfog import topology

ROUNDS = 6


class Model:
  """The windows of all ranks, with a queue of messages for each edge.

  What is exposed and what lies in a slot are rows whose last entry is p.
  """

  def __init__(self, graph, x, zero_init=False, delay=0):
    n = graph.size
    self.edges = reference.mixing(graph) != 0  # [dst, src], without loops
    np.fill_diagonal(self.edges, False)
    self.exposed = np.column_stack([x, np.ones(n)])
    self.slots = np.zeros((n, n, self.exposed.shape[1]))
    if not zero_init:
      self.slots += self.edges[:, :, None] * self.exposed[:, None]
    self.versions = np.zeros((n, n), int)
    delay = np.asarray(delay)
    period = len(delay) if delay.ndim == 3 else 1
    self.delay = np.broadcast_to(delay, (period, n, n))
    self.time = 0
    self.queues = {tuple(edge): [] for edge in np.argwhere(self.edges)}

  @property
  def p(self):
    return self.exposed[:, -1]

  def send(self, x, weights, accumulate, to=True):
    rows = np.column_stack([x, self.p])
    to = np.broadcast_to(to, len(rows))
    for dst, src in self.queues:
      if to[dst]:
        self._post(dst, src, weights[dst, src] * rows[src], accumulate)
    self._deliver()

  def get(self, weights, of=True):
    of = np.broadcast_to(of, len(self.exposed))
    for dst, src in self.queues:
      if of[src]:
        value = weights[dst, src] * self.exposed[src]
        self._post(dst, src, value, False)
    self._deliver()

  def update(self, x, self_weights, weights, of=True, reset=False):
    reads = self.edges & of
    rows = np.column_stack([x, self.p])
    received = np.einsum("ij,ijk->ik", weights * reads, self.slots)
    self.exposed = np.asarray(self_weights)[:, None] * rows + received
    self.versions[reads] = 0
    if reset:
      self.slots[reads] = 0
    if reads.any():
      self.time += 1
      self._deliver()
    return self.exposed[:, :-1]

  def _post(self, dst, src, value, accumulate):
    queue = self.queues[dst, src]
    arrival = self.time + self.delay[self.time % len(self.delay), dst, src]
    if queue:
      arrival = max(arrival, queue[-1][0])
    queue.append((arrival, value, accumulate))

  def _deliver(self):
    for edge, queue in self.queues.items():
      while queue and queue[0][0] <= self.time:
        _, value, accumulate = queue.pop(0)
        self.slots[edge] = self.slots[edge] * accumulate + value
        self.versions[edge] += 1


def random_graph(n, axis):
  """Directed and irregular; sums along `axis` are 1, and one rank keeps nothing."""
  rng = np.random.RandomState(n)
  edges = (rng.rand(n, n) < 0.4) | np.eye(n, dtype=bool)
  edges |= np.roll(np.eye(n, dtype=bool), 1, axis=0)
  edges[0, 0] = n == 1
  weights = edges * (0.1 + rng.rand(n, n))
  return topology.Topology(weights / weights.sum(axis=axis, keepdims=True))


def scenarios(place):
  """Graphs, dtypes, whether slots start as zeros, and delays."""
  n = place.size
  rows, columns = random_graph(n, 1), random_graph(n, 0)
  delay = np.random.RandomState(7).randint(0, 4, (3, n, n))
  single = (rows, np.float32, False, 0)
  double = (columns, np.float64, True, 0 if place.kind == "mpi" else delay)
  # Delays are the same on a mesh, where they take long to compile.
  found = {"mesh": [single], "simulate": [double]}
  return found.get(place.kind, [single, double])


def create(x, graph, delay, **options):
  """A window; between processes there is no delay to be given."""
  if np.any(delay):
    options["delay"] = delay
  return jfog.win_create(x, graph, **options)


def free(win):
  """Frees a window when all ranks are done with it."""
  jfog.barrier()
  jfog.win_free(win)


def neighbors(ends):
  """This rank's neighbors; on a mesh, where all give one dict, those of any."""
  rank = jfog.rank()
  ranks = [rank] if isinstance(rank, int) else range(jfog.size())
  return sorted({neighbor for rank in ranks for neighbor in ends(rank)})


def some(ends, weights):
  """A dict of weights of those neighbors that are even."""
  return {r: weights[r] for r in neighbors(ends) if r % 2 == 0}


def close(actual, desired, tolerance):
  scale = max(1.0, np.abs(np.asarray(desired)).max(initial=0))
  np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * scale)


def window_axis(place):
  """Where ranks are stacked; between processes a window is one rank's."""
  return 0 if place.kind in ("simulate", "mesh") else None


# Any operations in any order.


def operations(graph):
  """Pairs `(what a rank does, what the model does)`."""
  matrix = reference.mixing(graph)
  even = np.arange(graph.size) % 2 == 0
  ones = np.ones_like(matrix)

  def put(win, v, self_weight, w):
    return v, jfog.win_put(win, v, dst_weights=w[:, jfog.rank()])

  def accumulate(win, v, self_weight, w):
    return v, jfog.win_accumulate(win, v, dst_weights=0.25)

  def accumulate_to_some(win, v, self_weight, w):
    weights = some(graph.out_neighbors, w[:, jfog.rank()])
    return v, jfog.win_accumulate(win, v, dst_weights=weights)

  def get_of_some(win, v, self_weight, w):
    weights = some(graph.in_neighbors, w[jfog.rank()])
    return v, jfog.win_get(win, src_weights=weights)

  def update(win, v, self_weight, w):
    return jfog.win_update(win, v)

  def update_of_some(win, v, self_weight, w):
    weights = some(graph.in_neighbors, w[jfog.rank()])
    return jfog.win_update(win, v, self_weight=self_weight, src_weights=weights)

  def only_look(win, v, self_weight, w):
    y, win = jfog.win_update(win, v, expose=False)
    return jnp.append(y[:-1], v[-1]), win  # p stays

  def only_expose(win, v, self_weight, w):
    return jfog.win_update(win, v, self_weight=1, src_weights={})

  def reset(win, v, self_weight, w):
    return jfog.win_update(
      win, v, self_weight=self_weight, src_weights=w[jfog.rank()], reset=True
    )

  def collect(win, v, self_weight, w):
    return jfog.win_update_then_collect(win, v)

  def model_look(model, x, s, w):
    before = model.exposed
    y = model.update(x, matrix.diagonal(), matrix)
    model.exposed = before
    return np.column_stack([y[:, :-1], x[:, -1]])

  return [
    (put, lambda model, x, s, w: model.send(x, w, False)),
    (accumulate, lambda model, x, s, w: model.send(x, ones / 4, True)),
    (accumulate_to_some, lambda model, x, s, w: model.send(x, w, True, even)),
    (get_of_some, lambda model, x, s, w: model.get(w, even)),
    (
      update,
      lambda model, x, s, w: model.update(x, matrix.diagonal(), matrix),
    ),
    (update_of_some, lambda model, x, s, w: model.update(x, s, w, even)),
    (only_look, model_look),
    (only_expose, lambda model, x, s, w: model.update(x, ones[0], w, False)),
    (reset, lambda model, x, s, w: model.update(x, s, w, reset=True)),
    (
      collect,
      lambda model, x, s, w: model.update(x, ones[0], ones, reset=True),
    ),
  ]


def interleaved(graph, kinds, zero_init, delay):
  """A program of one rank: the operations `kinds`, round after round."""
  table = operations(graph)

  def program(x, noise, self_weights, weights):
    win = create(x, graph, delay, zero_init=zero_init, associated_p=True)

    def one_round(carry, inputs):
      win, x = carry
      results = []
      for k, kind in enumerate(kinds):
        noise, self_weights, weights = (values[k] for values in inputs)
        operation, _ = table[kind]
        x, win = operation(win, x + noise, self_weights[jfog.rank()], weights)
        jfog.barrier()
        results.append((x, jfog.win_associated_p(win), jfog.win_version(win)))
        jfog.barrier()  # before the next writes
      return (win, x), results

    inputs = noise, self_weights, weights
    (win, _), results = lax.scan(one_round, (win, x), inputs)
    free(win)
    return results

  return program


def interleaved_by_model(graph, kinds, zero_init, delay, arguments):
  """The same of all ranks."""
  x, noise, self_weights, weights = arguments
  table = operations(graph)
  model = Model(graph, x, zero_init, delay)
  results = []
  for r in range(ROUNDS):
    for k, kind in enumerate(kinds):
      x = x + noise[:, r, k]
      y = table[kind][1](model, x, self_weights[r, k], weights[r, k])
      x = x if y is None else y
      results.append((x, model.p.copy(), model.versions.copy()))
  # [operation][x, p, versions], and then by rank and round, as the program's.
  return [
    [
      np.stack(parts, axis=1)
      for parts in zip(*results[k :: len(kinds)], strict=True)
    ]
    for k in range(len(kinds))
  ]


@pytest.mark.mpi(2, "3x1")
def test_any_interleaving_is_the_models(place, x64, rng):
  n = place.size
  for graph, dtype, zero_init, delay in scenarios(place):
    kinds = rng.permutation(len(operations(graph)))
    x = rng.randn(n, 4).astype(dtype)
    noise = rng.randn(n, ROUNDS, len(kinds), 4).astype(dtype)
    # The last entry goes along with p.
    x[..., -1] = 1
    noise[..., -1] = 0
    self_weights = rng.rand(ROUNDS, len(kinds), n)
    weights = rng.rand(ROUNDS, len(kinds), n, n) / n
    arguments = x, noise, self_weights, weights
    scenario = graph, kinds, zero_init, delay
    run = jax.jit(place.map(interleaved(*scenario), (0, 0, None, None)))
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for (y, p, versions), truth in zip(
      run(*arguments), interleaved_by_model(*scenario, arguments), strict=True
    ):
      assert y.dtype == p.dtype == dtype
      close(y, place.mine(truth[0]), tolerance)
      close(p, place.mine(truth[1]), tolerance)
      np.testing.assert_array_equal(versions, place.mine(truth[2]))
      # p undergoes the arithmetic of the data, bit for bit.
      np.testing.assert_array_equal(y[..., -1], p)


@pytest.mark.mpi("4x2")
def test_push_sum_finds_the_average_and_loses_nothing(place, x64, rng):
  n = place.size
  graph = random_graph(n, 0)
  x = rng.randn(n, 3)
  columns = rng.rand(80, 2, n, n)  # of weights [dst, src]; half is sent at most
  columns *= (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  columns /= 2 * columns.sum(axis=2, keepdims=True).clip(1)
  delay = np.asarray(2)
  if place.kind == "simulate":
    delay = rng.randint(0, 4, (n, n))
  if place.kind == "mpi":
    delay = np.asarray(0)

  def program(x, columns):
    win = create(x, graph, delay, zero_init=True, associated_p=True)

    def update(win, x, keeps, src_weights):
      jfog.barrier()
      x, win = jfog.win_update(
        win, x, self_weight=keeps, src_weights=src_weights, reset=True
      )
      jfog.barrier()
      return x, win

    def step(carry, columns):
      win, x = carry
      first, second = columns[:, :, jfog.rank()]
      win = jfog.win_accumulate(win, x, dst_weights=first)
      of_some = some(graph.in_neighbors, np.ones(n, int))
      x, win = update(win, x, 1 - first.sum(), of_some)
      win = jfog.win_accumulate(win, x, dst_weights=second)
      win = jfog.win_accumulate(win, x, dst_weights=second)
      x, win = update(win, x, 1 - 2 * second.sum(), 1)
      return (win, x), None

    (win, x), _ = lax.scan(step, (win, x), columns)
    for _ in range(np.max(delay) + 1):  # what is still on its way
      x, win = jfog.win_update_then_collect(win, x)
    p = jfog.win_associated_p(win)
    free(win)
    return x, p, jfog.allreduce((x, p), "sum")

  run = jax.jit(place.map(program, (0, None)))
  y, p, (total, mass) = run(x, columns)
  mean = x.mean(axis=0)
  np.testing.assert_allclose(mass, n, rtol=1e-12)
  np.testing.assert_allclose(total - n * mean, 0 * total, atol=1e-11)
  np.testing.assert_allclose(y / p[..., None], 0 * y + mean, atol=1e-8)


# Each operation by itself.


def uniform_graph(n):
  """Directed and irregular; each rank takes the mean of what it has."""
  edges = random_graph(n, 1).mixing_matrix != 0
  edges = edges | np.eye(n, dtype=bool)
  return topology.Topology(edges / edges.sum(axis=1, keepdims=True))


@pytest.mark.two_axes
@pytest.mark.mpi(3, 4)
def test_each_operation(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x, new = rng.randn(2, n, 3).astype(np.float32)

  @jax.jit
  def program(x, new):
    found = {}
    win = jfog.win_create(x, graph, zero_init=True)
    found["zeros"], win = jfog.win_update(
      win, new, self_weight=0, src_weights=1
    )
    jfog.barrier()
    win = jfog.win_get(win)  # of what the update has exposed
    jfog.barrier()
    found["got zeros"], win = jfog.win_update(win, new, src_weights=1)
    free(win)

    win = jfog.win_create(x, graph)
    found["copies"], win = jfog.win_update(win, x)
    jfog.barrier()
    win = jfog.win_get(win, src_weights=2)
    jfog.barrier()
    found["twice what was got"], win = jfog.win_update(
      win, new, self_weight=0, src_weights=1
    )
    jfog.barrier()
    win = jfog.win_put(jfog.win_put(win, x), new)
    jfog.barrier()
    found["written twice"] = jfog.win_version(win)
    found["mean"], win = jfog.win_update(win, new)
    found["of the same slots"], win = jfog.win_update(win, new)
    found["read"] = jfog.win_version(win)
    jfog.barrier()
    win = jfog.win_accumulate(win, new, dst_weights=2)
    jfog.barrier()
    found["put and accumulated"], win = jfog.win_update_then_collect(win, new)
    found["collected before"], win = jfog.win_update_then_collect(win, new)
    free(win)
    return found

  matrix = reference.mixing(graph)
  edges = (matrix != 0) & ~np.eye(n, dtype=bool)
  truth = {
    "zeros": 0 * x,
    "got zeros": matrix.diagonal()[:, None] * new,
    "copies": x,
    "twice what was got": 2 * edges @ x,
    "written twice": 2 * edges,
    "mean": matrix @ new,
    "of the same slots": matrix @ new,
    "read": 0 * edges,
    "put and accumulated": new + 3 * edges @ new,
    "collected before": new,
  }
  found = place.run(program, x, new)
  assert found.keys() == truth.keys()
  for name, value in truth.items():
    np.testing.assert_allclose(
      found[name], place.mine(value), rtol=1e-5, atol=1e-5, err_msg=name
    )
  np.testing.assert_array_equal(found["copies"], place.mine(x))


@pytest.mark.mpi(3, "3x1")
def test_dtypes_and_pytrees(place, x64, rng):
  n = place.size
  graph = random_graph(n, 1)
  edges = (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  values = rng.randint(-9, 10, (n, 2, 3))
  fractions = {
    "half": np.asarray(jnp.asarray(values, jnp.float16)),
    "brain": np.asarray(jnp.asarray(values, jnp.bfloat16)),
    "single": values.astype(np.float32),
    "double": (values.astype(np.float64), None),
    "complex": (values + 2j * values[:, ::-1]).astype(np.complex64),
    "scalar": values[:, 0, 0].astype(np.float32),
    "empty": np.zeros((n, 0, 2), np.float16),
  }
  integers = [
    (100 * values).astype(dtype)  # the small ones wrap around
    for dtype in (np.int8, np.uint8, np.int32, np.int64)
  ]
  weights = {"fractions": 0.5, "integers": 3}
  trees = {"fractions": fractions, "integers": integers}

  @jax.jit
  def program(trees):
    found = {}
    for name, x in trees.items():
      win = jfog.win_create(x, graph, associated_p=True)
      win = jfog.win_get(win, src_weights=weights[name])
      jfog.barrier()
      win = jfog.win_accumulate(win, x)
      jfog.barrier()
      y, win = jfog.win_update(win, x, self_weight=2, src_weights=-1)
      found[name] = y, jfog.win_associated_p(win)
      free(win)
    return found

  def truth(x, weight):
    kind = {"i": np.int64, "u": np.int64, "c": np.complex128}
    wide = x.reshape(n, -1).astype(kind.get(x.dtype.kind, np.float64))
    received = ((1 + weight) * edges).astype(wide.real.dtype) @ wide
    return (2 * wide - received).reshape(x.shape)

  def check(actual, x, wide):
    assert actual.dtype == x.dtype
    eps = 0 if x.dtype.kind in "iu" else jnp.finfo(x.dtype).eps
    rounded = wide.astype(x.dtype).astype(wide.dtype)
    actual = np.asarray(actual).astype(wide.dtype)
    reference.assert_close(actual, rounded, 200 * float(eps))

  for name, (y, p) in place.run(program, trees).items():
    x, weight = trees[name], weights[name]
    assert jax.tree.structure(y) == jax.tree.structure(x)
    wide = jax.tree.map(lambda x, w=weight: truth(x, w), x)
    jax.tree.map(check, y, place.mine(x), place.mine(wide))
    assert p.dtype == (np.float64 if name == "fractions" else np.float32)
    np.testing.assert_allclose(p, place.mine(truth(np.ones(n), weight)))


@pytest.mark.mpi(2, "3x1")
def test_a_weight_of_one_returns_the_bits(place):
  graph = topology.ring(place.size, "right")
  real = np.array([-0.0, 0.0, np.inf, -np.inf, 1e4], np.float32)
  pairs = np.stack([real, real[::-1]], axis=1).copy()
  x = {
    "real": real,
    "half": real.astype(np.float16),
    "complex": pairs.view(np.complex64)[:, 0],
  }
  x = jax.tree.map(lambda x: np.tile(x, (place.size, 1)), x)

  @jax.jit
  def program(x):
    win = jfog.win_put(jfog.win_create(x, graph, zero_init=True), x)
    jfog.barrier()
    y, win = jfog.win_update(win, x, self_weight=0, src_weights=1)
    jfog.barrier()
    win = jfog.win_get(win)
    jfog.barrier()
    z, win = jfog.win_update(win, x, self_weight=0, src_weights=1)
    free(win)
    return y, z

  if place.size > 1:
    for found in place.run(program, x):
      for key, value in place.mine(x).items():
        np.testing.assert_array_equal(
          np.asarray(found[key]).view(np.uint8), value.view(np.uint8)
        )


# Windows as values.


@pytest.mark.mpi(3)
def test_a_window_crosses_jit_and_is_traced_once(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x = rng.randn(n, 3).astype(np.float32)
  traces = 0

  def create_(x):
    return jfog.win_create(x, graph, associated_p=True)

  def step(win, x):
    nonlocal traces
    traces += 1
    win = jfog.win_put(win, x)
    jfog.barrier()
    y, win = jfog.win_update(win, x)
    jfog.barrier()
    return y, win

  axis = window_axis(place)
  win = jax.jit(place.map(create_))(x)
  assert win.topology is graph
  assert "1 leaf" in repr(win)
  step = jax.jit(place.map(step, (axis, axis)))
  y = place.mine(x)
  for k in range(1, 5):
    y, win = step(win, y)
    truth = np.linalg.matrix_power(reference.mixing(graph), k) @ x
    np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)
  # The first arguments lie elsewhere than what a mesh returns.
  assert traces == (2 if place.kind == "mesh" else 1)
  if axis is None:
    free(win)


@pytest.mark.mpi(3, "3x1")
def test_split_forms(place, rng):
  n = place.size
  graph = uniform_graph(n)
  x = rng.randn(n, 3).astype(np.float32)

  @jax.jit
  def program(x):
    win = jfog.win_create({"a": x}, graph, zero_init=True)
    handle = jfog.win_put_start(win, {"a": x}, dst_weights=0.5)
    may_wait = [jfog.poll(handle)]
    win = jfog.wait(handle)
    jfog.barrier()
    handle = jfog.win_accumulate_start(win, {"a": x})
    may_wait.append(jfog.poll(handle))
    win = jfog.wait(handle)
    jfog.barrier()
    y, win = jfog.win_update_then_collect(win, {"a": x})
    jfog.barrier()
    handle = jfog.win_get_start(win, src_weights=0.5)
    may_wait.append(jfog.poll(handle))
    win = jfog.wait(handle)
    jfog.barrier()
    z, win = jfog.win_update_then_collect(win, y)
    free(win)
    return y["a"], z["a"], may_wait

  y, z, may_wait = place.run(program, x)
  edges = (reference.mixing(graph) != 0) & ~np.eye(n, dtype=bool)
  truth = x + 1.5 * edges @ x
  np.testing.assert_allclose(y, place.mine(truth), rtol=1e-5, atol=1e-5)
  truth = truth + 0.5 * edges @ truth
  np.testing.assert_allclose(z, place.mine(truth), rtol=1e-5, atol=1e-5)
  for answer in may_wait:
    assert answer.dtype == bool
    assert place.kind == "mpi" or np.all(answer)


@pytest.mark.places("mesh")
def test_in_a_shard_map_that_checks_varying_types(place, x64, rng):
  n = place.size
  graph = random_graph(n, 1)
  x = rng.randn(n, 3)

  def program(x):
    win = jfog.win_create(x, graph, delay=1, associated_p=True)

    def step(carry, _):
      win, x = carry
      win = jfog.win_accumulate(win, x, dst_weights=0.5)
      x, win = jfog.win_update(jfog.win_get(win), x, reset=True)
      return (win, x), jfog.win_version(win)

    (win, x), versions = lax.scan(step, (win, x), length=5)
    return x, jfog.win_associated_p(win), versions

  def body(x):
    return jax.tree.map(lambda y: y[None], program(x[0]))

  own = PartitionSpec("jfog")
  run = jax.shard_map(
    body,
    mesh=Mesh(np.array(jax.devices()), ("jfog",)),
    in_specs=own,
    out_specs=own,
    check_vma=True,
  )
  model, y, versions = Model(graph, x, delay=1), x, []
  matrix = reference.mixing(graph)
  for _ in range(5):
    model.send(y, 0.5 * np.ones((n, n)), True)
    model.get(np.ones((n, n)))
    y = model.update(y, matrix.diagonal(), matrix, reset=True)
    versions.append(model.versions.copy())
  actual = jax.jit(run)(x)
  close(actual[0], y, 1e-12)
  close(actual[1], model.p, 1e-12)
  np.testing.assert_array_equal(actual[2], np.stack(versions, axis=1))


# Arguments.


@pytest.mark.mpi(2)
def test_bad_arguments(place, rng):
  n = place.size
  graph = topology.ring(n)
  x = rng.randn(n, 3).astype(np.float32)
  schedule = topology.one_peer_exponential(n)

  def raises(error, text, fun):
    # Before anything is communicated or compiled.
    with pytest.raises(error, match=text):
      jax.eval_shape(place.map(lambda x: fun(jfog.win_create(x, graph), x)), x)

  for operation in (
    lambda x: jfog.win_put(x, x),
    lambda x: jfog.win_accumulate(x, x),
    jfog.win_get,
    lambda x: jfog.win_update(x, x),
    lambda x: jfog.win_update_then_collect(x, x),
    jfog.win_version,
    jfog.win_associated_p,
    jfog.win_free,
    lambda x: jfog.win_mutex(x).__enter__(),
    lambda x: jfog.win_put_start(x, x),
  ):
    raises(TypeError, "not a window", lambda win, x, f=operation: f(x))

  def write_after_the_end(win, x):
    jfog.win_free(win)
    jfog.win_put(win, x)

  raises(ValueError, "was freed", write_after_the_end)

  for operation in (
    jfog.win_put,
    jfog.win_accumulate_start,
    jfog.win_update,
    jfog.win_update_then_collect,
  ):
    for wrong, text in (
      (lambda x: {"a": x}, "structure"),
      (lambda x: x[1:], "shape"),
      (lambda x: x.astype(jnp.float16), "dtype float16"),
    ):
      raises(
        ValueError, text, lambda win, x, f=operation, w=wrong: f(win, w(x))
      )

  for error, text, weights in (
    (ValueError, "not an out-neighbor", {n: 1.0}),
    (TypeError, "keys are ranks", {0.5: 1.0}),
    (TypeError, "keys are ranks", {True: 1.0}),
    (ValueError, "shape", np.ones(n + 1)),
    (ValueError, "shape", np.ones((n, 1))),
    (TypeError, "real numbers", True),
    (TypeError, "real numbers", 1j),
  ):
    raises(
      error,
      text,
      lambda win, x, w=weights: jfog.win_put(win, x, dst_weights=w),
    )
    raises(
      error,
      text.replace("out", "in"),
      lambda win, x, w=weights: jfog.win_update(win, x, src_weights=w),
    )
  raises(
    ValueError,
    "self_weight has shape",
    lambda win, x: jfog.win_update(win, x, self_weight=np.ones(2)),
  )
  if n > 1:
    raises(
      ValueError,
      "pass a scalar",
      lambda win, x: jfog.win_get(
        win,
        src_weights=dict.fromkeys(neighbors(graph.in_neighbors), np.ones(1)),
      ),
    )
  raises(
    ValueError,
    "win_associated_p: this window has none",
    lambda win, x: jfog.win_associated_p(win),
  )

  def whole(operation):
    return lambda win, x: operation(
      jfog.win_create(x.astype(int), graph), x.astype(int)
    )

  for operation in (
    lambda win, x: jfog.win_put(win, x, dst_weights=0.5),
    lambda win, x: jfog.win_get(win, src_weights=np.full(n, 0.5)),
    jfog.win_update,
  ):
    raises(TypeError, "truncates fractions", whole(operation))

  for error, text, wrong in (
    (TypeError, "Schedule", schedule),
    (TypeError, "ndarray", graph.mixing_matrix),
    (ValueError, f"{n + 1} ranks", topology.ring(n + 1)),
  ):
    raises(error, text, lambda win, x, g=wrong: jfog.win_create(x, g))
  raises(TypeError, "bool", lambda win, x: jfog.win_create(x > 0, graph))
  raises(TypeError, "str", lambda win, x: jfog.win_create("x", graph))
  wrong_delays = (
    (TypeError, "float", 0.5),
    (TypeError, "bool", True),
    (ValueError, "-1", -1),
    (ValueError, "shape", np.ones(n, int)),
    (ValueError, "shape", np.ones((n, n + 1), int)),
    (ValueError, "shape", np.ones((0, n, n), int)),
  )
  if place.kind == "mpi":
    wrong_delays = ((ValueError, "between processes", 1),)
  else:
    raises(
      TypeError, "traced", lambda win, x: jfog.win_create(x, graph, delay=x[0])
    )
  for error, text, delay in wrong_delays:
    raises(
      error, text, lambda win, x, d=delay: jfog.win_create(x, graph, delay=d)
    )


@pytest.mark.places("single", "mpi-2")
def test_a_mutex(place):
  n = place.size
  win = jfog.win_create(jnp.ones(2), topology.ring(n))
  for ranks in (None, [0], range(n), [], [n - 1, 0]):
    with jfog.win_mutex(win, ranks):
      _, win = jfog.win_update(win, jnp.ones(2))
  with pytest.raises(KeyError), jfog.win_mutex(win):
    raise KeyError  # and the mutex is free again
  with jfog.win_mutex(win):
    pass
  wrong: list[tuple[type, Any]] = [
    (ValueError, [n]),
    (ValueError, [-1]),
    (TypeError, [0.5]),
  ]
  for error, ranks in wrong:
    with pytest.raises(error, match="mutex: rank"), jfog.win_mutex(win, ranks):
      pass

  @jax.jit
  def traced(win):
    with jfog.win_mutex(win):
      return win

  with pytest.raises(ValueError, match="around the jitted function"):
    traced(win)
  free(win)


@pytest.mark.places("mpi-2")
def test_neither_derivatives_nor_batches_between_processes(place):
  graph = topology.ring(place.size)
  x = jnp.ones(3)

  def total(x):
    win = jfog.win_put(jfog.win_create(jnp.zeros(3), graph), x)
    return jfog.win_update(win, x)[0].sum()

  with pytest.raises(TypeError, match="win_put has no derivative"):
    jax.make_jaxpr(jax.grad(total))(x)
  with pytest.raises(ValueError, match="win_put under vmap"):
    jax.make_jaxpr(jax.vmap(total))(jnp.ones((2, 3)))
