"""Bias-corrected averaging on symmetric graphs: exact diffusion and EXTRA."""

from typing import Any

import jax
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import (
  CorrectionState,
  WrappedCorrectionState,
  with_learning_rate,
  wrap_inner,
)
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

# Exact diffusion, EXTRA, and D2 and NIDS in contrib keep one buffer, D, whose
# mean over ranks is zero. With H = X + U and Z = H + D, exact diffusion, D2 and
# NIDS are
#
#   X+ = W Z,  D+ = D + (W Z - Z),
#
# the papers' form with psi, for psi+ = H and D = X - psi. EXTRA is
#
#   X+ = W X + U + D,  D+ = D + (W X - X) / 2.
#
# At the limit W Z = Z and W X = X hold bit for bit, so rounding errors do not
# accumulate in D. In the difference form of the papers they drift without
# bound.


ExactDiffusionState = WrappedCorrectionState


def exact_diffusion(
  inner: optax.GradientTransformation,
  topology: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Corrects the local step by the error of the last one, then averages.

  With `u` the inner transformation's updates and `Wb = (I + W) / 2`,

      psi+[i] = x[i] + u[i]
      x[i] <- sum_j Wb[i, j] (psi+[j] + x[j] - psi[j])

  where `psi` is the last step's `psi+`, initially `x`. With
  `inner = optax.sgd(a)`, constant `a` and exact gradients, all ranks converge
  to the minimizer of the sum of all losses for `a < 2 / L` on any graph, however
  heterogeneous the data. One average per step, as in `adapt_then_combine`; the
  state holds one copy of the parameters.

  Args:
    inner: the local optimizer; any optax transformation. The method is exact
      for plain gradient descent. Scale, clip and decay in it: what an
      `optax.chain` puts behind this optimizer changes the average, too.
    topology: the mixing graph: a symmetric `Topology`, or a function
      `(params, step) -> params`.
    check: whether the topology must be one symmetric, doubly stochastic
      `Topology`. Without the check, round `step` of a `Schedule` is used.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic; the
      method diverges on large directed graphs.
    TypeError: if `topology` is neither a `Topology` nor a function.

  Example:
    >>> import jax, jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.ring(3)
    >>> tx = jfog.optimizers.exact_diffusion(optax.sgd(0.5), graph)
    >>> def train(target):
    ...   def step(k, carry):
    ...     x, state = carry
    ...     updates, state = tx.update(x - target, state, x)
    ...     return x + updates, state
    ...   x = jnp.zeros_like(target)
    ...   return jax.lax.fori_loop(0, 100, step, (x, tx.init(x)))[0]
    >>> jfog.simulate(train, 3)(jnp.array([0.0, 3.0, 6.0])).round(4)
    Array([3., 3., 3.], dtype=float32)

  Source: Yuan, Ying, Zhao and Sayed, "Exact diffusion for distributed
  optimization and learning", 2018, arXiv 1702.05122.
  """
  name = "exact_diffusion"
  average = _averaging.as_averaging(
    topology, name, check, comm, _requirements.SYMMETRIC, lazy=True
  )
  return diffusion(name, ExactDiffusionState, inner, average)


def diffusion(
  name: str,
  state_type: type,
  inner: optax.GradientTransformation,
  average: Averaging,
) -> optax.GradientTransformationExtraArgs:
  """The transformation `X+ = W Z`, `D+ = D + (W Z - Z)`, `Z = X + U + D`."""

  def combine(h: Any, state: Any) -> tuple:
    return correct(average, h, state.correction, step=state.step)

  return wrap_inner(name, inner, state_type, no_correction, combine)


def correct(
  average: Averaging, local: Any, correction: Any, *, step: jax.Array
) -> tuple:
  """`W Z` and `D + (W Z - Z)`, for `Z = H + D`."""
  corrected = _tree.add(local, correction)
  new = average(corrected, step)
  change = _tree.subtract(new, corrected)
  return new, _tree.add(correction, change)


def no_correction(params: optax.Params) -> tuple:
  """Zero correction, the initial state."""
  return (_tree.zeros_like(params),)


ExtraState = CorrectionState


def extra(
  learning_rate: Any,
  topology: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Decentralized gradient descent with a correction of its own error.

  With the step size `a`, with one row per rank,

      x[1] = W x[0] - a g[0]
      x[k+1] = (I + W) x[k] - (I + W)/2 x[k-1] - a (g[k] - g[k-1])

  All ranks converge to the minimizer of the sum of all losses for
  `a < (1 + lambda_min) / L`. As in `adapt_with_combine` the average does not
  depend on the gradient, so the exchange can overlap with the forward and
  backward pass.
  With a schedule, `a g[k]` is the product of step `k`, which keeps the limit at
  the minimizer.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule.
    topology: the mixing graph: a symmetric `Topology` with
      `lambda_min > -1`, or a function `(params, step) -> params`.
    check: whether the topology must meet this and be one `Topology`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic, or has
      the eigenvalue -1.
    TypeError: if `topology` is neither a `Topology` nor a function, or
      `learning_rate` is neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> tx = jfog.optimizers.extra(0.5, jfog.topology.fully_connected(2))
    >>> def two_steps(x, grad):
    ...   updates, state = tx.update(grad, tx.init(x), x)
    ...   x += updates
    ...   return x, x + tx.update(grad, state, x)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([1., 2.], dtype=float32), Array([1.5, 0.5], dtype=float32))

  Source: Shi, Ling, Wu and Yin, "EXTRA: an exact first-order algorithm for
  decentralized consensus optimization", 2015, arXiv 1404.6264.
  """
  name = "extra"
  average = _averaging.as_averaging(
    topology,
    name,
    check,
    comm,
    _requirements.symmetric_above(-1.0, "use topology.lazy()"),
  )

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    mixed = average(x, state.step)
    force = _tree.add(state.correction, _tree.scale(-rate, gradient))
    half = _tree.scale(0.5, _tree.subtract(mixed, x))
    return (
      _tree.add(mixed, force),
      _tree.add(state.correction, half),
    )

  return with_learning_rate(
    name, learning_rate, ExtraState, no_correction, advance
  )
