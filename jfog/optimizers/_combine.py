"""Averaging of parameters with the neighbors: adapt then, or with, combine."""

from typing import Any

import jax.numpy as jnp
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import WrappedState, wrap_inner
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

AdaptThenCombineState = WrappedState


def adapt_then_combine(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging,
  every: int = 1,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes the local step, then averages the parameters with the neighbors.

  With `u` the inner transformation's updates,

      x[i] <- sum_j W[i, j] (x[j] + u[j])

  With `inner = optax.sgd(a)` this is ATC diffusion, `X <- W (X - a G)`. With
  heterogeneous data the limit has a bias of order `a`, smaller than that of
  `adapt_with_combine`. A rank without in-neighbors keeps `x + u`.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    graph: the mixing graph: a `Topology`, a `Schedule`, read at the number of
      communications so far, or a function `(params, step) -> params`.
    every: communicate in every `every`-th update only.
    check: whether the graph must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not row-stochastic, or `every < 1`.
    TypeError: if `graph` is neither a graph nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.adapt_then_combine(optax.sgd(0.5), graph)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([1.5, 1.5], dtype=float32)

  Source: Cattivelli and Sayed, "Diffusion LMS strategies for distributed
  estimation", 2010; `DistributedAdaptThenCombineOptimizer` of BlueFog.
  """
  name = "adapt_then_combine"
  average = _averaging.as_averaging(graph, name, check, comm)
  every = _requirements.check_every(every, name)

  def combine(h: Any, state: Any) -> tuple:
    return (
      _averaging.on_schedule(
        # Between communications h = x + u stays as it is: a plain local step.
        average,
        lambda h, step: h,
        h,
        state.step,
        every,
        comm,
      ),
    )

  return wrap_inner(name, inner, AdaptThenCombineState, lambda x: (), combine)


AdaptWithCombineState = WrappedState


def adapt_with_combine(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging,
  every: int = 1,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages the parameters with the neighbors while taking the local step.

  With `u` the inner transformation's updates,

      x[i] <- sum_j W[i, j] x[j] + u[i]

  With `inner = optax.sgd(a)` this is decentralized gradient descent,
  `X <- W X - a G`. The average does not depend on the gradient, so the exchange
  can overlap with the forward and backward pass. The bias with heterogeneous data
  is larger than that of `adapt_then_combine`. The inner transformation gets the
  parameters before averaging, at which the gradient was computed. In BlueFog it
  gets the averaged ones; the two differ for weight decay.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    graph: as in `adapt_then_combine`.
    every: communicate in every `every`-th update only.
    check: whether the graph must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not row-stochastic, or `every < 1`.
    TypeError: if `graph` is neither a graph nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.adapt_with_combine(optax.sgd(0.5), graph)
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([1., 2.], dtype=float32)

  Source: Nedic and Ozdaglar, "Distributed subgradient methods for multi-agent
  optimization", 2009; `DistributedAdaptWithCombineOptimizer` of BlueFog.
  """
  name = "adapt_with_combine"
  average = _averaging.as_averaging(graph, name, check, comm)
  every = _requirements.check_every(every, name)
  inner = _requirements.as_inner(inner, name)

  def init_fn(params: optax.Params) -> Any:
    return AdaptWithCombineState(jnp.zeros([], jnp.int32), inner.init(params))

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    _requirements.require_params(params, name)
    own = _tree.widen(params)
    # Starts from the old parameters: the exchange does not depend on `updates`,
    # so XLA may schedule both side by side.
    combined = _averaging.on_schedule(
      average, lambda x, step: x, own, state.step, every, comm
    )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    # (c - x) + u: the change by averaging, then the local step.
    updates = _tree.local_step(_tree.updates_to(combined, own), updates)
    step = _averaging.next_step(state.step)
    return updates, AdaptWithCombineState(step, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
