"""Momentum without the bias that it adds to decentralized averaging."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfog import _dtypes
from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import MomentumState, with_learning_rate
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

DecentlamState = MomentumState


def decentlam(
  learning_rate: Any,
  momentum: Any,
  topology: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum over the whole step, averaging included.

  With the step size `a`, the momentum `b` and one row per rank,

      C = W (X - a G)      M+ = b M + (X - C) / a      X+ = X - a M+

  Momentum inside of `adapt_then_combine` multiplies the bias of heterogeneous
  data by `1 / (1 - b)`; here the bias is that without momentum. With `b = 0`
  this is `adapt_then_combine`. One average per step.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule. Where a
      schedule is zero the parameters are averaged and the momentum decays.
    momentum: `b`, in [0, 1).
    topology: the mixing graph: a symmetric `Topology`, or a function
      `(params, step) -> params`.
    check: whether the topology must be one symmetric, doubly stochastic
      `Topology`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic; with
      `b = 0.9` the method diverges on directed exponential graphs, where
      `quasi_global_momentum` is stable. If `momentum` is outside [0, 1).
    TypeError: if `topology` is neither a `Topology` nor a function, or
      `learning_rate` is neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.decentlam(0.5, 0.5, graph)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([1.5, 1.5], dtype=float32), Array([ 1.75, -0.25], dtype=float32))

  Source: Yuan et al., "DecentLaM: decentralized momentum SGD for large-batch
  deep training", 2021, arXiv 2104.11981.
  """
  name = "decentlam"
  _requirements.check_factor(momentum, "momentum", name)
  average = _averaging.as_averaging(
    topology, name, check, comm, _requirements.SYMMETRIC
  )

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    local = _tree.add(x, _tree.scale(-rate, gradient))
    combined = average(local, state.step)
    decayed = _tree.scale(momentum, state.momentum)
    # X - a M+ = C - a b M: this form does not divide by `a`, which may be zero.
    new = _tree.add(combined, _tree.scale(-rate, decayed))
    change = _per_rate(_tree.subtract(x, combined), rate)
    return new, _tree.add(decayed, change)

  return with_learning_rate(
    name, learning_rate, DecentlamState, at_rest, advance
  )


QuasiGlobalMomentumState = MomentumState


def quasi_global_momentum(
  learning_rate: Any,
  momentum: Any,
  graph: Topology | Schedule | Averaging,
  mu: Any = None,
  nesterov: bool = False,
  weight_decay: Any = 0.0,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum along the path of the averaged parameters.

  With the step size `a`, the momentum `b`, the weight decay `l` and `mh`
  initially zero,

      g' = g[i] + l x[i]
      m = b mh[i] + g'           and d[i] = m, or g' + b m with `nesterov`
      y[i] = sum_j W[i, j] (x[j] - a d[j])
      mh[i] <- mu mh[i] + (1 - mu) (x[i] - y[i]) / a,      x[i] <- y[i]

  The momentum is a trace of the averaged steps, an estimate of the global
  direction, and not of the rank's own gradients. The bias is that of
  `adapt_then_combine` without momentum, which is the case `b = 0`. Stable on
  directed and one-peer graphs. One average per step.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule. Where a
      schedule is zero the parameters are averaged and `mh` decays.
    momentum: `b`, in [0, 1).
    graph: the mixing graph: a `Topology` or a `Schedule`, every round
      doubly stochastic, or a function `(params, step) -> params`.
    mu: the factor of the trace, in [0, 1); `momentum` by default.
    nesterov: whether to use the look-ahead direction.
    weight_decay: the factor `l` of the parameters in the gradient.
    check: whether the graph must be doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not doubly stochastic in every round, or
      `momentum` or `mu` is outside [0, 1).
    TypeError: if `graph` is neither a graph nor a function, or `learning_rate`
      is neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.quasi_global_momentum(0.5, 0.5, graph)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([1.5, 1.5], dtype=float32), Array([0.875, 0.875], dtype=float32))

  Source: Lin, Karimireddy, Stich and Jaggi, "Quasi-global momentum", 2021,
  arXiv 2102.04761.
  """
  name = "quasi_global_momentum"
  _requirements.check_factor(momentum, "momentum", name)
  mu = momentum if mu is None else mu
  _requirements.check_factor(mu, "mu", name)
  average = _averaging.as_averaging(
    graph, name, check, comm, _requirements.DOUBLY_STOCHASTIC
  )

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    # g' = g + l x, then m = b mh + g', or with nesterov g' + b m.
    gradient = _tree.add(gradient, _tree.scale(weight_decay, x))
    direction = _tree.add(_tree.scale(momentum, state.momentum), gradient)
    if nesterov:
      direction = _tree.add(gradient, _tree.scale(momentum, direction))
    local = _tree.add(x, _tree.scale(-rate, direction))
    new = average(local, state.step)
    change = _per_rate(_tree.subtract(x, new), rate)
    # The trace follows (x - y) / a, the averaged step per unit of step size.
    trace = _tree.add(
      _tree.scale(mu, state.momentum), _tree.scale(1 - mu, change)
    )
    return new, trace

  return with_learning_rate(
    name, learning_rate, QuasiGlobalMomentumState, at_rest, advance
  )


def at_rest(params: optax.Params) -> tuple:
  """Zero momentum, the initial state."""
  return (_tree.zeros_like(params),)


def _per_rate(change: Any, rate: Any) -> Any:
  """`change / a`, and zero where a schedule of `a` is zero."""

  def divide(x: jax.Array) -> jax.Array:
    # The inner `where` keeps the unused quotient finite, and its derivative
    # too.
    a = jnp.asarray(rate, _dtypes.real(x.dtype))
    return jnp.where(a == 0, 0, x / jnp.where(a == 0, 1, a)).astype(x.dtype)

  return jax.tree.map(divide, change)
