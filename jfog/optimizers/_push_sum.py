"""Push-sum methods: averaging with column-stochastic weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfog import _dtypes
from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import with_learning_rate
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology


class PushSumState(NamedTuple):
  """State of `push_sum`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  biased: Any  # like the parameters, float32 for 16-bit; parameters * weight
  weight: jax.Array  # shape=(), float32 or wider; sums to the number of ranks


def push_sum(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages on a directed graph by push-sum of values and weights.

  With the column-stochastic mixing matrix `A`, the inner transformation's
  updates `u` for the gradient at `x`, and initially `xs = x` and `w = 1`,

      xs[i], w[i] <- sum_j A[i, j] (xs[j] + u[j], w[j])
      x[i] = xs[i] / w[i]

  Column-stochastic weights alone do not average: the values of a rank with few
  in-neighbors shrink. `w` shrinks equally, so the quotient converges to the
  plain average. With heterogeneous data a constant step size leaves a bias of
  its order; `push_diging` removes it. On a doubly stochastic graph this is
  `adapt_then_combine`.

  Value and weight are sent in one message per out-neighbor: the bytes of
  `adapt_then_combine` plus one scalar.

  Args:
    inner: the local optimizer; any optax transformation. It sees the rank's own
      gradient and the parameters where that was taken; its updates go to `xs`.
      Scale, clip and decay in it: what an `optax.chain` puts behind this
      optimizer changes the average, too.
    graph: the mixing graph: a column-stochastic `Topology` or `Schedule`, for
      example with `weights="uniform_out"`, or a function of `((params, w),
      step)`.
    check: whether the graph must be column-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`. The parameters are kept in
    the state as `biased`: the updates lead from `params` to `xs / w`, whatever
    `params` are, so other transformations of updates belong into `inner`.

  Raises:
    ValueError: if the graph is not column-stochastic in every round.
    TypeError: if `graph` is neither a graph nor a function.

  Example:
    >>> import jax, jax.numpy as jnp, jfog, networkx as nx, optax
    >>> graph = jfog.topology.from_networkx(
    ...     nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]), weights="uniform_out")
    >>> tx = jfog.optimizers.push_sum(optax.sgd(0.0), graph)
    >>> def average(x):
    ...   def step(k, carry):
    ...     x, state = carry
    ...     updates, state = tx.update(x, state, x)
    ...     return x + updates, state
    ...   return jax.lax.fori_loop(0, 40, step, (x, tx.init(x)))[0]
    >>> jfog.simulate(average, 3)(jnp.array([0.0, 3.0, 6.0])).round(4)
    Array([3., 3., 3.], dtype=float32)

  Source: Nedic and Olshevsky, "Distributed optimization over time-varying
  directed graphs", 2015; Assran, Loizou, Ballas and Rabbat, "Stochastic
  gradient push for distributed deep learning", 2019, arXiv 1811.10792.
  """
  name = "push_sum"
  push = _pushing(graph, name, check, comm)
  inner = _requirements.as_inner(inner, name)

  def init_fn(params: optax.Params) -> Any:
    _requirements.require_params(params, name)
    biased = _tree.copy(params)
    return PushSumState(
      jnp.zeros([], jnp.int32), inner.init(params), biased, _one(biased)
    )

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    _requirements.require_params(params, name)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    # The local step acts on xs, the gradient was computed at x = xs / w. Value
    # and weight take the same way, so their quotient is an average.
    biased, weight = push(
      (_tree.local_step(state.biased, updates), state.weight), state.step
    )
    step = _averaging.next_step(state.step)
    return (
      _tree.updates_to(_tree.divide(biased, weight), params),
      PushSumState(step, inner_state, biased, weight),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class PushDigingState(NamedTuple):
  """State of `push_diging`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  biased: Any  # like the parameters, float32 for 16-bit; parameters * weight
  weight: jax.Array  # shape=(), float32 or wider; sums to the number of ranks
  tracker: Any  # sum_j A[i, j] y[j], like the parameters, float32 for 16-bit
  gradient: Any  # of the last update; like the parameters, float32 for 16-bit


def push_diging(
  learning_rate: Any,
  graph: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Push-sum with gradient tracking: exact on directed, time-varying graphs.

  With the column-stochastic mixing matrix `A`, the step size `a`, one row per
  rank and initially `U = X`, `v = 1` and `Y = G`,

      U+ = A (U - a Y)      v+ = A v      X+ = U+ / v+      Y+ = A Y + G+ - G

  All ranks converge to the minimizer of the sum of all losses, for a step size
  small enough for the graph. `U`, `v` and `Y` are sent in one message per
  out-neighbor: twice the bytes of `adapt_then_combine` plus one scalar.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule.
    graph: as in `push_sum`.
    check: whether the graph must be column-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`. As in `push_sum`, the
    parameters are kept in the state.

  Raises:
    ValueError: if the graph is not column-stochastic in every round.
    TypeError: if `graph` is neither a graph nor a function, or `learning_rate`
      is neither a number nor a function.

  Example:
    >>> import jax, jax.numpy as jnp, jfog, networkx as nx
    >>> graph = jfog.topology.from_networkx(
    ...     nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]), weights="uniform_out")
    >>> tx = jfog.optimizers.push_diging(0.2, graph)
    >>> def train(target):
    ...   def step(k, carry):
    ...     x, state = carry
    ...     updates, state = tx.update(x - target, state, x)
    ...     return x + updates, state
    ...   x = jnp.zeros_like(target)
    ...   return jax.lax.fori_loop(0, 200, step, (x, tx.init(x)))[0]
    >>> jfog.simulate(train, 3)(jnp.array([0.0, 3.0, 6.0])).round(4)
    Array([3., 3., 3.], dtype=float32)

  Source: Nedic, Olshevsky and Shi, "Achieving geometric convergence for
  distributed optimization over time-varying graphs", 2017, arXiv 1607.03218.
  """
  name = "push_diging"
  push = _pushing(graph, name, check, comm)

  def start(params: optax.Params) -> tuple:
    _requirements.require_params(params, name)
    biased = _tree.copy(params)
    return (
      biased,
      _one(biased),
      _tree.zeros_like(params),
      _tree.zeros_like(params),
    )

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    del x  # the state's `biased` takes its place
    tracker = _tree.add(state.tracker, _tree.subtract(gradient, state.gradient))
    local = _tree.add(state.biased, _tree.scale(-rate, tracker))
    # The state keeps A Y; adding G+ - G in the next update gives Y+.
    biased, weight, tracker = push((local, state.weight, tracker), state.step)
    new = _tree.divide(biased, weight)
    return new, biased, weight, tracker, gradient

  return with_learning_rate(
    name, learning_rate, PushDigingState, start, advance
  )


def _pushing(
  graph: Any, name: str, check: bool, comm: Communicator | None
) -> Averaging:
  return _averaging.as_averaging(
    graph, name, check, comm, _requirements.COLUMN_STOCHASTIC
  )


def _one(biased: Any) -> jax.Array:
  """The initial weight, in the widest real dtype of the leaves."""
  reals = [_dtypes.real(x.dtype) for x in jax.tree.leaves(biased)]
  return jnp.ones([], jnp.result_type(jnp.float32, *reals))
