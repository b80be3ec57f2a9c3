"""Asynchronous averaging over windows: put, get and push-sum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._transformation import WindowState
from jfog.primitives import (
  Window,
  win_accumulate,
  win_associated_p,
  win_create,
  win_get,
  win_missing,
  win_put,
  win_update,
)
from jfog.runtime import Communicator
from jfog.topology import Topology

_ROUNDS = 1000  # limit of the simulated push-sum rounds in `_least_kept`
_MARGIN = 0.9  # covers rounding, and the decrease after these rounds


# Arguments of `win_update`; none for the topology's weights.
_Weights = dict[str, Any]

WindowPutState = WindowState


def window_put(
  inner: optax.GradientTransformation,
  topology: Topology,
  every: int = 1,
  *,
  delay: Any = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages the slots, and puts the parameters to the out-neighbors.

  With `u` the inner transformation's updates, and `slot[i, j]` the last value
  put by rank `j` to rank `i`,

      x[i] <- W[i, i] x[i] + sum_j W[i, j] slot[i, j] + u[i]
      slot[j, i] <- x[i]                                  at all out-neighbors j

  `init` puts the initial parameters. No rank waits for another: `update` uses the
  values that have arrived. The put comes at the end of an update, so that it
  travels while the next gradient is computed: `params` plus the returned updates
  are put, also where a wrapper such as `optax.apply_if_finite` then rejects them.
  If every put arrives before the next average is taken, as on a mesh and in
  simulation without delays, this is `adapt_with_combine`.

  `update(..., weights=W)` takes the place of the topology's matrix in this
  average: an array of shape `(size, size)`, traced or not, of which each rank
  reads its own row. Entries outside the topology's edges are not used.

  Ranks at different paces lose the mean: two that start at 0 and 10 can agree on
  6.67. `window_push_sum` keeps it in any interleaving.

  On MPI `init` is collective, since it creates a window, and `update` is not. A
  window is valid in its process only. To continue from a checkpoint, use a
  fresh window: `init(params)._replace(step=..., inner_state=...)`. Free it when
  all ranks are done:

      jfog.barrier()
      jfog.win_free(optax.tree_utils.tree_get(state, "window"))

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: a row-stochastic `Topology`: each source puts to its destinations.
    every: put and average in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: number of averages by
      which puts arrive late, see `jfog.win_create`.
    check: whether the topology must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not row-stochastic, or `every < 1`.
    TypeError: if `topology` is not a `Topology`; in `init` and `update`, for
      leaves that are not floating-point.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.window_put(optax.sgd(0.5), graph)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([1., 2.], dtype=float32)

  Source: `DistributedWinPutOptimizer` of BlueFog; Lian et al., "Asynchronous
  decentralized parallel stochastic gradient descent", 2018.
  """

  def average(window: Window, own: Any, weights: _Weights) -> tuple:
    # The slots hold what has arrived, which in simulation is delayed by `delay`.
    return win_update(window, own, **weights)

  return _averaging_in_window(
    "window_put",
    average,
    win_put,
    inner,
    topology,
    every,
    delay,
    check,
    comm,
  )


WindowGetState = WindowState


