"""Synchronous data parallelism: gradients averaged over all ranks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfog import _compat
from jfog.optimizers import _averaging, _requirements, _tree
from jfog.primitives import allreduce
from jfog.runtime import Communicator


class GradientAllreduceState(NamedTuple):
  """State of `gradient_allreduce`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  accumulated: Any  # like the gradients, float32 for 16-bit; None if every == 1


def gradient_allreduce(
  inner: optax.GradientTransformation,
  every: int = 1,
  *,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Passes the gradient averaged over all ranks to the inner transformation.

  In every `every`-th update, with `g` the gradients since the last such one,

      u = inner.update(mean over ranks of sum g / every)

  In the others the updates are zero and the inner state is unchanged. Ranks
  with equal parameters keep them equal; start from `jfog.broadcast(params)`.
  Every `every`-th update waits for all ranks.

  Args:
    inner: the optimizer; any optax transformation.
    every: the number of gradients summed between two allreduces.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation.

  Raises:
    ValueError: if `every < 1`.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> tx = jfog.optimizers.gradient_allreduce(optax.sgd(0.5))
    >>> def step(x, grad):
    ...   updates, _ = tx.update(grad, tx.init(x), x)
    ...   return optax.apply_updates(x, updates)
    >>> jfog.simulate(step, 2)(jnp.array([4.0, 4.0]), jnp.array([2.0, 0.0]))
    Array([3.5, 3.5], dtype=float32)

  Source: `DistributedGradientAllreduceOptimizer` of BlueFog.
  """
  every = _requirements.check_every(every, "gradient_allreduce")
  inner = _requirements.as_inner(inner, "gradient_allreduce")

  def init_fn(params: optax.Params) -> Any:
    accumulated = None
    if every > 1:
      accumulated = _tree.zeros_like(params)
    return GradientAllreduceState(
      jnp.zeros([], jnp.int32), inner.init(params), accumulated
    )

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    step = _averaging.next_step(state.step)
    if every == 1:
      updates, inner_state = inner.update(
        allreduce(updates, comm=comm), state.inner_state, params, **extra
      )
      return updates, GradientAllreduceState(step, inner_state, None)

    total = _tree.local_step(state.accumulated, updates)

    def communicate(operand: tuple, _: jax.Array) -> tuple:
      total, inner_state = operand
      mean = jax.tree.map(
        lambda g, like: (g / every).astype(jnp.asarray(like).dtype),
        allreduce(total, comm=comm),
        updates,
      )
      new, inner_state = inner.update(mean, inner_state, params, **extra)
      return new, inner_state, jax.tree.map(jnp.zeros_like, total)

    # Both branches must return equal types. Those of the updates are determined
    # by the inner transformation; abstract evaluation finds them without a
    # message.
    operand = (total, state.inner_state)
    types = jax.eval_shape(communicate, operand, state.step)[0]

    def accumulate(operand: tuple, _: jax.Array) -> tuple:
      total, inner_state = operand
      return jax.tree.map(_compat.zeros, types), inner_state, total

    new, inner_state, total = _averaging.on_schedule(
      communicate, accumulate, operand, state.step, every, comm, differ=False
    )
    return new, GradientAllreduceState(step, inner_state, total)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
