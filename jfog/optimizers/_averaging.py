"""What all averaging optimizers share: the average, its rhythm, its checks."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jfog.primitives import (
  allreduce,
  finite_time_average,
  neighbor_allreduce,
  uniform,
  varying,
)
from jfog.runtime import Communicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology

# A function (params, step) -> params, of any pytrees of arrays; `step` counts
# communications.
Averaging = Callable[[Any, jax.Array], Any]

# Checks what a method needs of its graph; the text names the method.
Requirement = Callable[[Topology | Schedule, str], None]

_TOLERANCE = 1e-9  # of an eigenvalue at its bound


def require_row_stochastic(graph: Topology | Schedule, name: str) -> None:
  """Checks that averages have weights that sum to 1.

  Raises:
    ValueError: if a row of a round does not sum to 1.
  """
  if not graph.is_row_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not row-stochastic: averages need weights that sum "
      f"to 1 for every receiver; use weights='metropolis_hastings', or "
      f"check=False."
    )


def check_row_stochastic(graph: Topology | Schedule, name: str) -> None:
  """The same, and warns of an average that is not the plain one.

  Raises:
    ValueError: if a row of a round does not sum to 1.
  """
  require_row_stochastic(graph, name)
  if not graph.is_doubly_stochastic:
    pi = np.array2string(
      np.asarray(graph.stationary_distribution), precision=4, threshold=8
    )
    warnings.warn(
      f"{name}: {graph!r} is row-stochastic but not doubly stochastic, so the "
      f"ranks agree on the average weighted with pi = {pi} instead of 1/n; use "
      f"weights='metropolis_hastings' for the plain average.",
      UserWarning,
      stacklevel=4,
    )


def check_doubly_stochastic(graph: Topology | Schedule, name: str) -> None:
  """Checks that every round of averaging keeps the mean.

  Raises:
    ValueError: if a row or a column of a round does not sum to 1.
  """
  if not graph.is_doubly_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not doubly stochastic: {name} needs weights that "
      f"sum to 1 for every receiver and for every sender; use "
      f"weights='metropolis_hastings', or check=False."
    )


def check_column_stochastic(graph: Topology | Schedule, name: str) -> None:
  """Checks that what is sent and kept of each value sums to it.

  Raises:
    ValueError: if a column of a round does not sum to 1.
  """
  if not graph.is_column_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not column-stochastic: sums stay as they are where "
      f"the weights of what a sender keeps and sends sum to 1; use "
      f"jfog.topology.from_networkx(graph, weights='uniform_out'), or "
      f"check=False."
    )


def check_symmetric(graph: Topology | Schedule, name: str) -> None:
  """Checks that a graph is doubly stochastic and its weights are symmetric.

  Raises:
    ValueError: if they are not, in any round.
  """
  check_doubly_stochastic(graph, name)
  if not graph.is_symmetric:
    raise ValueError(
      f"{name}: {graph!r} is not symmetric: {name} may diverge on it; use a "
      f"graph with W[i, j] == W[j, i] such as jfog.topology.ring(size), another "
      f"method such as gradient_tracking, or check=False."
    )


def symmetric_above(bound: float, remedy: str) -> Requirement:
  """Checks that a graph is symmetric with all eigenvalues above `bound`."""

  def check(graph: Topology | Schedule, name: str) -> None:
    check_symmetric(graph, name)
    least = min(np.real(t.eigenvalues).min() for t in graph.rounds)
    if least <= bound + _TOLERANCE:
      raise ValueError(
        f"{name}: {graph!r} has the least eigenvalue lambda_min = {least:.6g}, "
        f"and {name} needs one above {bound:.4g}; {remedy}, or check=False."
      )

  return check


def as_averaging(
  graph: Topology | Schedule | Averaging,
  *,
  comm: Communicator | None,
  check: bool,
  name: str,
  requirement: Requirement = check_row_stochastic,
  static: bool = False,
  lazy: bool = False,
) -> Averaging:
  """The averaging that an optimizer was given, as a function.

  Args:
    graph: the averaging.
    comm: the communicator.
    check: whether a graph is checked.
    name: the optimizer's, for error texts.
    requirement: what is checked.
    static: whether a `Schedule` is refused, unless `check` is off.
    lazy: whether to average with `(I + W) / 2` instead of `W`.

  Raises:
    TypeError: if `graph` is neither a graph nor a function.
    ValueError: if a graph does not meet the requirement and `check` is set.
  """
  if isinstance(graph, (Topology, Schedule)):
    if check and static:
      require_topology(graph, name)
    if check:
      requirement(graph, name)
    used = graph.lazy() if lazy else graph
    return lambda params, step: neighbor_allreduce(
      params, used, step, comm=comm
    )
  if isinstance(graph, ExactAverage):
    raise TypeError(
      f"{name}: {graph!r} takes several rounds and has no mixing matrix; pass a "
      f"function that runs it, or jfog.topology.base_k(size, k)."
    )
  if callable(graph):
    if not lazy:
      return graph
    return lambda params, step: jax.tree.map(
      lambda x, y: x + (y - x) / 2, params, graph(params, step)
    )
  raise TypeError(
    f"{name}: graph={graph!r} is {type(graph).__name__}; pass a Topology, a "
    f"Schedule, or a function (params, step) -> params."
  )


def require_topology(topology: Any, name: str) -> None:
  """Refuses what is not one fixed topology.

  Raises:
    TypeError: naming what it is.
  """
  if not isinstance(topology, Topology):
    raise TypeError(
      f"{name}: topology={topology!r} is {type(topology).__name__}; {name} needs "
      f"one that stays the same, so pass a jfog.topology.Topology."
    )


def as_mean(
  exact: ExactAverage | Schedule | None,
  *,
  comm: Communicator | None,
  name: str,
) -> Averaging:
  """The mean over all ranks, as a function `(params, step) -> params`.

  Args:
    exact: a graph that reaches it in several rounds; an allreduce without.
    comm: the communicator.
    name: the optimizer's, for error texts.

  Raises:
    TypeError: if `exact` is no such graph.
    ValueError: if `exact` does not reach the mean.
  """
  if exact is None:
    return lambda params, step: differing(allreduce(params, comm=comm), comm)
  if not isinstance(exact, (ExactAverage, Schedule, Topology)):
    raise TypeError(
      f"{name}: mean={exact!r} is {type(exact).__name__}; pass a graph that "
      f"reaches the exact average, jfog.topology.ceca(size) or base_k(size, k), "
      f"or None for an allreduce."
    )
  if (
    not isinstance(exact, ExactAverage)
    and exact.rounds_to_exact_average() is None
  ):
    raise ValueError(
      f"{name}: mean={exact!r} never reaches the exact average; pass "
      f"jfog.topology.ceca(size) or base_k(size, k), or None for an allreduce."
    )
  return lambda params, step: finite_time_average(params, exact, comm=comm)


def as_learning_rate(
  learning_rate: Any, name: str
) -> Callable[[jax.Array], Any]:
  """A learning rate, or an optax schedule of it, as a function of the step.

  Raises:
    TypeError: if it is neither a real scalar nor a function.
  """
  if callable(learning_rate):
    return learning_rate
  real = isinstance(learning_rate, (int, float, np.number)) or (
    isinstance(learning_rate, (np.ndarray, jax.Array))
    and learning_rate.shape == ()
    and jnp.issubdtype(learning_rate.dtype, jnp.number)
  )
  if isinstance(learning_rate, (bool, complex)) or not real:
    raise TypeError(
      f"{name}: learning_rate={learning_rate!r} must be a number, or a schedule: "
      f"a function from the step to a number."
    )
  return lambda step: learning_rate


def check_every(every: int, name: str) -> int:
  """Checks the number of updates from one communication to the next."""
  if isinstance(every, bool) or not isinstance(every, (int, np.integer)):
    raise TypeError(f"{name}: every={every!r} must be an int.")
  if every < 1:
    raise ValueError(f"{name}: every={every} must be at least 1.")
  return int(every)


def check_factor(value: Any, argument: str, name: str) -> None:
  """Checks that a factor of momentum lies in [0, 1).

  Raises:
    ValueError: if it does not; a traced one is not looked at.
  """
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"{name}: {argument}={value!r} must be in [0, 1).")


def on_schedule(
  communicate: Callable[[Any, jax.Array], Any],
  otherwise: Callable[[Any, jax.Array], Any],
  operand: Any,
  step: jax.Array,
  every: int,
  comm: Communicator | None,
  *,
  differ: bool = True,
) -> Any:
  """Communicates in the updates with `(step + 1) % every == 0`.

  Both functions get `operand` and the number of communications before this
  update. One program serves both kinds of updates. What is the same on all ranks
  may stay so, for a `shard_map`, without `differ`.
  """
  if every == 1:
    return communicate(operand, step)
  due = uniform((step + 1) % every == 0, resolve(comm))
  operand = differing(operand, comm) if differ else operand
  return jax.lax.cond(due, communicate, otherwise, operand, step // every)


def after_first(
  communicate: Callable[[Any, jax.Array], Any],
  otherwise: Callable[[Any, jax.Array], Any],
  operand: Any,
  step: jax.Array,
  comm: Communicator | None,
) -> Any:
  """Communicates in all updates but the first.

  Both functions get `operand` and the number of communications before this
  update.
  """
  is_later = uniform(step > 0, resolve(comm))
  operand = differing(operand, comm)
  return jax.lax.cond(
    is_later, communicate, otherwise, operand, jnp.maximum(step - 1, 0)
  )


def differing(tree: Any, comm: Communicator | None) -> Any:
  """Marks values as different on each rank, where a `shard_map` checks that.

  Both branches of a `cond` then have one type, also in a first update whose
  operand is still the same on all ranks.
  """
  here = resolve(comm)
  return jax.tree.map(lambda x: varying(x, here), tree)


def next_step(step: jax.Array) -> jax.Array:
  """`step + 1`, which stays at the greatest int32 once it is there."""
  return jnp.asarray(optax.safe_increment(step))


def accumulated(x: Any) -> jax.Array:
  """`x` in the dtype in which it is averaged: float32 for 16-bit floats."""
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
    return x.astype(jnp.float32)
  return x


def own(params: optax.Params) -> Any:
  """The parameters in the accumulation dtype."""
  return jax.tree.map(accumulated, params)


def gradient(updates: optax.Updates, params: optax.Params) -> Any:
  """The gradient in the accumulation dtype of the parameters."""
  return jax.tree.map(
    lambda g, x: jnp.asarray(g).astype(accumulated(x).dtype), updates, params
  )


def copied(params: optax.Params) -> Any:
  """A copy of the parameters in the accumulation dtype.

  So that a step may be given the parameters and the state to overwrite both.
  """
  return jax.tree.map(jnp.copy, own(params))


def zeros(params: optax.Params) -> Any:
  """Zeros like the parameters, in the accumulation dtype."""
  return jax.tree.map(lambda x: jnp.zeros_like(accumulated(x)), params)


def times(factor: Any, tree: Any) -> Any:
  """`factor` times every leaf, in the leaf's dtype."""
  return jax.tree.map(lambda x: jnp.asarray(factor, _real(x.dtype)) * x, tree)


