"""Gradient tracking: exact on directed and time-varying graphs."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import with_learning_rate
from jfog.runtime import Communicator
from jfog.topology import Schedule, Topology

_FORMS = ("awc", "atc")


class GradientTrackingState(NamedTuple):
  """State of `gradient_tracking`.

  The tracker is `sum_j W[i, j] q[j]` in the form "awc" and `q` in "atc".
  """

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  tracker: Any  # like the parameters, float32 for 16-bit
  gradient: Any  # of the last update; like the parameters, float32 for 16-bit


def gradient_tracking(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging,
  form: Literal["awc", "atc"] = "awc",
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Steps along a tracked estimate of the mean gradient.

  With `inner = optax.sgd(a)`, one row per rank and `Q[0] = G[0]`,

      "awc":  X+ = W X - a Q        Q+ = W Q + G+ - G
      "atc":  X+ = W (X - a Q)      Q+ = W (Q + G+ - G)

  The mean of `q` over ranks equals the mean of the gradients in every step. All
  ranks converge to the minimizer of the sum of all losses, also on directed and
  time-varying graphs, for a step size small enough for the graph.

  A rank sends twice the bytes of `adapt_then_combine`. "awc" sends `x` and `q`
  in one message per out-neighbor, and the exchange of `x` can overlap with the
  computation of the gradient. "atc" has two exchanges in sequence (one in the
  first step) and allows larger steps.

  Args:
    inner: the local optimizer, with `q` in place of the gradient; any optax
      transformation. Scale, clip and decay in it: what an `optax.chain` puts
      behind this optimizer changes the average, too.
    graph: the mixing graph: a `Topology` or a `Schedule`, every round
      doubly stochastic, or a function `(params, step) -> params`.
    form: "awc" or "atc".
    check: whether the graph must be doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not doubly stochastic in every round, or
      `form` is neither of the two.
    TypeError: if `graph` is neither a graph nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.gradient_tracking(optax.sgd(0.5), graph, "atc")
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([1.5, 1.5], dtype=float32), Array([1., 1.], dtype=float32))

  Source: Nedic, Olshevsky and Shi, "Achieving geometric convergence for
  distributed optimization over time-varying graphs", 2017, arXiv 1607.03218
  (DIGing, "awc"); Xu, Zhu, Soh and Xie, "Augmented distributed gradient
  methods", 2015 (Aug-DGM, "atc"); Di Lorenzo and Scutari, "NEXT", 2016.
  """
  name = "gradient_tracking"
  if form not in _FORMS:
    raise ValueError(f'{name}: form={form!r} must be "awc" or "atc".')
  average = _averaging.as_averaging(
    graph, name, check, comm, _requirements.DOUBLY_STOCHASTIC
  )
  inner = _requirements.as_inner(inner, name)

  def init_fn(params: optax.Params) -> Any:
    return GradientTrackingState(
      jnp.zeros([], jnp.int32),
      inner.init(params),
      _tree.zeros_like(params),
      _tree.zeros_like(params),
    )

  def local(
    tracker: Any, updates: Any, state: Any, params: Any, extra: dict
  ) -> tuple:
    # The inner state has the dtypes of the gradients; the tracker may be wider.
    tracked = jax.tree.map(
      lambda q, g: q.astype(jnp.result_type(g)), tracker, updates
    )
    return inner.update(tracked, state.inner_state, params, **extra)

  def combine_while_adapting(
    updates: Any, state: Any, params: Any, extra: dict
  ) -> tuple:
    gradient = _tree.widen_gradient(updates, params)
    tracker = _tracked(state, gradient)
    updates, inner_state = local(tracker, updates, state, params, extra)
    own = _tree.widen(params)
    # One exchange of the pair: a single message per out-neighbor.
    combined, tracker = average((own, tracker), state.step)
    updates = _tree.local_step(_tree.subtract(combined, own), updates)
    return updates, inner_state, tracker, gradient

  def combine_after_adapting(
    updates: Any, state: Any, params: Any, extra: dict
  ) -> tuple:
    # Q[0] = G[0] is not averaged: the first update has one exchange less.
    gradient = _tree.widen_gradient(updates, params)
    tracker = _averaging.after_first(
      average,
      lambda tracker, step: tracker,
      _tracked(state, gradient),
      state.step,
      comm,
    )
    updates, inner_state = local(tracker, updates, state, params, extra)
    new = average(_tree.local_step(params, updates), state.step)
    return _tree.updates_to(new, params), inner_state, tracker, gradient

  update = combine_while_adapting if form == "awc" else combine_after_adapting

  def update_fn(
    updates: optax.Updates, state: Any, params: Any = None, **extra: Any
  ) -> tuple[optax.Updates, Any]:
    _requirements.require_params(params, name)
    updates, *rest = update(updates, state, params, extra)
    step = _averaging.next_step(state.step)
    return updates, GradientTrackingState(step, *rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tracked(state: Any, gradient: Any) -> Any:
  """`q + g - g_before`, which is `g` in the first update."""
  return _tree.add(state.tracker, _tree.subtract(gradient, state.gradient))


class PushPullState(NamedTuple):
  """State of `push_pull`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  tracker: Any  # like the parameters, float32 for 16-bit
  gradient: Any  # of the last update; like the parameters, float32 for 16-bit


def push_pull(
  learning_rate: Any,
  pull: Topology | Schedule | Averaging,
  push: Topology | Schedule | Averaging,
  *,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Pulls parameters from in-neighbors, pushes gradients to out-neighbors.

  With the mixing matrices `R` of `pull` and `C` of `push`, the step size `a`,
  one row per rank and `Y[0] = G[0]`,

      X+ = R (X - a Y)        Y+ = C (Y + G+ - G)

  The sum of `y` over ranks equals that of the gradients in every step. All
  ranks converge to the minimizer of the sum of all losses on directed graphs
  without doubly stochastic weights, for a step size small enough for the
  graphs. Two exchanges in sequence (one in the first step), twice the bytes of
  `adapt_then_combine`.

  Args:
    learning_rate: the step size `a`: a number, or an optax schedule.
    pull: the row-stochastic graph on which parameters are averaged, or a
      function `(params, step) -> params`.
    push: the column-stochastic graph on which gradients are sent, for example
      `pull.transpose()`, the same edges reversed.
    check: whether `pull` must be row- and `push` column-stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if `pull` is not row-stochastic or `push` not column-stochastic.
    TypeError: if one is neither a graph nor a function, or `learning_rate` is
      neither a number nor a function.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(2)
    >>> tx = jfog.optimizers.push_pull(0.5, graph, graph)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([1.5, 1.5], dtype=float32), Array([1., 1.], dtype=float32))

  Source: Xin and Khan, "A linear algorithm for optimization over directed
  graphs with geometric convergence", 2018 (AB); Pu, Shi, Xu and Nedic,
  "Push-pull gradient methods", 2021, arXiv 1810.06653.
  """
  name = "push_pull"
  pulled = _averaging.as_averaging(
    pull, f"{name}: pull", check, comm, _requirements.ROW_STOCHASTIC
  )
  pushed = _averaging.as_averaging(
    push, f"{name}: push", check, comm, _requirements.COLUMN_STOCHASTIC
  )

  def start(params: optax.Params) -> tuple:
    return _tree.zeros_like(params), _tree.zeros_like(params)

  def advance(x: Any, gradient: Any, rate: Any, state: Any) -> tuple:
    # Y[0] = G[0] is not sent: the first update has one exchange less.
    tracker = _averaging.after_first(
      pushed,
      lambda tracker, step: tracker,
      _tracked(state, gradient),
      state.step,
      comm,
    )
    local = _tree.add(x, _tree.scale(-rate, tracker))
    return pulled(local, state.step), tracker, gradient

  return with_learning_rate(name, learning_rate, PushPullState, start, advance)
