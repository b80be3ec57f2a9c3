"""What all averaging optimizers share: the average, its rhythm, its checks."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jfog.primitives import neighbor_allreduce, uniform
from jfog.runtime import Communicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology

# A function (params, step) -> params; `step` counts communications.
Averaging = Callable[[optax.Params, jax.Array], optax.Params]


def as_averaging(
  graph: Topology | Schedule | Averaging,
  *,
  comm: Communicator | None,
  check: bool,
  name: str,
) -> Averaging:
  """The averaging that an optimizer was given, as a function.

  Raises:
    TypeError: if `graph` is neither a graph nor a function.
    ValueError: if a graph's rows do not sum to 1 and `check` is set.
  """
  if isinstance(graph, (Topology, Schedule)):
    if check:
      check_row_stochastic(graph, name)
    return lambda params, step: neighbor_allreduce(
      params, graph, step, comm=comm
    )
  if isinstance(graph, ExactAverage):
    raise TypeError(
      f"{name}: {graph!r} takes several rounds and has no mixing matrix; pass a "
      f"function that runs it, or jfog.topology.base_k(size, k)."
    )
  if callable(graph):
    return graph
  raise TypeError(
    f"{name}: graph={graph!r} is {type(graph).__name__}; pass a Topology, a "
    f"Schedule, or a function (params, step) -> params."
  )


def check_row_stochastic(graph: Topology | Schedule, name: str) -> None:
  """Checks that averages have weights that sum to 1; warns of a weighted one.

  Raises:
    ValueError: if a row of the graph does not sum to 1.
  """
  if not graph.is_row_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not row-stochastic: averages need weights that sum "
      f"to 1 for every receiver; use weights='metropolis_hastings', or "
      f"check=False."
    )
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


def check_every(every: int, name: str) -> int:
  """Checks the number of updates from one communication to the next."""
  if isinstance(every, bool) or not isinstance(every, (int, np.integer)):
    raise TypeError(f"{name}: every={every!r} must be an int.")
  if every < 1:
    raise ValueError(f"{name}: every={every} must be at least 1.")
  return int(every)


def on_schedule(
  communicate: Callable[[Any, jax.Array], Any],
  otherwise: Callable[[Any, jax.Array], Any],
  operand: Any,
  step: jax.Array,
  every: int,
  comm: Communicator | None,
) -> Any:
  """Communicates in the updates with `(step + 1) % every == 0`.

  Both functions get `operand` and the number of communications before this
  update. One program serves both kinds of updates.
  """
  if every == 1:
    return communicate(operand, step)
  due = uniform((step + 1) % every == 0, resolve(comm))
  return jax.lax.cond(due, communicate, otherwise, operand, step // every)


def next_step(step: jax.Array) -> jax.Array:
  """`step + 1`, which stays at the greatest int32 once it is there."""
  return jnp.asarray(optax.safe_increment(step))


def accumulated(x: Any) -> jax.Array:
  """`x` in the dtype in which it is averaged: float32 for 16-bit floats."""
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
    return x.astype(jnp.float32)
  return x


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
  """Refuses an update without the parameters."""
  if params is None:
    raise ValueError(
      f"{name} averages parameters and needs them; call "
      f"tx.update(grads, state, params)."
    )
