"""A check that the updates of an optimizer are applied as it returned them."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog import _dtypes

_PROBES = 8  # elements of each leaf that are compared


class CheckedState(NamedTuple):
  """State of `check_applied_updates`."""

  inner_state: optax.OptState
  expected: (
    Any  # for each leaf: elements of the next parameters, and their scale
  )
  started: jax.Array  # shape=(), dtype=bool: there was an update


def check_applied_updates(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`tx`, with a check that its updates are applied as it returned them.

  The updates of a decentralized optimizer contain the average: what scales,
  clips or masks them behind it, as in `optax.chain(tx, optax.scale(-lr))`, changes
  the average as well, in silence. This transformation remembers 8 elements of each
  leaf of `params + updates`. Where the parameters of the next call have others,
  its updates are NaN and one line on standard error says why. The check costs a
  few microseconds of device time for each leaf. Nothing is communicated.

  Args:
    tx: an optimizer of `jfog.optimizers`, or any optax transformation.

  Returns:
    A transformation with the updates of `tx`. It has to be the last of an
    `optax.chain`, as `tx` itself. Its state is a `CheckedState` around that of `tx`.

  Raises:
    ValueError: in the update, if `params` is missing.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> world = jfog.init()
    >>> average = jfog.optimizers.adapt_then_combine(
    ...     optax.sgd(0.5), jfog.topology.fully_connected(1))
    >>> tx = jfog.diagnostics.check_applied_updates(average)
    >>> params = jnp.ones(2)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...   updates, state = tx.update(jnp.ones(2), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> params
    Array([0., 0.], dtype=float32)

  Source: jfog.
  """
  inner = optax.with_extra_args_support(tx)

  def init_fn(params: optax.Params) -> CheckedState:
    expected = jax.tree.map(lambda x: _expect(x, x), params)
    return CheckedState(inner.init(params), expected, jnp.zeros([], bool))

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, CheckedState]:
    if params is None:
      raise ValueError(
        "check_applied_updates: params is missing; call tx.update(grads, state, "
        "params)."
      )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    differ = jax.tree.leaves(jax.tree.map(_differs, params, state.expected))
    changed = jnp.any(jnp.array([False, *differ])) & state.started
    jax.debug.callback(_report, changed)
    updates = jax.tree.map(
      lambda u: jnp.where(changed, jnp.nan, u).astype(u.dtype), updates
    )
    new = optax.apply_updates(params, updates)
    expected = jax.tree.map(_expect, params, new)
    return updates, CheckedState(inner_state, expected, jnp.ones([], bool))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _probe(x: jax.Array) -> jax.Array:
  """At most 8 elements of a leaf, evenly spread."""
  flat = x.ravel()
  if x.size <= _PROBES:
    return jnp.copy(flat)  # a state does not alias the parameters
  return flat[np.linspace(0, x.size - 1, _PROBES).astype(int)]


def _expect(x: Any, new: Any) -> tuple[jax.Array, jax.Array]:
  """The elements of `new`, and the largest that its rounding depends on."""
  x, new = _probe(jnp.asarray(x)), _probe(jnp.asarray(new))
  largest = jnp.maximum(jnp.abs(x), jnp.abs(new)).max(initial=0)
  return new, _dtypes.accumulated(largest)


def _differs(x: Any, expected: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Whether elements differ by more than a compiler's rounding."""
  x = _probe(jnp.asarray(x))
  new, largest = expected
  difference = _dtypes.accumulated(x) - _dtypes.accumulated(new)
  # NaN in both does not count: it has another cause.
  return jnp.any(jnp.abs(difference) > 8 * jnp.finfo(x.dtype).eps * largest)


def _report(changed: Any) -> None:
  if np.any(changed):
    print(
      "jfog.diagnostics.check_applied_updates: the parameters are not those of "
      "the last update; apply the updates of the optimizer as they are, and put "
      "what scales, clips or decays into its inner transformation.",
      file=sys.stderr,
      flush=True,
    )
