"""Random operations: a call of jfog, and what it computes in dense NumPy.

An operation is drawn with its arguments: a graph, a reduction, a root, lengths. Its
truth shares no code with the library.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfog
from jfog import topology
from soak import graphs, values


@dataclasses.dataclass
class Operation:
  """An operation with its arguments.

  Attributes:
    name: for reports.
    call: from a rank's tree and a step to the result.
    truth: from one leaf of all ranks, stacked, and a step to the leaf of each
      rank's result.
    matrix: from a step to the matrix M of the result M x, where that is the
      operation on inexact leaves; else None.
    start: the split form of `call`, or None.
    inexact: whether it is refused for integers.
    kept: whether results have the shapes of the leaves.
    normal: the derivative of half the squared result of a linear operation that
      has no matrix, as `truth`.
    ordered: whether it is refused for complex leaves.
  """

  name: str
  call: Callable[..., Any]
  truth: Callable[..., Any]
  matrix: Callable[[int], np.ndarray] | None = None
  start: Callable[..., Any] | None = None
  inexact: bool = False
  kept: bool = True
  normal: Callable[..., Any] | None = None
  ordered: bool = False

  @property
  def is_linear(self):
    return self.matrix is not None or self.normal is not None

  def squared(self, x, step):
    """The truth of the transposed operation on the result, of a stacked leaf."""
    if self.normal is not None:
      return self.normal(x, step)
    assert self.matrix is not None
    matrix = self.matrix(step)
    return product(matrix.T, product(matrix, x))


def product(matrix, x):
  """`matrix @ x` over ranks, in double precision, rounded once."""
  return np.tensordot(matrix, values.wide(x), 1).astype(x.dtype)


def _linear(name, call, matrix, start=None, **options):
  return Operation(
    name,
    call,
    lambda x, step: product(matrix(step), x),
    matrix,
    start,
    inexact=True,
    **options,
  )


def neighbor_allreduce(rng, ranks, world):
  graph = graphs.random_topology(rng, ranks)
  if rng.random() < 0.5:
    graph = graphs.random_schedule(rng, ranks)
  known = int(rng.integers(-3, 9)) if rng.random() < 0.3 else None
  weights = None
  if rng.random() < 0.3:
    weights = rng.integers(-4, 5, (ranks, ranks)) / 8

  def arguments(step):
    step = step if known is None else known
    given = weights is not None and {"weights": jnp.asarray(weights, "float32")}
    return (
      graph,
      step if isinstance(graph, topology.Schedule) else None,
    ), given or {}

  def matrix(step):
    dense = graphs.dense(graph, step if known is None else known)
    return dense if weights is None else np.where(dense != 0, weights, 0)

  def call(x, step):
    given, named = arguments(step)
    return jfog.neighbor_allreduce(x, *given, **named)

  def start(x, step):
    given, named = arguments(step)
    return jfog.neighbor_allreduce_start(x, *given, **named)

  kind = type(graph).__name__.lower()
  kind += " with weights" if weights is not None else ""
  return _linear(f"neighbor_allreduce of a {kind}", call, matrix, start)


def peers(rng, ranks, world):
  drawn = graphs.RandomPeers(rng, ranks)
  return _linear(
    "neighbor_allreduce of Peers",
    lambda x, step: jfog.neighbor_allreduce(x, drawn.of(jfog.rank())),
    lambda step: drawn.dense(),
    lambda x, step: jfog.neighbor_allreduce_start(x, drawn.of(jfog.rank())),
  )


def pair_gossip(rng, ranks, world):
  order = [int(r) for r in rng.permutation(ranks)]
  peer_of = list(range(ranks))
  for a, b in zip(order[::2], order[1::2], strict=False):
    peer_of[a], peer_of[b] = b, a
  own, other = (0.5, 0.5) if rng.random() < 0.5 else (0.25, 0.5)
  traced = rng.random() < 0.5

  def peer(step):
    number = peer_of[jfog.rank()]
    return number + 0 * step if traced else number

  def matrix(step):
    dense = own * np.eye(ranks)
    dense[np.arange(ranks), peer_of] += other
    return dense

  weights = {"self_weight": own, "pair_weight": other}
  return _linear(
    "pair_gossip",
    lambda x, step: jfog.pair_gossip(x, peer(step), **weights),
    matrix,
    lambda x, step: jfog.pair_gossip_start(x, peer(step), **weights),
  )


def finite_time_average(rng, ranks, world):
  graph = graphs.exact(rng, ranks)
  return _linear(
    "finite_time_average",
    lambda x, step: jfog.finite_time_average(x, graph),
    lambda step: np.full((ranks, ranks), 1 / ranks),
    lambda x, step: jfog.finite_time_average_start(x, graph),
  )


def hierarchical(rng, ranks, world):
  local = world.local_size
  machines = graphs.random_topology(rng, ranks // local)
  if rng.random() < 0.4:
    machines = graphs.random_schedule(rng, ranks // local)

  def matrix(step):
    return np.kron(
      graphs.dense(machines, step), np.full((local, local), 1 / local)
    )

  def given(step):
    is_schedule = isinstance(machines, topology.Schedule)
    return machines, step if is_schedule else None

  return _linear(
    "hierarchical_neighbor_allreduce",
    lambda x, step: jfog.hierarchical_neighbor_allreduce(x, *given(step)),
    matrix,
    lambda x, step: jfog.hierarchical_neighbor_allreduce_start(x, *given(step)),
  )


def allreduce(rng, ranks, world):
  op = str(rng.choice(["mean", "sum", "min", "max", "prod"]))
  part = str(rng.choice(["world", "world", "local", "machines"]))
  local = world.local_size
  comm = {"world": None, "local": world.local, "machines": world.machines}[part]
  group = {
    "world": [0] * ranks,
    "local": [r // local for r in range(ranks)],
    "machines": [r % local for r in range(ranks)],
  }[part]
  together = np.equal.outer(group, group)

  def matrix(step):
    dense = together.astype(float)
    return dense / dense.sum(axis=1, keepdims=True) if op == "mean" else dense

  def truth(x, step):
    if op in ("sum", "mean") and values.is_inexact(x.dtype):
      return product(matrix(step), x)
    if x.dtype == bool:
      reduce = {"sum": np.any, "max": np.any, "min": np.all, "prod": np.all}[op]
      return np.stack([reduce(x[row], axis=0) for row in together])
    reduce = {"sum": np.sum, "min": np.min, "max": np.max, "prod": np.prod}[op]
    if op in ("min", "max"):
      return np.stack([reduce(x[row], axis=0) for row in together])
    wide = values.wide(x)
    if not values.is_inexact(x.dtype):
      rows = [reduce(wide[row], axis=0, dtype=x.dtype) for row in together]
      return np.stack(rows)
    product_of = np.stack([np.prod(wide[row], axis=0) for row in together])
    # Whether a partial product overflows depends on the order of the ranks.
    partial = np.stack(
      [np.prod(np.maximum(np.abs(wide[row]), 1), axis=0) for row in together]
    )
    product_of[partial > float(jnp.finfo(x.dtype).max) / 4] = np.nan
    return product_of.astype(x.dtype)

  return Operation(
    f"allreduce {op} of the {part}",
    lambda x, step: jfog.allreduce(x, op, comm=comm),
    truth,
    matrix if op in ("sum", "mean") else None,
    lambda x, step: jfog.allreduce_start(x, op, comm=comm),
    inexact=op == "mean",
    ordered=op in ("min", "max"),
  )


def broadcast(rng, ranks, world):
  root = int(rng.integers(ranks))
  traced = rng.random() < 0.5

  def root_of(step):
    return (step + root) % ranks if traced else root

  def matrix(step):
    dense = np.zeros((ranks, ranks))
    dense[:, root_of(step)] = 1
    return dense

  return Operation(
    "broadcast",
    lambda x, step: jfog.broadcast(x, root_of(step)),
    lambda x, step: np.broadcast_to(x[root_of(step)], x.shape),
    matrix,
    lambda x, step: jfog.broadcast_start(x, root_of(step)),
  )


def _shortened(tree, rank, lengths):
  """Leaves with the length of axis 0 of a rank."""
  return jax.tree.map(lambda x: jnp.atleast_1d(x)[: lengths[rank]], tree)


def _rows(x):
  """A stacked leaf whose scalars count as rows."""
  return x[:, None] if x.ndim == 1 else x


def allgather(rng, ranks, world):
  def truth(x, step):
    gathered = np.concatenate(_rows(x))
    return np.stack([gathered] * ranks)

  return Operation(
    "allgather",
    lambda x, step: jfog.allgather(x),
    truth,
    start=lambda x, step: jfog.allgather_start(x),
    kept=False,
    # Each rank's part is in the results of all.
    normal=lambda x, step: product(ranks * np.eye(ranks), x),
  )


def uneven_allgather(rng, ranks, world):
  """On rows of length 3; see `Program`."""
  lengths = [int(k) for k in rng.integers(0, 4, ranks)]

  def own(x):
    return _shortened(x, jfog.rank(), lengths)

  return Operation(
    "allgather of several lengths",
    lambda x, step: jfog.allgather(own(x), axis_sizes=lengths),
    lambda x, step: np.stack(
      [np.concatenate([x[r][: lengths[r]] for r in range(ranks)])] * ranks
    ),
    start=lambda x, step: jfog.allgather_start(own(x), axis_sizes=lengths),
    kept=False,
  )


def neighbor_allgather(rng, ranks, world):
  """Of a topology, of a schedule with `pad`, or of Peers."""
  kind = str(rng.choice(["topology", "schedule", "peers"]))
  if kind == "peers":
    drawn = graphs.RandomPeers(rng, ranks)
    sources = lambda step, rank: drawn.sources(rank)  # noqa: E731
    given = lambda step: ((drawn.of(jfog.rank()),), {})  # noqa: E731
  else:
    make = graphs.random_topology
    if kind == "schedule":
      make = graphs.random_schedule
    graph = make(rng, ranks)

    def sources(step, rank):
      edges = graphs.dense(graph, step)[rank] != 0
      return [r for r in range(ranks) if edges[r] and r != rank]

    def given(step):
      if kind == "topology":
        return (graph,), {}
      return (graph, step), {"pad": True}

  def longest():
    return max(
      len(sources(t, rank)) for t in range(len(graph)) for rank in range(ranks)
    )

  def truth(x, step):
    x = _rows(x)
    found = []
    for rank in range(ranks):
      parts = [x[r] for r in sources(step, rank)]
      if kind == "schedule":
        parts += [np.zeros_like(x[0])] * (longest() - len(parts))
      found.append(np.concatenate([x[0][:0], *parts]))
    return found

  def received(step):
    """A diagonal matrix: how many ranks have each rank as a source."""
    count = np.zeros(ranks)
    for rank in range(ranks):
      for source in sources(step, rank):
        count[source] += 1
    return np.diag(count)

  def call(x, step):
    arguments, named = given(step)
    return jfog.neighbor_allgather(x, *arguments, **named)

  def start(x, step):
    arguments, named = given(step)
    return jfog.neighbor_allgather_start(x, *arguments, **named)

  return Operation(
    f"neighbor_allgather of {kind}",
    call,
    truth,
    start=start,
    kept=False,
    normal=lambda x, step: product(received(step), x),
  )


DRAWS = (
  *(neighbor_allreduce, neighbor_allreduce, peers, pair_gossip),
  *(finite_time_average, hierarchical, allreduce, allreduce, broadcast),
  *(allgather, neighbor_allgather),
)


def draw(rng, ranks, world):
  """A random operation of a world."""
  return DRAWS[rng.integers(len(DRAWS))](rng, ranks, world)