def plus(*trees: Any) -> Any:
  """The sum of trees, from the left."""
  return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def over(tree: Any, divisor: jax.Array) -> Any:
  """Every leaf divided by a scalar, in the leaf's dtype."""
  return jax.tree.map(lambda x: (x / divisor).astype(x.dtype), tree)


def minus(left: Any, right: Any) -> Any:
  """`left - right`."""
  return jax.tree.map(lambda x, y: x - y, left, right)


def local_step(params: optax.Params, updates: optax.Updates) -> optax.Params:
  """`h = x + u` in the accumulation dtype."""
  return jax.tree.map(
    lambda x, u: accumulated(x) + jnp.asarray(u).astype(accumulated(x).dtype),
    params,
    updates,
  )


def difference(new: optax.Params, params: optax.Params) -> optax.Updates:
  """The updates that take `params` to `new`, in the accumulation dtype."""
  return jax.tree.map(lambda y, x: y - accumulated(x), new, params)


def require_params(params: Any, name: str) -> None:
  """Refuses an update without the parameters, or with such as do not average.

  Raises:
    ValueError: if `params` is `None`.
    TypeError: naming the first integer or bool leaf.
  """
  if params is None:
    raise ValueError(
      f"{name} averages parameters and needs them; call "
      f"tx.update(grads, state, params)."
    )
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"{name}: the leaf params{jax.tree_util.keystr(path)} has dtype "
        f"{dtype}, which holds no fractions; cast it to a float dtype, or leave "
        f"it out by optax.masked."
      )


def _real(dtype: Any) -> Any:
  return jnp.finfo(dtype).dtype
