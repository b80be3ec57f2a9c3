"""Averages over graphs and over all ranks, and the steps in which they run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jfog import _validation
from jfog.optimizers._requirements import (
  AVERAGING,
  Requirement,
  require_topology,
)
from jfog.primitives import (
  allreduce,
  finite_time_average,
  neighbor_allreduce,
  uniform,
  varying,
)
from jfog.runtime import Communicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology

# A function (params, step) -> params of pytrees of arrays, collective over the
# ranks that it averages; `step` counts communications.
Averaging = Callable[[Any, jax.Array], Any]


def as_averaging(
  graph: Topology | Schedule | Averaging,
  name: str,
  check: bool,
  comm: Communicator | None,
  requirement: Requirement = AVERAGING,
  lazy: bool = False,
) -> Averaging:
  """The `graph` argument of an optimizer as an averaging.

  Args:
    graph: a graph, whose `neighbor_allreduce` is the averaging, or an
      averaging.
    name: name of the optimizer, for error texts.
    check: whether to check the requirement.
    comm: the communicator.
    requirement: properties that a graph must have.
    lazy: whether to average with `(I + W) / 2` instead of `W`.

  Raises:
    TypeError: if `graph` is neither a graph nor a function, or a `Schedule`
      where the requirement is static.
    ValueError: if a graph does not meet the requirement.
  """
  if isinstance(graph, (Topology, Schedule)):
    if check and requirement.static:
      require_topology(graph, name)
    if check:
      requirement.check(graph, name)
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
    # (I + W) / 2 applied to the result of the function, W x.
    return lambda params, step: jax.tree.map(
      lambda x, y: x + (y - x) / 2, params, graph(params, step)
    )
  raise TypeError(
    f"{_validation.unlike_graph(graph, f'{name}: graph')}; or pass a function "
    f"(params, step) -> params."
  )


def as_mean(
  exact: ExactAverage | Schedule | None,
  *,
  comm: Communicator | None,
  name: str,
) -> Averaging:
  """The mean over all ranks as a function `(params, step) -> params`.

  Args:
    exact: a graph that reaches the mean in finitely many rounds; `None` for an
      allreduce.
    comm: the communicator.
    name: name of the optimizer, for error texts.

  Raises:
    TypeError: if `exact` is not a graph.
    ValueError: if `exact` does not reach the mean.
  """
  if exact is None:
    return lambda params, step: mark_varying(allreduce(params, comm=comm), comm)
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

  One compiled program serves both kinds of updates.

  Args:
    communicate: the branch with the communication, of `operand` and the number
      of communications before this update.
    otherwise: the branch of the other updates, of the same arguments and with
      results of the same types.
    operand: a pytree of arrays.
    step: the number of updates before this one, the same on all ranks.
    every: the period.
    comm: the communicator.
    differ: whether to mark the operand as varying over ranks, for a
      `shard_map`; without it, values that are equal on all ranks stay marked as
      such.
  """
  if every == 1:
    return communicate(operand, step)
  # The predicate is uniform: a `cond` in simulation then runs one branch, and
  # all ranks enter the same communication.
  due = uniform((step + 1) % every == 0, resolve(comm))
  operand = mark_varying(operand, comm) if differ else operand
  return jax.lax.cond(due, communicate, otherwise, operand, step // every)


def after_first(
  communicate: Callable[[Any, jax.Array], Any],
  otherwise: Callable[[Any, jax.Array], Any],
  operand: Any,
  step: jax.Array,
  comm: Communicator | None,
) -> Any:
  """Communicates in all updates but the first.

  Both functions take `operand` and the number of communications before this
  update.
  """
  # `step - 1` communications precede a later update; the clamp keeps the index
  # of the branch that is not taken valid.
  is_later = uniform(step > 0, resolve(comm))
  operand = mark_varying(operand, comm)
  return jax.lax.cond(
    is_later, communicate, otherwise, operand, jnp.maximum(step - 1, 0)
  )


def mark_varying(tree: Any, comm: Communicator | None) -> Any:
  """Marks values as varying over ranks, for the type check of a `shard_map`.

  Both branches of a `cond` must have equal types, also in a first update whose
  operand is still the same on all ranks.
  """
  here = resolve(comm)
  return jax.tree.map(lambda x: varying(x, here), tree)


def next_step(step: jax.Array) -> jax.Array:
  """`step + 1`, saturating at the largest int32."""
  return jnp.asarray(optax.safe_increment(step))