def window_get(
  inner: optax.GradientTransformation,
  topology: Topology,
  every: int = 1,
  *,
  delay: Any = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Exposes the parameters and averages those of the in-neighbors.

  With `u` the inner transformation's updates, and `exposed[j]` the parameters
  of rank `j` at the start of its last update,

      exposed[i] <- x[i]
      x[i] <- W[i, i] x[i] + sum_j W[i, j] exposed[j] + u[i]

  The average without the local step is never exposed: a get returns the
  parameters of the source at one of its steps, initially those of `init`. No
  rank waits for another. Compared with `window_put`, values are read when they
  are needed, and the reading rank pays for the transfer. If all ranks expose
  before any of them gets, as on a mesh and in simulation without delays, this
  is `adapt_with_combine`. `update` takes `weights=`, as that of `window_put`.

  Ranks at different paces lose the mean, as with `window_put`; `window_push_sum`
  keeps it in any interleaving.

  On MPI `init` is collective, since it creates a window; see `window_put` for
  checkpoints and how to free it.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: a row-stochastic `Topology`: each destination gets from its
      sources.
    every: expose, get and average in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: number of averages by
      which gets arrive late, see `jfog.win_create`.
    check: whether the topology must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation, as `window_put`.

  Raises:
    ValueError: if the topology is not row-stochastic, or `every < 1`.
    TypeError: if `topology` is not a `Topology`; in `init` and `update`, for
      leaves that are not floating-point.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.window_get(optax.sgd(0.5), graph)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([1., 2.], dtype=float32)

  Source: `DistributedPullGetOptimizer` of BlueFog.
  """

  def average(window: Window, own: Any, weights: _Weights) -> tuple:
    # An update with no source only exposes `own`, before the get: a neighbor
    # that reads in the meantime finds these parameters and not those of the last
    # step.
    _, window = win_update(window, own, self_weight=1, src_weights={})
    # expose=False: others read the parameters, not this average of older ones.
    return win_update(win_get(window), own, expose=False, **weights)

  return _averaging_in_window(
    "window_get",
    average,
    None,  # values are published when they are read
    inner,
    topology,
    every,
    delay,
    check,
    comm,
  )


class WindowPushSumState(NamedTuple):
  """State of `window_push_sum`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  biased: Any  # w times the parameters, float32 for 16-bit
  window: Window  # of values like `biased`; its associated p is w


def window_push_sum(
  inner: optax.GradientTransformation,
  topology: Topology,
  every: int = 1,
  *,
  delay: Any = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Asynchronous push-sum: splits values and weights over the neighbors.

  Every rank holds biased values `xs` and a scalar weight `w`, initially its
  parameters and 1. With `u` the inner transformation's updates, computed at the
  parameters `x = xs / w`, and `k` the fraction that the rank keeps,

      xs[i] <- xs[i] + u[i]
      k = max(A[i, i], min(1, least[i] / w[i]))
      slot[j, i] += (1 - k) / (1 - A[i, i]) A[j, i] (xs[i], w[i])   at all j
      (xs[i], w[i]) <- k (xs[i], w[i]) + sum_j slot[i, j]
      slot[i, j] <- 0
      x[i] <- xs[i] / w[i]

  Mass is conserved at any speed of the ranks: over ranks and slots, `w` sums to
  the number of ranks, and `xs` to the sum of the initial parameters and of all
  `u`. Without gradients all `x` therefore converge to the average, on directed
  graphs too. With gradients a rank counts in proportion to its number of steps.

  `least[i]` is slightly below the smallest weight that rank `i` keeps in
  lockstep, `A[i, i]` times the minimum of `(A^t 1)[i]` over all `t`. If all
  messages arrive before they are collected, as on a mesh and in simulation
  without delays, `k` is therefore `A[i, i]` and this is synchronous push-sum. A
  rank that continues while its in-neighbors are slow would otherwise send
  nearly all of its weight, and `u`, which changes the parameters by `u / w`,
  would become too large.

  At the end some of the mass is in slots. To collect it when all ranks are
  done:

      jfog.barrier()
      biased, window = jfog.win_update_then_collect(state.window, state.biased)
      w = jfog.win_associated_p(window)
      params = jax.tree.map(lambda xs: xs / w, biased)
      jfog.win_free(window)

  On MPI `init` is collective, since it creates a window, and `update` is not.
  The parameters are kept in the state as `biased`: the updates lead from
  `params` to `xs / w`, whatever `params` are, so other transformations of
  updates belong into `inner`.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    topology: a column-stochastic `Topology` with the weights `A[dst, src]`,
      possibly directed.
    every: send and collect in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: number of collects by
      which messages arrive late, see `jfog.win_create`.
    check: whether the topology must be column-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not column-stochastic, or `every < 1`.
    TypeError: if `topology` is not a `Topology`; in `init` and `update`, for
      leaves that are not floating-point.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.window_push_sum(optax.sgd(0.5), graph)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([1.5, 1.5], dtype=float32)

  Source: Nedic and Olshevsky, "Distributed optimization over time-varying
  directed graphs", 2015; Assran and Rabbat, "Asynchronous gradient-push", 2018;
  `DistributedPushSumOptimizer` of BlueFog.
  """
  name = "window_push_sum"
  _requirements.require_topology(topology, name)
  if check:
    _requirements.COLUMN_STOCHASTIC.check(topology, name)
  every = _requirements.check_every(every, name)
  inner = _requirements.as_inner(inner, name)
  # Static per graph, so computed once in NumPy.
  least = _least_kept(topology.mixing_matrix)

  def init_fn(params: optax.Params) -> Any:
    _requirements.require_params(params, name)
    biased = _tree.widen(params)
    window = win_create(
      biased,
      topology,
      zero_init=True,
      associated_p=True,
      delay=delay,
      comm=comm,
    )
    step = jnp.zeros([], jnp.int32)
    return WindowPushSumState(step, inner.init(params), biased, window)

  def communicate(operand: tuple, _: jax.Array) -> tuple:
    biased, window = operand
    rank = window.comm.rank
    weights = jnp.asarray(topology.mixing_matrix)[:, rank]
    own = weights[rank]
    # The kept fraction; the rest is split over the out-neighbors by A[:, rank].
    kept = jnp.maximum(
      own,
      jnp.minimum(1, jnp.asarray(least)[rank] / win_associated_p(window)),
    )
    if topology.size > 1:
      # The column of A sums to 1. With `kept` in place of `own`, all others shrink
      # by one factor, and the sum stays 1.
      weights = weights * ((1 - kept) / (1 - own))
    # The part of a rank that has failed stays here: sent, it would be lost, and
    # the weight of this rank sink to zero.
    missing = win_missing(window)
    kept = kept + jnp.sum(jnp.where(missing, weights, 0))
    weights = jnp.where(missing, 0, weights)
    # Values and weights (the associated p) are scaled and added together, so
    # mass moves between ranks and slots without loss.
    window = win_accumulate(window, biased, dst_weights=weights)
    return win_update(
      # Weight 1 and reset: each message is taken once and as a whole, so
      # nothing of the mass in the slots is lost or counted twice.
      window,
      biased,
      self_weight=kept,
      src_weights=1,
      reset=True,
    )

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    _requirements.require_params(params, name)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    biased, window = _averaging.on_schedule(
      communicate,
      lambda operand, _: operand,
      (_tree.local_step(state.biased, updates), state.window),
      state.step,
      every,
      state.window.comm,
    )
    # De-bias with the weight after the exchange.
    weight = win_associated_p(window)
    new = _tree.divide(biased, weight)
    step = _averaging.next_step(state.step)
    return (
      _tree.updates_to(new, params),
      WindowPushSumState(step, inner_state, biased, window),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaging_in_window(
  name: str,
  average: Callable[[Window, Any, _Weights], tuple],
  publish: Callable[[Window, Any], Window] | None,
  inner: optax.GradientTransformation,
  topology: Topology,
  every: int,
  delay: Any,
  check: bool,
  comm: Communicator | None,
) -> optax.GradientTransformationExtraArgs:
  """`window_put` and `window_get`: an average, and a put of the result or none."""
  _requirements.require_topology(topology, name)
  if check:
    _requirements.AVERAGING.check(topology, name)
  every = _requirements.check_every(every, name)
  inner = _requirements.as_inner(inner, name)

  def init_fn(params: optax.Params) -> Any:
    _requirements.require_params(params, name)
    own = _tree.widen(params)
    window = win_create(own, topology, delay=delay, comm=comm)
    window = publish(window, own) if publish else window
    return WindowState(jnp.zeros([], jnp.int32), inner.init(params), window)

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: Any = None,
    weights: Any = None,
    **extra: Any,
  ) -> tuple[optax.Updates, Any]:
    _requirements.require_params(params, name)
    own = _tree.widen(params)
    weights = _row(weights, state.window, name)
    combined, window = _averaging.on_schedule(
      lambda operand, _: average(operand[0], operand[1], weights),
      lambda operand, _: operand[::-1],  # (own, window), as `average` returns
      (state.window, own),
      state.step,
      every,
      state.window.comm,
    )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    # (c - x) + u: the change by averaging, then the local step.
    updates = _tree.local_step(_tree.updates_to(combined, own), updates)
    step = _averaging.next_step(state.step)
    if send := publish:
      # Now and not at the start of the next update: it travels while the next
      # gradient is computed.
      window = _averaging.on_schedule(
        lambda operand, _: send(operand[0], operand[1]),
        lambda operand, _: operand[0],
        (window, _tree.widen(optax.apply_updates(params, updates))),
        step,
        every,
        window.comm,
      )
    return updates, WindowState(step, inner_state, window)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _row(weights: Any, window: Window, name: str) -> _Weights:
  """This rank's row of a matrix of weights, as arguments of `win_update`."""
  if weights is None:
    return {}
  shape = (window.comm.size,) * 2
  if jnp.shape(weights) != shape:
    raise ValueError(
      f"{name}: weights has shape {jnp.shape(weights)}; pass a matrix "
      f"weights[dst, src] of shape {shape}."
    )
  row = jnp.asarray(weights)[window.comm.rank]
  return {"self_weight": row[window.comm.rank], "src_weights": row}


def _least_kept(matrix: np.ndarray) -> np.ndarray:
  """Lower bounds of the weights kept in lockstep; shape (size,)."""
  weights = least = np.ones(len(matrix))
  for _ in range(_ROUNDS):
    # One round of push-sum, of which rank i keeps A[i, i] w[i].
    before, weights = weights, matrix @ weights
    least = np.minimum(least, weights)
    if np.allclose(weights, before, rtol=0, atol=1e-9):
      break
  return _MARGIN * matrix.diagonal() * least
