"""Asynchronous averaging over windows: put, get and push-sum."""

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
  win_put,
  win_update,
)
from jfog.runtime import Communicator
from jfog.topology import Topology

# The weights of push-sum are followed for so many rounds; what they might lose
# after that, and by rounding, is less than the margin.
_LONGEST = 1000
_MARGIN = 0.9


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
  """Puts the parameters to the neighbors and averages what they have put.

  With `u` the inner transformation's updates, and `slot[i, j]` what rank `j`
  has last put to rank `i`,

      slot[j, i] <- x[i]                                  at all out-neighbors j
      x[i] <- W[i, i] x[i] + sum_j W[i, j] slot[i, j] + u[i]

  No rank waits for another: each works at its own pace with what has arrived,
  and a rank's own initial parameters stand in for a neighbor that has not put
  yet. Where every put has arrived before the average is taken, as on a mesh and
  in simulation without delays, it is `adapt_with_combine`.

  On MPI `init` is collective, for it makes a window, and `update` is not. A
  window means nothing to another process, so a state that comes from a
  checkpoint goes on in a fresh window: `init(params)._replace(step=...,
  inner_state=...)`. Free it when all ranks are done:

      jfog.barrier()
      jfog.win_free(optax.tree_utils.tree_get(state, "window"))

  Args:
    inner: the local optimizer; any optax transformation.
    topology: who puts to whom, and the weights.
    every: put and average in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: what is put arrives that
      many averages late, see `jfog.win_create`.
    check: whether the topology must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not row-stochastic, or `every < 1`.
    TypeError: if `topology` is a `Schedule` or another thing; in `init` and
      `update`, for leaves that are not floats.

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

  def exchange(window, own):
    return win_update(win_put(window, own), own)

  return _averaging_in_window(
    "window_put",
    WindowPutState,
    exchange,
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
  """Publishes the parameters and averages those that the neighbors publish.

  With `u` the inner transformation's updates, and `published[j]` the parameters
  with which rank `j` has entered its last update,

      published[i] <- x[i]
      x[i] <- W[i, i] x[i] + sum_j W[i, j] published[j] + u[i]

  The result of the average alone is never published: what a neighbor gets were
  the parameters of this rank at some step. Nobody waits for another; before a
  rank's first update its initial parameters are published. Compared with
  `window_put` the values are as fresh as at the moment they are read, and the
  reading rank pays for their way. Where all ranks publish before any of them
  gets, as on a mesh and in simulation without delays, it is
  `adapt_with_combine`.

  On MPI `init` is collective, for it makes a window; see `window_put` for
  checkpoints and how to free it.

  Args:
    inner: the local optimizer; any optax transformation.
    topology: who gets from whom, and the weights.
    every: publish, get and average in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: what is got arrives that
      many averages late, see `jfog.win_create`.
    check: whether the topology must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation, as `window_put`.

  Raises:
    ValueError: if the topology is not row-stochastic, or `every < 1`.
    TypeError: if `topology` is a `Schedule` or another thing; in `init` and
      `update`, for leaves that are not floats.

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

  def exchange(window, own):
    # An update that reads no slot does nothing but expose.
    _, window = win_update(window, own, self_weight=1, src_weights={})
    return win_update(win_get(window), own, expose=False)

  return _averaging_in_window(
    "window_get",
    WindowGetState,
    exchange,
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
  biased: Any  # like the parameters, float32 for 16-bit ones; w times them
  window: Window  # of such values; its associated p is w


def window_push_sum(
  inner: optax.GradientTransformation,
  topology: Topology,
  every: int = 1,
  *,
  delay: Any = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Push-sum without waiting: splits values and weights over the neighbors.

  Every rank holds biased values `xs` and a scalar weight `w`, at the start its
  parameters and 1. With `u` the inner transformation's updates, computed at the
  parameters `x = xs / w`, and `k` the part that it keeps,

      xs[i] <- xs[i] + u[i]
      k = max(A[i, i], min(1, least[i] / w[i]))
      slot[j, i] += (1 - k) / (1 - A[i, i]) A[j, i] (xs[i], w[i])   at all j
      (xs[i], w[i]) <- k (xs[i], w[i]) + sum_j slot[i, j]
      slot[i, j] <- 0
      x[i] <- xs[i] / w[i]

  Nothing is lost, whoever is slow: what the ranks hold and what lies in slots
  adds up to the number of ranks for `w`, and for `xs` to the sum of the initial
  parameters and of all `u`. So without gradients all `x` go to the average,
  on directed graphs and at any paces. With them a rank counts as often as it
  steps.

  `least[i]` is a little below the least that rank `i` would keep if all were in
  step, `A[i, i]` times the least of `(A^t 1)[i]` over all `t`. Where all that
  is sent has arrived before it is collected, as on a mesh and in simulation
  without delays, `k` is therefore `A[i, i]` and this is synchronous push-sum. A
  rank that goes on while it hears from nobody would give all its weight away,
  and `u`, which acts on the parameters as `u / w`, would throw them off; it
  keeps that much instead.

  At the end some of the mass lies in slots; this collects it, once all ranks
  have come:

      jfog.barrier()
      biased, window = jfog.win_update_then_collect(state.window, state.biased)
      w = jfog.win_associated_p(window)
      params = jax.tree.map(lambda xs: xs / w, biased)
      jfog.win_free(window)

  On MPI `init` is collective, for it makes a window, and `update` is not. The
  parameters live in `biased`, so the updates lead to `xs / w` whatever was
  changed in `params` meanwhile: put what else transforms updates into `inner`.

  Args:
    inner: the local optimizer; any optax transformation.
    topology: who sends to whom, and the weights `A[dst, src]`; directed graphs
      are welcome.
    every: send and collect in every `every`-th update of this rank only.
    delay: for research, on a mesh and in simulation: what is sent arrives that
      many collects late, see `jfog.win_create`.
    check: whether the topology must be column-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not column-stochastic, or `every < 1`.
    TypeError: if `topology` is a `Schedule` or another thing; in `init` and
      `update`, for leaves that are not floats.

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
  inner = optax.with_extra_args_support(inner)
  least = _least_kept(topology.mixing_matrix)

  def init_fn(params) -> Any:
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

  def communicate(operand, _):
    biased, window = operand
    rank = window.comm.rank
    weights = jnp.asarray(topology.mixing_matrix)[:, rank]
    own = weights[rank]
    kept = jnp.maximum(
      own,
      jnp.minimum(1, jnp.asarray(least)[rank] / win_associated_p(window)),
    )
    if topology.size > 1:
      weights = weights * ((1 - kept) / (1 - own))
    window = win_accumulate(window, biased, dst_weights=weights)
    return win_update(
      window, biased, self_weight=kept, src_weights=1, reset=True
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
    weight = win_associated_p(window)
    new = _tree.divide(biased, weight)
    step = _averaging.next_step(state.step)
    return (
      _tree.updates_to(new, params),
      WindowPushSumState(step, inner_state, biased, window),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaging_in_window(
  name, state_type, exchange, inner, topology, every, delay, check, comm
) -> optax.GradientTransformationExtraArgs:
  """What `window_put` and `window_get` share; `exchange` tells them apart."""
  _requirements.require_topology(topology, name)
  if check:
    _requirements.AVERAGING.check(topology, name)
  every = _requirements.check_every(every, name)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    _requirements.require_params(params, name)
    window = win_create(_tree.widen(params), topology, delay=delay, comm=comm)
    return state_type(jnp.zeros([], jnp.int32), inner.init(params), window)

  def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any):
    _requirements.require_params(params, name)
    own = _tree.widen(params)
    combined, window = _averaging.on_schedule(
      lambda operand, _: exchange(*operand),
      lambda operand, _: operand[::-1],
      (state.window, own),
      state.step,
      every,
      state.window.comm,
    )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    # (c - x) + u: what the neighbors change, and what the gradient does.
    updates = _tree.local_step(_tree.updates_to(combined, own), updates)
    step = _averaging.next_step(state.step)
    return updates, state_type(step, inner_state, window)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _least_kept(matrix: np.ndarray) -> np.ndarray:
  """A little below the weights that ranks in step keep; shape (size,)."""
  weights = least = np.ones(len(matrix))
  for _ in range(_LONGEST):
    before, weights = weights, matrix @ weights
    least = np.minimum(least, weights)
    if np.allclose(weights, before, rtol=0, atol=1e-9):
      break
  return _MARGIN * matrix.diagonal() * least
