"""Averaging with compressed messages: CHOCO-SGD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog import _dtypes, _validation
from jfog.optimizers import _requirements, _tree
from jfog.optimizers._requirements import Requirement
from jfog.optimizers._transformation import wrap_inner
from jfog.optimizers.compressors._base import (
  Compressor,
  is_key,
  require_compressor,
  step_key,
)
from jfog.primitives import check_graph, neighbor_allgather
from jfog.runtime import Communicator, resolve
from jfog.topology import Topology

_TOLERANCE = 1e-9  # for the sum of a row, in the choice of the difference form


class ChocoState(NamedTuple):
  """State of `choco`; trees like the parameters, float32 for 16-bit ones."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  compressor_state: Any
  hat: Any  # the copy of this rank's parameters at its out-neighbors
  s: Any  # sum_j W[i, j] hat[j], this rank included


def choco(
  inner: optax.GradientTransformation,
  topology: Topology,
  compressor: Compressor,
  gamma: float,
  *,
  seed: int = 0,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages copies of the parameters, updated by compressed differences.

  With `u` the inner transformation's updates and `C` the compressor,

      h[i] = x[i] + u[i]
      c[i] = C(h[i] - hat[i])                                  sent
      hat[i] <- hat[i] + c[i]
      s[i] <- s[i] + sum_j W[i, j] c[j]
      x[i] <- h[i] + gamma (s[i] - hat[i])

  from `hat = s = 0`. As `hat` approaches `h`, the differences and with them the
  compression error vanish: for every deterministic, contractive compressor and
  small enough `gamma`, the limit is that of `adapt_then_combine` on
  `I + gamma (W - I)`. A compressor with a larger error needs a smaller `gamma`;
  with `identity()` and `gamma = 1` this is `adapt_then_combine`.

  A rank sends one message to each out-neighbor, of
  `jfog.optimizers.message_bytes` bytes, and decodes those of its in-neighbors
  one by one, so it holds one decoded value at a time. The random numbers of a
  rank are drawn with the key

      fold_in(fold_in(jax.random.key(seed, impl="threefry2x32"), step), rank)

  which every receiver can derive.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: the mixing graph: one symmetric, doubly stochastic `Topology`, as
      `s` is a sum over its neighbors.
    compressor: the encoding of the differences, the same on all ranks.
      Contractive, as are `top_k`, `random_k`, `sign` and `low_rank`, and
      `quantize` with enough bits up to a factor near 1.
    gamma: the consensus step size, in (0, 1]; may be traced.
    seed: seed of the compressor's random numbers, the same on all ranks.
    check: whether the topology must be symmetric and doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic, or
      `gamma` is out of range; in `init` and `update`, if the compressor refuses
      the parameters.
    TypeError: if `topology` is not a `Topology`, `compressor` not a
      `Compressor`, `gamma` not a number or `seed` not an int; in `init` and
      `update`, for leaves of dtypes that the compressor does not support.

  Example:
    >>> import jax, jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> sign = jfog.optimizers.sign()
    >>> tx = jfog.optimizers.choco(optax.sgd(0.1), graph, sign, gamma=0.5)
    >>> def train(x):
    ...   def step(carry, _):
    ...     x, state = carry
    ...     updates, state = tx.update(jnp.zeros_like(x), state, x)
    ...     return (optax.apply_updates(x, updates), state), None
    ...   return jax.lax.scan(step, (x, tx.init(x)), length=50)[0][0]
    >>> jfog.simulate(train, 2)(jnp.array([[0.0, 4.0], [2.0, 0.0]])).round(3)
    Array([[1., 2.],
           [1., 2.]], dtype=float32)

  Source: Koloskova, Stich and Jaggi, "Decentralized stochastic optimization and
  gossip algorithms with compressed communication", 2019.
  """
  name = "choco"
  exchange = compressed_exchange(
    _requirements.SYMMETRIC, topology, compressor, seed, check, comm, name
  )
  gamma = _validation.fraction(gamma, f"{name}: gamma")

  def start(params: optax.Params) -> tuple:
    return (
      compressor.init(_tree.widen(params)),
      _tree.zeros_like(params),
      _tree.zeros_like(params),
    )

  def combine(h: Any, state: Any) -> tuple:
    c, mixed, compressor_state = exchange(
      _tree.subtract(h, state.hat), state.compressor_state, state.step
    )
    # W is constant, so s = W hat stays valid by adding W c: no rank needs the
    # copies of its neighbors one by one.
    hat = _tree.add(state.hat, c)
    s = _tree.add(state.s, mixed)
    new = _tree.add(h, _tree.scale(gamma, _tree.subtract(s, hat)))
    return new, compressor_state, hat, s

  return wrap_inner(name, inner, ChocoState, start, combine)


def compressed_exchange(
  requirement: Requirement,
  topology: Any,
  compressor: Any,
  seed: Any,
  check: bool,
  comm: Communicator | None,
  name: str,
):
  """Checks the arguments of a method and returns its communication.

  Returns:
    A function of `(v, compressor_state, step)` that returns `c = C(v)` as
    decoded on this rank, `sum_j W[i, j] c[j]`, and the new state of the
    compressor.
  """
  _requirements.require_topology(topology, name)
  if check:
    requirement.check(topology, name)
  require_compressor(compressor, name)
  seed = _validation.as_int(seed, f"{name}: seed")

  def exchange(v: Any, compressor_state: Any, step: jax.Array) -> tuple:
    world = resolve(comm)
    check_graph(topology, world.size, name)
    shared = step_key(seed, step)
    message, compressor_state = compressor.encode(
      jax.random.fold_in(shared, world.rank), v, compressor_state
    )
    # The barrier keeps XLA from recomputing `c` in several fusions with
    # different rounding: `hat`, `s` and the result must use the same bits.
    c = jax.lax.optimization_barrier(compressor.decode(message, v))
    mixed = _mix(message, c, compressor, topology, shared, world)
    return c, mixed, compressor_state

  return exchange


def _mix(
  message: Any,
  own: Any,
  compressor: Compressor,
  topology: Topology,
  shared: jax.Array,
  comm: Communicator,
) -> Any:
  """Sends the message and returns `sum_j W[i, j] c[j]`, `c[i]` included."""
  leaves, structure = jax.tree.flatten(message)
  # Keys are not sent: receivers derive the source's key from the shared one.
  sent = [i for i, leaf in enumerate(leaves) if not is_key(leaf)]
  received = neighbor_allgather(
    [leaves[i][None] for i in sent],
    topology,
    pad=comm.backend == "mesh",
    comm=comm,
  )
  self_weight, is_difference, sources, weights = _row(topology, comm)

  # The terms of this rank: x[i] in difference form, else W[i, i] x[i].
  def base(x: jax.Array) -> jax.Array:
    return jnp.where(is_difference, x, _times(self_weight, x))

  def add(total: Any, slot: tuple) -> tuple[Any, None]:
    source, weight, parts = slot
    filled = [jax.random.fold_in(shared, source)] * len(leaves)
    for i, part in zip(sent, parts, strict=True):
      filled[i] = part
    decoded = compressor.decode(structure.unflatten(filled), own)

    # Padding slots have weight 0 and leave the total unchanged, bit for bit.
    def accumulate(
      total: jax.Array, value: jax.Array, x: jax.Array
    ) -> jax.Array:
      value = jnp.where(is_difference, value - x, value)
      return jnp.where(weight == 0, total, total + _times(weight, value))

    return jax.tree.map(accumulate, total, decoded, own), None

  total = jax.tree.map(base, own)
  if not len(sources):
    return total
  # A scan holds one decoded value at a time and compiles the decoder once.
  return jax.lax.scan(add, total, (sources, weights, received))[0]


def _row(topology: Topology, comm: Communicator) -> tuple[jax.Array, ...]:
  """This rank's row of the mixing matrix.

  Returns:
    The self weight; whether the row is evaluated in difference form, `x[i] +
    sum_j W[i, j] (x[j] - x[i])`, which holds for rows that sum to 1 and have a
    self weight; the sources in ascending order and their weights. On a mesh all
    rows are padded to the largest in-degree with weight 0.
  """
  matrix = topology.mixing_matrix
  self_weights = matrix.diagonal()
  is_difference = np.abs(matrix.sum(axis=1) - 1) <= _TOLERANCE
  is_difference &= self_weights != 0
  neighbors = [topology.in_neighbors(rank) for rank in range(topology.size)]
  slots = max(map(len, neighbors))
  if comm.backend != "mesh":
    slots = len(neighbors[comm.rank])
  sources = np.zeros((topology.size, slots), np.int32)
  weights = np.zeros((topology.size, slots))
  for rank, ranks in enumerate(neighbors):
    ranks = ranks[:slots]
    sources[rank, : len(ranks)] = ranks
    weights[rank, : len(ranks)] = matrix[rank, ranks]
  columns = self_weights, is_difference, sources, weights
  return tuple(jnp.asarray(column)[comm.rank] for column in columns)


def _times(weight: jax.Array, x: jax.Array) -> jax.Array:
  """`weight x`, with the weight rounded to the dtype of `x` first."""
  return weight.astype(_dtypes.real(x.dtype)) * x
