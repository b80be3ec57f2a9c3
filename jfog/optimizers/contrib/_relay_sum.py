"""Sums relayed along a spanning tree: RelaySGD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog.optimizers import _requirements, _tree
from jfog.optimizers._transformation import wrap_inner
from jfog.optimizers.contrib._edge_exchange import Edges, edges_of
from jfog.primitives import allreduce, uniform
from jfog.runtime import Communicator, resolve
from jfog.topology import Topology


class RelaySumState(NamedTuple):
  """State of `relay_sum`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  start: Any  # the initial parameters, float32 for 16-bit
  received: Any  # like start, shape=(slots, *leaf): the last sums, one per edge


def relay_sum(
  inner: optax.GradientTransformation,
  tree: Topology,
  *,
  check: bool = True,
  debug: bool = False,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes the local step, then averages over all ranks by relayed sums.

  With `u` the inner transformation's updates and `h = x + u`, each rank sends
  to each neighbor `j` in the tree the sum over its own side of that edge, and
  averages the sums that it has received:

      m[i -> j] <- h[i] + sum_{q != j} m[q -> i]                  of the old m
      x[i] <- (h[i] + sum_q m[q -> i] + (n - 1 - sum_q c[q -> i]) x0) / n

  where `c[q -> i]` is the number of ranks summed in `m[q -> i]` so far, the
  initial `x0` replaces the values of the others, and sums run over neighbors.
  Every `h` reaches every rank with a delay of one step per edge and has the
  same weight everywhere; for constant `h` the average is exact after as many
  steps as the diameter of the tree. With `inner = optax.sgd(a)` and a constant,
  small enough `a`, all ranks converge to the minimizer of the sum of all
  losses, however heterogeneous the data.

  In each step one message of the size of the parameters is sent over each edge
  in each direction. The counts follow from tree and step and are not sent. The
  state holds one copy of the parameters, plus as many as the largest degree, on
  every rank.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    tree: the communication graph: an undirected spanning tree, for example
      `jfog.topology.chain(size)` or `jfog.topology.from_networkx(graph)`. Its
      weights are not used.
    check: whether `tree` must have `size - 1` edges. On a graph with cycles
      some ranks count more than once.
    debug: whether to check in the first update, by one allreduce, that all
      ranks start from equal parameters, which the method requires. A difference
      is an error on every rank, raised from the computation.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if `tree` has another number of edges, an edge without its
      reverse edge, or is not connected.
    TypeError: if `tree` is not a `Topology`.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> tx = jfog.optimizers.relay_sum(optax.sgd(1.0), jfog.topology.chain(3))
    >>> def train(target):
    ...   x = jnp.zeros_like(target)
    ...   state = tx.init(x)
    ...   for _ in range(2):  # the diameter
    ...     updates, state = tx.update(x - target, state, x)
    ...     x = x + updates
    ...   return x
    >>> jfog.simulate(train, 3)(jnp.array([0.0, 3.0, 9.0])).round(4)
    Array([4., 4., 4.], dtype=float32)

  Source: Vogels, He, Koloskova, Lin, Karimireddy, Stich and Jaggi, "RelaySum
  for decentralized deep learning on heterogeneous data", 2021, arXiv
  2110.04175.
  """
  name = "relay_sum"
  _requirements.require_topology(tree, name)
  edges = edges_of(tree, name)
  if check:
    _check_tree(tree, name)
  missing_counts = _missing_counts(edges)

  def begin(params: optax.Params) -> tuple:
    start = _tree.copy(params)
    received = jax.tree.map(
      lambda x: jnp.zeros_like(x, shape=(edges.slots, *x.shape)), start
    )
    return start, received

  def combine(h: Any, state: Any) -> tuple:
    here = resolve(comm)
    start = state.start
    if debug:
      start = _compared(start, state.step, here, name)
    received = edges.exchange(jax.tree.map(_messages, h, state.received), here)
    # After the last row all ranks are received, so it serves all later steps.
    row = jnp.minimum(state.step, len(missing_counts) - 1)
    missing = jnp.asarray(missing_counts)[row, here.rank]

    def average(h: Any, received: Any, start: Any) -> Any:
      total = _sum(h, *received) + missing.astype(h.dtype) * start
      # h + (total - n h) / n: a rounded 1/n would scale h in every step.
      return h + (total - tree.size * h) / tree.size

    return jax.tree.map(average, h, received, start), start, received

  return wrap_inner(name, inner, RelaySumState, begin, combine)


def _check_tree(tree: Topology, name: str) -> None:
  edges = sum(len(tree.in_neighbors(i)) for i in range(tree.size)) // 2
  if edges != tree.size - 1:
    raise ValueError(
      f"{name}: {tree!r} has {edges} edges; a spanning tree of {tree.size} ranks "
      f"has {tree.size - 1}. Use jfog.topology.chain(size), a networkx tree with "
      f"jfog.topology.from_networkx, or check=False."
    )


def _missing_counts(edges: Edges) -> np.ndarray:
  """Number of ranks not yet received, by step and rank; shape (steps, size).

  The last row holds for all later steps.
  """
  size = len(edges.partners)
  has_edge = edges.partners >= 0
  counts = np.zeros_like(edges.partners)
  rows = []
  for _ in range(size):  # at least the diameter
    # To each neighbor: this rank, and those received over all other edges.
    sent = 1 + counts.sum(axis=1, keepdims=True) - counts
    counts = np.where(
      has_edge, np.take_along_axis(sent, np.maximum(edges.partners, 0), 0), 0
    )
    rows.append(size - 1 - counts.sum(axis=1))
    if not rows[-1].any():
      break
  return np.array(rows)


def _messages(h: jax.Array, received: jax.Array) -> jax.Array:
  """For each slot: `h` plus the sums received in all other slots.

  Prefix and suffix sums take 2 slots additions, and no subtraction, which would
  lose digits.
  """
  slots = len(received)
  before = [h]  # h and the slots before
  for slot in range(slots - 1):
    before.append(before[-1] + received[slot])
  after = [jnp.zeros_like(h)]  # the slots after
  for slot in range(slots - 1, 0, -1):
    after.append(after[-1] + received[slot])
  return jnp.stack(
    [_sum(*pair) for pair in zip(before, after[::-1], strict=True)]
  )


def _sum(first: jax.Array, *others: jax.Array) -> jax.Array:
  return sum(others, first)


def _compared(start: Any, step: Any, comm: Communicator, name: str) -> Any:
  """`start`; the computation fails on all ranks if their starts differ."""
  paths, _ = jax.tree_util.tree_flatten_with_path(start)
  names = [f"params{jax.tree_util.keystr(path)}" for path, _ in paths]

  def refuse(differs: np.ndarray) -> np.ndarray:
    if differs.any():  # from all virtual ranks, in simulation
      by_leaf = differs.reshape(-1, len(names)).any(axis=0)
      found = [leaf for leaf, bad in zip(names, by_leaf, strict=True) if bad]
      raise ValueError(
        f"{name}: the ranks start from different parameters "
        f"({', '.join(found)}); begin with params = jfog.broadcast(params)."
      )
    return np.ones(differs.shape[:-1], bool)

  def compare(start: Any) -> Any:
    reals = [
      jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
      for x in jax.tree.leaves(start)
    ]
    # max(x) over ranks equals min(x) = -max(-x) if and only if all x are equal.
    greatest = allreduce([(x, -x) for x in reals], "max", comm=comm)
    differs = jnp.stack([(high != -low).any() for high, low in greatest])
    # The result depends on the callback, so XLA keeps it and its error.
    agree = jax.pure_callback(
      refuse,
      jax.ShapeDtypeStruct((), jnp.bool_),
      differs,
      vmap_method="broadcast_all",
    )
    return jax.tree.map(lambda x: jnp.where(agree, x, jnp.zeros_like(x)), start)

  if not names:
    return start
  is_first = uniform(step == 0, comm)
  return jax.lax.cond(is_first, compare, lambda start: start, start)
