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
  start: Any  # the first parameters; like them, float32 for 16-bit ones
  received: Any  # like start, shape=(slots, *leaf): the last sums, one per edge


def relay_sum(
  inner: optax.GradientTransformation,
  tree: Topology,
  *,
  check: bool = True,
  debug: bool = False,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes the local step, then averages over all ranks with sums that relay.

  With `u` the inner transformation's updates and `h = x + u`, each rank sends to
  each neighbor `j` in the tree what lies on its own side of that edge, and
  averages what it has:

      m[i -> j] <- h[i] + sum_{q != j} m[q -> i]                  of the old m
      x[i] <- (h[i] + sum_q m[q -> i] + (n - 1 - sum_q c[q -> i]) x0) / n

  where `c[q -> i]` ranks have reached `m[q -> i]` so far, the start `x0` stands
  in for the others, and sums run over neighbors. Every `h` thus reaches every
  rank, late by as many steps as it has edges to travel, and counts the same
  everywhere: where all `h` stay as they are, the average is exact once the
  diameter of the tree is covered. With `inner = optax.sgd(a)` and a constant,
  small enough `a` all ranks converge to
  the minimizer of the sum of all losses,
  however different their data.

  In each step one message of the size of the parameters goes over each edge in
  each direction. The counts follow from tree and step and do not travel. The
  state holds one copy of the parameters, and as many as the largest degree, on
  every rank.

  Args:
    inner: the local optimizer; any optax transformation.
    tree: who exchanges with whom: an undirected spanning tree, for example
      `jfog.topology.chain(size)` or `jfog.topology.from_networkx(graph)`. Its
      weights are not used.
    check: whether `tree` must have `size - 1` edges. On a graph with cycles some
      ranks are counted more than once.
    debug: whether all ranks compare their parameters in the first update, by one
      allreduce, as they must start from the same. Different ones are an error
      on every rank, out of the computation.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if `tree` has another number of edges, an edge without its
      reverse edge, or is not connected.
    TypeError: if `tree` is a `Schedule` or another thing.

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
  for decentralized deep learning on heterogeneous data", 2021, arXiv 2110.04175.
  """
  name = "relay_sum"
  _requirements.require_topology(tree, name)
  edges = edges_of(tree, name)
  if check:
    _check_tree(tree, name)
  unheard = _unheard(edges)

  def begin(params):
    start = _tree.copy(params)
    received = jax.tree.map(
      lambda x: jnp.zeros_like(x, shape=(edges.slots, *x.shape)), start
    )
    return start, received

  def combine(h, state):
    here = resolve(comm)
    start = state.start
    if debug:
      start = _compared(start, state.step, here, name)
    received = edges.exchange(jax.tree.map(_messages, h, state.received), here)
    row = jnp.minimum(state.step, len(unheard) - 1)
    missing = jnp.asarray(unheard)[row, here.rank]

    def average(h, received, start):
      total = _sum(h, *received) + missing.astype(h.dtype) * start
      # h + (total - n h) / n: a 1/n that is rounded would shrink all of h.
      return h + (total - tree.size * h) / tree.size

    return jax.tree.map(average, h, received, start), start, received

  return wrap_inner(name, inner, RelaySumState, begin, combine)


def _check_tree(tree: Topology, name: str) -> None:
  edges = sum(len(tree.in_neighbors(i)) for i in range(tree.size)) // 2
  if edges != tree.size - 1:
    raise ValueError(
      f"{name}: {tree!r} has {edges} edges, and a spanning tree of {tree.size} "
      f"ranks has {tree.size - 1}; use jfog.topology.chain(size), or a tree of "
      f"networkx with jfog.topology.from_networkx, or check=False."
    )


def _unheard(edges: Edges) -> np.ndarray:
  """How many ranks' values a rank has not got yet, by step; shape (steps, size).

  The last row holds for all later steps.
  """
  size = len(edges.partners)
  has_edge = edges.partners >= 0
  counts = np.zeros_like(edges.partners)
  rows = []
  for _ in range(size):  # covers the diameter
    sent = 1 + counts.sum(axis=1, keepdims=True) - counts
    counts = np.where(
      has_edge, np.take_along_axis(sent, np.maximum(edges.partners, 0), 0), 0
    )
    rows.append(size - 1 - counts.sum(axis=1))
    if not rows[-1].any():
      break
  return np.array(rows)


def _messages(h: jax.Array, received: jax.Array) -> jax.Array:
  """For each slot: `h` and what was received in all other slots."""
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
  """`start`; raises out of the computation on all ranks if theirs differ."""
  paths, _ = jax.tree_util.tree_flatten_with_path(start)
  names = [f"params{jax.tree_util.keystr(path)}" for path, _ in paths]

  def refuse(differs):
    if differs.any():  # from all virtual ranks, in simulation
      by_leaf = differs.reshape(-1, len(names)).any(axis=0)
      found = [leaf for leaf, bad in zip(names, by_leaf, strict=True) if bad]
      raise ValueError(
        f"{name}: the ranks start from different parameters "
        f"({', '.join(found)}); begin with params = jfog.broadcast(params)."
      )
    return np.ones(differs.shape[:-1], bool)

  def compare(start):
    reals = [
      jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
      for x in jax.tree.leaves(start)
    ]
    # The greatest of x and the least, -max(-x), are equal if all x are.
    greatest = allreduce([(x, -x) for x in reals], "max", comm=comm)
    differs = jnp.stack([(high != -low).any() for high, low in greatest])
    # What follows depends on the answer, so that it is an error of the program.
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
