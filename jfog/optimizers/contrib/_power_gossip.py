"""Low-rank gossip: one step of a power iteration per edge and update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog import _dtypes, _validation
from jfog.optimizers import _averaging, _requirements
from jfog.optimizers._transformation import wrap_inner
from jfog.optimizers.contrib._edge_exchange import Edges, edges_of
from jfog.primitives import neighbor_allreduce_start, uniform, wait
from jfog.runtime import Communicator, resolve
from jfog.topology import Topology

_PRECISION = jax.lax.Precision.HIGHEST  # no TF32 on GPUs


class PowerGossipState(NamedTuple):
  """State of `power_gossip`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  p: Any  # shape=(slots, m, r) for each leaf of matrices, see power_gossip
  q: Any  # shape=(slots, n, r)


def power_gossip(
  inner: optax.GradientTransformation,
  topology: Topology,
  rank: int,
  *,
  seed: int = 0,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes the local step, then averages low-rank differences, edge by edge.

  With `u` the inner transformation's updates and `h = x + u`, a leaf of two or
  more dimensions is a matrix `H` of shape `(shape[0], -1) = (m, n)`. The two
  ends `lo < hi` of an edge hold equal factors `P` (m x r) and `Q` (n x r),
  `r = min(rank, m, n)`, which track the difference of their matrices:

      even steps:  Q <- orth(Q),  P <- H[hi] Q - H[lo] Q
      odd steps:   P <- orth(P),  Q <- H[hi]^T P - H[lo]^T P
      X[lo] <- H[lo] + W[lo, hi] P Q^T,  X[hi] <- H[hi] - W[lo, hi] P Q^T

  summed over all edges of a rank. The payload is `H Q`, `m r` numbers, or `H^T
  P`, `n r` numbers, over each edge in each direction, in one message with all
  leaves. The mean over ranks is conserved. Leaves of fewer than two dimensions,
  which are small, are averaged with the neighbors as in `adapt_then_combine`,
  together in one more message. If `r = n <= m`, even steps are exactly that
  average for matrices too.

  A column of the factor used next may be zero: initially all are, later those
  in whose direction both ends agree. It is replaced by a draw from

      key = jax.random.key(seed, impl="threefry2x32")
      for word in (lo, hi, step):
        key = jax.random.fold_in(key, word)
      jax.random.normal(key, (length,), dtype)

  from which both factors of each leaf, `P` before `Q`, are cut in the order of
  the leaves; `dtype` is the real dtype of the widest leaf. So no difference
  between two ranks stays orthogonal to the factors.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: the mixing graph: a symmetric, connected `Topology`.
    rank: the number of columns of the factors; 1 or 2 is usual.
    seed: seed of the factors, the same on all ranks.
    check: whether the topology must be symmetric and doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`. In the state, `p` and `q`
    are like the parameters, with `optax.MaskedNode` for leaves of fewer than
    two dimensions, and with slots along axis 0, as many as the largest degree
    or one more. For complex matrices `^H` replaces `^T`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic or not
      connected, or `rank < 1`.
    TypeError: if `topology` is not a `Topology`, or `rank` not an int; in
      `update`, for leaves that are not floating-point or complex.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.power_gossip(optax.sgd(1.0), graph, rank=1)
    >>> def average(x):  # of rank one
    ...   updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    ...   return x + updates
    >>> x = jnp.stack([jnp.zeros([3, 1]), jnp.full([3, 1], 4.0)])
    >>> jfog.simulate(average, 2)(x).round(4).squeeze()
    Array([[2., 2., 2.],
           [2., 2., 2.]], dtype=float32)

  Source: Vogels, Karimireddy and Jaggi, "Practical low-rank communication
  compression in decentralized deep learning", 2020, arXiv 2008.01425.
  """
  name = "power_gossip"
  _requirements.require_topology(topology, name)
  if check:
    _requirements.SYMMETRIC.check(topology, name)
  rank = _validation.positive(rank, f"{name}: rank")
  edges = edges_of(topology, name)
  weights = _signed_weights(topology, edges)

  def start(params: optax.Params) -> tuple:
    def factors(side: int) -> Any:
      def zeros(x: Any) -> Any:
        if not _is_matrix(x):
          return optax.MaskedNode()
        h = _matrix(_dtypes.accumulated(x))
        shape = edges.slots, h.shape[side], min(rank, *h.shape)
        return jnp.zeros_like(h, shape=shape)

      return jax.tree.map(zeros, params)

    return factors(0), factors(1)

  def combine(h: Any, state: Any) -> tuple:
    here = resolve(comm)
    # Started before the power iteration and awaited after it: both messages are
    # in flight together.
    averaged = neighbor_allreduce_start(
      jax.tree.map(lambda x: optax.MaskedNode() if _is_matrix(x) else x, h),
      topology,
      comm=comm,
    )
    leaves, structure = jax.tree.flatten(h)
    matrices = [_matrix(x) for x in leaves if _is_matrix(x)]
    p, q = (
      _averaging.mark_varying(jax.tree.leaves(factors), comm)
      for factors in (state.p, state.q)
    )
    if matrices:
      p, q = _iterate(matrices, p, q, state.step, seed, edges, here)
    changes = _changes(p, q, edges.here(weights, here))
    plain = jax.tree.leaves(wait(averaged))
    leaves = [
      x + changes.pop(0).reshape(x.shape) if _is_matrix(x) else plain.pop(0)
      for x in leaves
    ]
    return (
      structure.unflatten(leaves),
      jax.tree.structure(state.p).unflatten(p),
      jax.tree.structure(state.q).unflatten(q),
    )

  return wrap_inner(name, inner, PowerGossipState, start, combine)


def _iterate(
  matrices: list[jax.Array],
  p: list[jax.Array],
  q: list[jax.Array],
  step: jax.Array,
  seed: int,
  edges: Edges,
  comm: Communicator,
) -> tuple:
  """Half a power iteration with the differences over all edges.

  Args:
    matrices: of this rank, `(m, n)` each.
    p: the left factors, `(slots, m, r)` each.
    q: the right factors, `(slots, n, r)` each.
    step: the number of updates.
    seed: seed of the drawn columns.
    edges: the edges, by slot.
    comm: the communicator.

  Returns:
    The factors `(p, q)`: `p q^H` approximates the difference of each edge, the
    higher end's matrix minus the lower end's.
  """
  partner = edges.here(edges.partners, comm)
  low, high = jnp.minimum(comm.rank, partner), jnp.maximum(comm.rank, partner)
  exists = (partner >= 0)[:, None, None]

  def is_zero(factor: jax.Array) -> jax.Array:
    return (factor == 0).all(axis=1, keepdims=True) & exists

  def draw(p: list, q: list) -> tuple[list, list]:
    shapes = [x.shape for pair in zip(p, q, strict=True) for x in pair]
    ends = np.cumsum([np.prod(shape[1:]) for shape in shapes])
    dtype = _dtypes.real(jnp.result_type(*p))
    # One draw for both factors of all leaves; all ends of an edge cut it
    # equally.
    numbers = _normal(seed, low, high, step, int(ends[-1]), dtype)
    pieces = jnp.split(numbers, ends[:-1], axis=1)
    fresh = [x.reshape(s) for x, s in zip(pieces, shapes, strict=True)]
    return renewed(p, fresh[0::2]), renewed(q, fresh[1::2])

  def renewed(factors: list, fresh: list) -> list:
    return [
      jnp.where(is_zero(x), new.astype(x.dtype), x)
      for x, new in zip(factors, fresh, strict=True)
    ]

  def follow(matrices: list, factors: list) -> tuple[list, list]:
    """The products with the orthogonalized factors, and these factors."""
    factors = [jnp.linalg.qr(x)[0] for x in factors]
    products = [
      jnp.einsum("mn,snr->smr", h, x, precision=_PRECISION)
      for h, x in zip(matrices, factors, strict=True)
    ]
    # The barrier keeps XLA from fusing a product into the subtraction: with
    # excess precision this end would subtract other bits than it sends, and the
    # factors of the two ends would diverge.
    own = jax.lax.optimization_barrier(_packed(products))
    theirs = edges.exchange(own, comm)
    is_low, has_edge = (comm.rank < partner)[:, None], exists[:, 0]

    def subtract(own: jax.Array, theirs: jax.Array) -> jax.Array:
      value = jnp.where(is_low, theirs - own, own - theirs)
      return jnp.where(has_edge, value, jnp.zeros_like(value))

    return _unpacked(jax.tree.map(subtract, own, theirs), products), factors

  is_even = step % 2 == 0
  any_zero = [
    jnp.stack([is_zero(x).any() for x in factors]).any() for factors in (p, q)
  ]
  # Uniform over ranks, so that a simulation does not draw in every step.
  is_due = uniform(jnp.where(is_even, any_zero[1], any_zero[0]), comm)
  p, q = jax.lax.cond(is_due, draw, lambda p, q: (p, q), p, q)
  return jax.lax.cond(
    uniform(is_even, comm),
    lambda p, q: follow(matrices, q),
    lambda p, q: follow([h.conj().T for h in matrices], p)[::-1],
    p,
    q,
  )


def _normal(
  seed: int,
  low: jax.Array,
  high: jax.Array,
  step: jax.Array,
  length: int,
  dtype: Any,
) -> jax.Array:
  """Standard normal numbers, equal at both ends of an edge; (slots, length)."""

  def draw(low: jax.Array, high: jax.Array) -> jax.Array:
    # Threefry draws the same values under `vmap` as without, other generators
    # may not.
    key = jax.random.key(seed, impl="threefry2x32")
    for word in (low, high, step):
      key = jax.random.fold_in(key, word)
    return jax.random.normal(key, (length,), dtype)

  return jax.vmap(draw)(low, high)


def _packed(products: list[jax.Array]) -> dict[str, jax.Array]:
  """Concatenates products into one array (slots, numbers) per dtype."""
  rows: dict[str, list[jax.Array]] = {}
  for x in products:
    rows.setdefault(x.dtype.name, []).append(x.reshape(len(x), -1))
  return {name: jnp.concatenate(row, axis=1) for name, row in rows.items()}


def _unpacked(
  packed: dict[str, jax.Array], like: list[jax.Array]
) -> list[jax.Array]:
  """Inverse of `_packed`, in the shapes of `like`."""
  begins = dict.fromkeys(packed, 0)
  products = []
  for x in like:
    name, width = x.dtype.name, x[0].size
    piece = packed[name][:, begins[name] : begins[name] + width]
    begins[name] += width
    products.append(piece.reshape(x.shape))
  return products


def _changes(
  p: list[jax.Array], q: list[jax.Array], weights: jax.Array
) -> list[jax.Array]:
  """`sum_s w[s] p[s] q[s]^H` for each leaf."""
  return [
    jnp.einsum(
      "smr,snr->mn",
      weights.astype(x.dtype)[:, None, None] * x,
      y.conj(),
      precision=_PRECISION,
    )
    for x, y in zip(p, q, strict=True)
  ]


def _signed_weights(topology: Topology, edges: Edges) -> np.ndarray:
  """`W[lo, hi]` at the lower end of each edge, its negative at the higher end.

  Zero in slots without an edge.
  """
  ranks = np.arange(topology.size)[:, None]
  low = np.minimum(ranks, edges.partners)
  high = np.maximum(ranks, edges.partners)
  weights = topology.mixing_matrix[low, high] * np.where(ranks == low, 1, -1)
  return np.where(edges.partners < 0, 0.0, weights)


def _is_matrix(leaf: Any) -> bool:
  # Integer leaves go to `neighbor_allreduce`, which raises with their path.
  leaf = jnp.asarray(leaf)
  return (
    leaf.ndim > 1 and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.inexact)
  )


def _matrix(leaf: jax.Array) -> jax.Array:
  return leaf.reshape(leaf.shape[0], -1)
