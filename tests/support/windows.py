"""A dense model of the windows of all ranks, and calls that tests of windows share."""

import numpy as np

import jfog
from jfog import topology
from support import reference


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


def uniform_graph(n):
  """Directed and irregular; each rank takes the mean of what it has."""
  edges = random_graph(n, 1).mixing_matrix != 0
  edges = edges | np.eye(n, dtype=bool)
  return topology.Topology(edges / edges.sum(axis=1, keepdims=True))
