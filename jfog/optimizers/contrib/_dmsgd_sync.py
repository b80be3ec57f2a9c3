"""DmSGD with synchronized momentum."""

from typing import Any

import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._momentum import at_rest
from jfog.optimizers._transformation import MomentumState, with_learning_rate
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

DmsgdSyncState = MomentumState


def dmsgd_sync(
  learning_rate: Any,
  momentum: Any,
  graph: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum that is averaged together with the parameters.

  With the step size `a`, the momentum `b`, `M` initially zero and one row per
  rank,

      X+ = W (X - a M)      M+ = W (b M + G)

  with the old `M` in both. Parameters and momentum are sent in one message per
  out-neighbor, twice the bytes of `adapt_then_combine`. The gradient acts one
  step later. The bias with heterogeneous data is smaller than that of momentum
  inside of `adapt_then_combine`.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule.
    momentum: `b`, in [0, 1).
    graph: the mixing graph: a `Topology`, a `Schedule` or a function
      `(params, step) -> params`.
    check: whether the graph must be row-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not row-stochastic, or `momentum` is outside
      [0, 1).
    TypeError: if `graph` is neither a graph nor a function, or `learning_rate`
      is neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.dmsgd_sync(0.5, 0.5, graph)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([2., 2.], dtype=float32), Array([1.5, 1.5], dtype=float32))

  Source: Ying, Yuan, Chen, Hu, Pan and Yin, "Exponential graph is provably
  efficient for decentralized deep training", 2021, arXiv 2110.13363.
  """
  name = "dmsgd_sync"
  _requirements.check_factor(momentum, "momentum", name)
  average = _averaging.as_averaging(graph, name, check, comm)

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    # The momentum of the last update moves x; this gradient enters the
    # momentum, and x in the next update.
    local = _tree.add(x, _tree.scale(-rate, state.momentum))
    trace = _tree.add(_tree.scale(momentum, state.momentum), gradient)
    # One exchange of the pair: a single message per out-neighbor.
    return average((local, trace), state.step)

  return with_learning_rate(
    name, learning_rate, DmsgdSyncState, at_rest, advance
  )
