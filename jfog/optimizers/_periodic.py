"""Periodic global averaging: local SGD, gossip-PGA, SlowMo, DiLoCo."""

from typing import Any, NamedTuple

import jax
import optax

from jfog.optimizers import _averaging, _requirements, _tree
from jfog.optimizers._averaging import Averaging
from jfog.optimizers._transformation import WrappedState, wrap_inner
from jfog.runtime import Communicator
from jfog.topology import ExactAverage, Schedule, Topology

LocalSgdState = WrappedState


def local_sgd(
  inner: optax.GradientTransformation,
  every: int,
  *,
  mean: ExactAverage | Schedule | None = None,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes local steps and periodically averages the parameters of all ranks.

  With `u` the inner transformation's updates,

      x[i] <- mean over all ranks of x[j] + u[j]    in every `every`-th update
      x[i] <- x[i] + u[i]                           in the others

  With heterogeneous data the bias grows with `every`; `every=1` with gradient
  descent is centralized gradient descent. The inner states are not averaged.
  The averaging updates wait for all ranks.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    every: average in every `every`-th update only.
    mean: the averaging: `None` for an allreduce, or a graph whose rounds reach
      the exact average, such as `jfog.topology.ceca(size)`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if `every < 1`, or `mean` does not reach the exact average.
    TypeError: if `mean` is not a graph, or `every` is not an int.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> tx = jfog.optimizers.local_sgd(optax.sgd(0.5), every=2)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([0.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([-1.,  4.], dtype=float32), Array([1., 1.], dtype=float32))

  Source: Stich, "Local SGD converges fast and communicates little", 2018, arXiv
  1805.09767.
  """
  name = "local_sgd"
  every = _requirements.check_every(every, name)
  exact = _averaging.as_mean(mean, comm=comm, name=name)

  def combine(h: Any, state: Any) -> tuple:
    return (
      _averaging.on_schedule(
        exact, lambda h, step: h, h, state.step, every, comm
      ),
    )

  return wrap_inner(name, inner, LocalSgdState, lambda x: (), combine)


GossipPgaState = WrappedState


def gossip_pga(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging,
  every: int,
  *,
  mean: ExactAverage | Schedule | None = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages with the neighbors, and periodically with all ranks.

  With `u` the inner transformation's updates,

      x[i] <- mean over all ranks of x[j] + u[j]     in every `every`-th update
      x[i] <- sum_j W[i, j] (x[j] + u[j])            in the others

  For one global average in `every` steps, the bias with heterogeneous data is
  smaller than that of `adapt_then_combine`, above all on large sparse graphs.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    graph: the mixing graph: a `Topology`, a `Schedule`, read at the number of
      updates, those with a global average included, every round doubly
      stochastic, or a function `(params, step) -> params`.
    every: take the global average in every `every`-th update.
    mean: the global averaging, as in `local_sgd`.
    check: whether the graph must be doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`.

  Raises:
    ValueError: if the graph is not doubly stochastic in every round,
      `every < 1`, or `mean` does not reach the exact average.
    TypeError: if `graph` is neither a graph nor a function, `mean` is not a
      graph, or `every` is not an int.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.ring(4)
    >>> tx = jfog.optimizers.gossip_pga(optax.sgd(0.5), graph, every=2)
    >>> def two_steps(x):
    ...   updates, state = tx.update(0 * x, tx.init(x), x)
    ...   x += updates
    ...   return x, x + tx.update(0 * x, state, x)[0]
    >>> jfog.simulate(two_steps, 4)(jnp.array([0.0, 0.0, 3.0, 9.0]))
    (Array([3., 1., 4., 4.], dtype=float32), Array([3., 3., 3., 3.], dtype=float32))

  Source: Chen, Yuan, Zhang, Pan, Xu and Yin, "Accelerating gossip SGD with
  periodic global averaging", 2021, arXiv 2105.09080.
  """
  name = "gossip_pga"
  every = _requirements.check_every(every, name)
  average = _averaging.as_averaging(
    graph, name, check, comm, _requirements.DOUBLY_STOCHASTIC
  )
  exact = _averaging.as_mean(mean, comm=comm, name=name)

  def combine(h: Any, state: Any) -> tuple:
    return (
      _averaging.on_schedule(
        exact,
        # The graph is read at the number of all updates, not of the means.
        lambda h, _: average(h, state.step),
        h,
        state.step,
        every,
        comm,
      ),
    )

  return wrap_inner(name, inner, GossipPgaState, lambda x: (), combine)


class SlowMomentumState(NamedTuple):
  """State of `slow_momentum`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  anchor: Any  # x after the last slow step; float32 for 16-bit
  momentum: Any  # like the anchor


def slow_momentum(
  inner: optax.GradientTransformation,
  graph: Topology | Schedule | Averaging | None,
  every: int,
  slow_learning_rate: Any,
  slow_momentum: Any,
  *,
  mean: ExactAverage | Schedule | None = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Gossip or local steps, with momentum between global averages.

  With `u` the inner transformation's updates, and initially `z = x` and
  `U = 0`, in every `every`-th update

      D = z - mean over all ranks of (x + u)
      U <- b U + D,        x, z <- z - s U

  In the others, `x[i] <- sum_j W[i, j] (x[j] + u[j])`, or without a graph
  `x[i] <- x[i] + u[i]`. With `b = 0` and `s = 1` this is `gossip_pga`. `U` has
  the unit of the parameters: it is the paper's momentum times the step size.

  Args:
    inner: the local optimizer; any optax transformation. Scale, clip and decay
      in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    graph: the mixing graph between the slow steps, as in `gossip_pga`; `None`
      for local steps.
    every: take the slow step in every `every`-th update.
    slow_learning_rate: the factor `s`: a number, or an optax schedule, read at
      the number of slow steps so far. 1 in the paper.
    slow_momentum: the factor `b`, in [0, 1); 0.4 to 0.8 in the paper.
    mean: the global averaging, as in `local_sgd`.
    check: whether the graph must be doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`. Ranks should start from
    equal parameters.

  Raises:
    ValueError: if the graph is not doubly stochastic in every round,
      `every < 1`, `slow_momentum` is outside [0, 1), or `mean` does not reach
      the exact average.
    TypeError: if `graph` is neither a graph, a function nor `None`, `mean` is
      not a graph, or `every` is not an int.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> tx = jfog.optimizers.slow_momentum(optax.sgd(0.5), None, 1, 1.0, 0.5)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([4.0, 4.0]), jnp.array([2.0, 6.0]))
    (Array([2., 2.], dtype=float32), Array([-1., -1.], dtype=float32))

  Source: Wang, Tantia, Ballas and Rabbat, "SlowMo: improving
  communication-efficient distributed SGD with slow momentum", 2020, arXiv
  1910.00643.
  """
  name = "slow_momentum"
  every = _requirements.check_every(every, name)
  rate = _requirements.as_learning_rate(slow_learning_rate, name)
  _requirements.check_factor(slow_momentum, "slow_momentum", name)
  between = _between(graph, name, check, comm)
  exact = _averaging.as_mean(mean, comm=comm, name=name)

  def start(params: optax.Params) -> tuple:
    return _tree.copy(params), _tree.zeros_like(params)

  def combine(h: Any, state: Any) -> tuple:
    def slow_step(operand: tuple, count: jax.Array) -> tuple:
      h, anchor, momentum = operand
      # The paper divides this by the step size and multiplies it by that again
      # later; here the momentum has the unit of the parameters.
      change = _tree.subtract(anchor, exact(h, count))
      momentum = _tree.add(_tree.scale(slow_momentum, momentum), change)
      # All ranks now hold the same `new`, which is also the next anchor.
      new = _tree.add(anchor, _tree.scale(-rate(count), momentum))
      return new, new, momentum

    def fast_step(operand: tuple, _: jax.Array) -> tuple:
      h, anchor, momentum = operand
      # Anchor and momentum move in slow steps only.
      return between(h, state.step), anchor, momentum

    return _averaging.on_schedule(
      slow_step,
      fast_step,
      (h, state.anchor, state.momentum),
      state.step,
      every,
      comm,
    )

  return wrap_inner(name, inner, SlowMomentumState, start, combine)


class DilocoState(NamedTuple):
  """State of `diloco`."""

  step: jax.Array  # shape=(), dtype=int32, the number of updates
  inner_state: optax.OptState
  anchor: Any  # x after the last outer step; float32 for 16-bit
  outer_state: optax.OptState


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  every: int,
  graph: Topology | Schedule | Averaging | None = None,
  *,
  mean: ExactAverage | Schedule | None = None,
  check: bool = True,
  comm: Communicator | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes many local steps, then an outer step along their mean change.

  With `u` the inner transformation's updates and initially `z = x`, in every
  `every`-th update, which ends round `r`,

      D = z - mean over all ranks of (x + u)
      x, z <- z + outer.update(D)

  In the others, `x[i] <- x[i] + u[i]`. With a graph, each rank has its own `z`
  and `D[i] = z[i] - sum_j W_r[i, j] (x[j] + u[j])`. The inner state persists
  over rounds and is not sent.

  Args:
    inner: the local optimizer, `optax.adamw` in the paper. Scale, clip and
      decay in it: what an `optax.chain` puts behind this optimizer changes the
      average, too.
    outer: the optimizer of the rounds: `optax.sgd(0.7, momentum=0.9,
      nesterov=True)` in the paper. `optax.sgd(1.0)` makes this `local_sgd`.
    every: the number of updates in a round.
    graph: the mixing graph at the end of a round, in place of the mean over all
      ranks: a `Topology`, a `Schedule`, read at the number of rounds so far,
      every round doubly stochastic, or a function
      `(params, step) -> params`.
    mean: without a graph: the averaging, as in `local_sgd`.
    check: whether the graph must be doubly stochastic.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    An optax transformation; `update` needs `params`. Ranks should start from
    equal parameters.

  Raises:
    ValueError: if the graph is not doubly stochastic in every round,
      `every < 1`, `mean` does not reach the exact average, or both `graph` and
      `mean` are given.
    TypeError: if `graph` is neither a graph, a function nor `None`, `mean` is
      not a graph, or `every` is not an int.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> tx = jfog.optimizers.diloco(optax.sgd(0.5), optax.sgd(0.5), every=2)
    >>> def two_steps(x, g):
    ...   updates, state = tx.update(g, tx.init(x), x)
    ...   return x + updates, x + updates + tx.update(g, state, x + updates)[0]
    >>> jfog.simulate(two_steps, 2)(jnp.array([4.0, 4.0]), jnp.array([2.0, 0.0]))
    (Array([3., 4.], dtype=float32), Array([3.5, 3.5], dtype=float32))

  Source: Douillard et al., "DiLoCo: distributed low-communication training of
  language models", 2023, arXiv 2311.08105.
  """
  name = "diloco"
  every = _requirements.check_every(every, name)
  if graph is None:
    average = _averaging.as_mean(mean, comm=comm, name=name)
  elif mean is not None:
    raise ValueError(
      f"{name}: graph={graph!r} replaces the mean over all ranks; leave out "
      f"mean={mean!r}."
    )
  else:
    average = _between(graph, name, check, comm)
  outer = _requirements.as_inner(outer, name, "outer")

  def start(params: optax.Params) -> tuple:
    anchor = _tree.copy(params)
    return anchor, outer.init(anchor)

  def end_round(operand: tuple, count: jax.Array) -> tuple:
    h, anchor, outer_state = operand
    # The mean change of the round, with the sign of a gradient.
    change = _tree.subtract(anchor, average(h, count))
    # The outer optimizer sees the anchor as its parameters: the ranks' own h
    # differ, the anchors are equal where the average is exact.
    change, outer_state = outer.update(change, outer_state, anchor)
    new = _tree.local_step(anchor, change)
    return new, new, outer_state

  def combine(h: Any, state: Any) -> tuple:
    return _averaging.on_schedule(
      end_round,
      lambda operand, _: operand,
      (h, state.anchor, state.outer_state),
      state.step,
      every,
      comm,
    )

  return wrap_inner(name, inner, DilocoState, start, combine)


def _between(
  graph: Any, name: str, check: bool, comm: Communicator | None
) -> Averaging:
  """The averaging between global averages; the identity for `None`."""
  if graph is None:
    return lambda params, step: params
  return _averaging.as_averaging(
    graph, name, check, comm, _requirements.DOUBLY_STOCHASTIC
  )
