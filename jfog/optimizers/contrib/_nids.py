"""NIDS: exact diffusion with a first step without communication."""

from typing import Any

import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._bias_corrected import correct, no_correction
from jfog.optimizers._transformation import CorrectionState, with_learning_rate
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

NidsState = CorrectionState


def nids(
  learning_rate: Any,
  topology: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Exact diffusion after a first step without communication.

  With `Wb = (I + W) / 2` and the step size `a`,

      x[1] = x[0] - a g[0]
      x[k+1] = Wb (2 x[k] - x[k-1] - a (g[k] - g[k-1]))

  with one row per rank. All ranks converge to the minimizer of the sum of all
  losses for `a < 2 / L`. With a schedule, `a g[k]` is the product of step `k`,
  which keeps the limit at the minimizer.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule.
    topology: as in `exact_diffusion`.
    check: as in `exact_diffusion`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the topology is not symmetric and doubly stochastic.
    TypeError: if `topology` is neither a `Topology` nor a function, or
      `learning_rate` is neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> tx = jfog.optimizers.nids(0.5, jfog.topology.fully_connected(2))
    >>> def two_steps(x, grad):
    ...   updates, state = tx.update(grad, tx.init(x), x)
    ...   x += updates
    ...   return x, x + tx.update(grad, state, x)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([-1.,  4.], dtype=float32), Array([-0.5,  2.5], dtype=float32))

  Source: Li, Shi and Yan, "A decentralized proximal-gradient method with
  network independent step-sizes", 2019, arXiv 1704.07807, with `c = 1 / (2 a)`.
  """
  name = "nids"
  average = _averaging.as_averaging(
    topology, name, check, comm, _requirements.SYMMETRIC, lazy=True
  )

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    # psi = x - a g, the point that exact diffusion corrects by psi - psi_prev.
    local = _tree.add(x, _tree.scale(-rate, gradient))
    # The first update is a plain local step; its correction stays zero.
    return _averaging.after_first(
      lambda operand, step: correct(average, *operand, step=step),
      lambda operand, step: operand,
      (local, state.correction),
      state.step,
      comm,
    )

  return with_learning_rate(
    name, learning_rate, NidsState, no_correction, advance
  )
