"""The two forms that most decentralized optimizers have as transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfog.optimizers import _averaging


def around(
  name: str,
  inner: optax.GradientTransformation,
  state_type: Callable[..., Any],
  start: Callable[[Any], tuple],
  combine: Callable[[Any, Any], tuple],
) -> optax.GradientTransformationExtraArgs:
  """A transformation that combines what an inner one's local step leads to.

      h = x + u,        x <- combine(h)

  Args:
    name: the optimizer's, for error texts.
    inner: the local optimizer, which gives `u`.
    state_type: of the state: `(step, inner_state, *rest)`.
    start: from the parameters to the rest of the first state.
    combine: from `h`, in the accumulation dtype, and the state to the new
      parameters and the rest of the new state, as one tuple.
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    step = jnp.zeros([], jnp.int32)
    return state_type(step, inner.init(params), *start(params))

  def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any):
    _averaging.require_params(params, name)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    new, *rest = combine(_averaging.local_step(params, updates), state)
    step = _averaging.next_step(state.step)
    return (
      _averaging.difference(new, params),
      state_type(step, inner_state, *rest),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def descending(
  name: str,
  learning_rate: Any,
  state_type: Callable[..., Any],
  start: Callable[[Any], tuple],
  advance: Callable[[Any, Any, jax.Array, Any], tuple],
) -> optax.GradientTransformationExtraArgs:
  """A transformation with a step size of its own and no inner one.

  Args:
    name: the optimizer's, for error texts.
    learning_rate: the step size, or a schedule of it.
    state_type: of the state: `(step, *rest)`.
    start: from the parameters to the rest of the first state.
    advance: from the parameters and the gradient, both in the accumulation
      dtype, the step size and the state to the new parameters and the rest of the
      new state, as one tuple.

  Raises:
    TypeError: if `learning_rate` is neither a real scalar nor a function.
  """
  rate = _averaging.as_learning_rate(learning_rate, name)

  def init_fn(params):
    return state_type(jnp.zeros([], jnp.int32), *start(params))

  def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any):
    del extra
    _averaging.require_params(params, name)
    new, *rest = advance(
      _averaging.own(params),
      _averaging.gradient(updates, params),
      rate(state.step),
      state,
    )
    step = _averaging.next_step(state.step)
    return _averaging.difference(new, params), state_type(step, *rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
