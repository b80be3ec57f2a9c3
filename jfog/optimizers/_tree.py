"""Arithmetic on parameter trees, in the accumulation dtype of each leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfog import _dtypes

# `optax.tree_utils` where it has the same bits. `add` and `scale` are our own:
# `tree_add` starts from the int 0, which turns -0.0 into 0.0, and `tree_scale`
# promotes a leaf to the dtype of a wider scalar, under another name before
# optax 0.2.5.
subtract = optax.tree_utils.tree_sub


def widen(params: optax.Params) -> Any:
  """The parameters in their accumulation dtypes."""
  return jax.tree.map(_dtypes.accumulated, params)


def widen_gradient(updates: optax.Updates, params: optax.Params) -> Any:
  """The gradient in the accumulation dtypes of the parameters."""
  return jax.tree.map(_cast, updates, params)


def copy(params: optax.Params) -> Any:
  """A copy of the parameters in their accumulation dtypes.

  A state must not alias the parameters: `jax.jit` may then donate both.
  """
  return jax.tree.map(jnp.copy, widen(params))


def zeros_like(params: optax.Params) -> Any:
  """Zeros like the parameters, in their accumulation dtypes."""
  return optax.tree_utils.tree_zeros_like(widen(params))


def add(*trees: Any) -> Any:
  """The sum of trees, from left to right."""
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def scale(factor: Any, tree: Any) -> Any:
  """`factor` times every leaf, in the leaf's dtype."""
  return jax.tree.map(
    lambda x: jnp.asarray(factor, _dtypes.real(x.dtype)) * x, tree
  )


def divide(tree: Any, divisor: jax.Array) -> Any:
  """Every leaf divided by a scalar, in the leaf's dtype."""
  return jax.tree.map(lambda x: (x / divisor).astype(x.dtype), tree)


def local_step(params: optax.Params, updates: optax.Updates) -> optax.Params:
  """`h = x + u` in the accumulation dtypes of `x`."""
  return jax.tree.map(
    lambda x, u: _dtypes.accumulated(x) + _cast(u, x), params, updates
  )


def updates_to(new: optax.Params, params: optax.Params) -> optax.Updates:
  """The updates from `params` to `new`, in the accumulation dtypes."""
  return jax.tree.map(lambda y, x: y - _dtypes.accumulated(x), new, params)


def _cast(value: Any, x: Any) -> jax.Array:
  """`value` in the accumulation dtype of `x`."""
  return jnp.asarray(value).astype(_dtypes.accumulated(x).dtype)
