"""The two forms of transformation that most decentralized optimizers have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.primitives import Window


class WrappedState(NamedTuple):
  """State of an optimizer that keeps its inner transformation's state."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState


class WrappedCorrectionState(NamedTuple):
  """State of a bias-corrected optimizer around an inner transformation."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  correction: Any  # like the parameters, float32 for 16-bit; its mean is zero


class CorrectionState(NamedTuple):
  """State of a bias-corrected optimizer with a step size of its own."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  correction: Any  # like the parameters, float32 for 16-bit; its mean is zero


class MomentumState(NamedTuple):
  """State of an optimizer that keeps one momentum buffer."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  momentum: Any  # like the parameters, float32 for 16-bit


class WindowState(NamedTuple):
  """State of an optimizer that averages over a window."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  window: Window  # of values like the parameters, float32 for 16-bit


def wrap_inner(
  name: str,
  inner: optax.GradientTransformation,
  state_type: Callable[..., Any],
  start: Callable[[Any], tuple],
  combine: Callable[[Any, Any], tuple],
) -> optax.GradientTransformationExtraArgs:
  """A transformation that combines the results of an inner one's local steps.

      h = x + u,        x <- combine(h)

  Args:
    name: name of the optimizer, for error texts.
    inner: the local optimizer, with the updates `u`.
    state_type: constructor of the state, of `(step, inner_state, *rest)`.
    start: from the parameters to the `rest` of the initial state.
    combine: from `h`, in the accumulation dtypes, and the state to the tuple of
      the new parameters and the `rest` of the new state.
  """
  inner = _requirements.as_inner(inner, name)

  def init_fn(params: optax.Params) -> Any:
    step = jnp.zeros([], jnp.int32)
    return state_type(step, inner.init(params), *start(params))

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    _requirements.require_params(params, name)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra
    )
    # The inner transformation runs first, at the parameters of its gradient;
    # only the result of its step is averaged.
    new, *rest = combine(_tree.local_step(params, updates), state)
    step = _averaging.next_step(state.step)
    return _tree.updates_to(new, params), state_type(step, inner_state, *rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_learning_rate(
  name: str,
  learning_rate: Any,
  state_type: Callable[..., Any],
  start: Callable[[Any], tuple],
  advance: Callable[[Any, Any, jax.Array, Any], tuple],
) -> optax.GradientTransformationExtraArgs:
  """A transformation with a step size of its own and without an inner one.

  Args:
    name: name of the optimizer, for error texts.
    learning_rate: the step size, or a schedule of it.
    state_type: constructor of the state, of `(step, *rest)`.
    start: from the parameters to the `rest` of the initial state.
    advance: from the parameters and the gradient, both in the accumulation
      dtypes, the step size and the state to the tuple of the new parameters and
      the `rest` of the new state.

  Raises:
    TypeError: if `learning_rate` is neither a real scalar nor a function.
  """
  rate = _requirements.as_learning_rate(learning_rate, name)

  def init_fn(params: optax.Params) -> Any:
    return state_type(jnp.zeros([], jnp.int32), *start(params))

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    del extra
    _requirements.require_params(params, name)
    new, *rest = advance(
      _tree.widen(params),
      _tree.widen_gradient(updates, params),
      rate(state.step),
      state,
    )
    # Differences in the accumulation dtypes: apply_updates rounds once.
    step = _averaging.next_step(state.step)
    return _tree.updates_to(new, params), state_type(step, *rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
