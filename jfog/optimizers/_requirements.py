"""Requirements on graphs, and checks of the optimizers' other arguments."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jfog import _validation
from jfog.topology import Schedule, Topology

_TOLERANCE = 1e-9  # for an eigenvalue at its bound


@dataclasses.dataclass(frozen=True)
class Requirement:
  """Properties that an optimizer needs of its mixing matrix.

  Attributes:
    check: raises a `ValueError` that starts with the given name if a graph
      lacks the property.
    static: whether the graph must be one `Topology`, the same in every step.
  """

  check: Callable[[Topology | Schedule, str], None]
  static: bool = False


def _check_rows(graph: Topology | Schedule, name: str) -> None:
  if not graph.is_row_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not row-stochastic; averages need weights W[dst, "
      f"src] that sum to 1 for every dst. Use weights='metropolis_hastings', or "
      f"check=False."
    )


def _check_rows_and_warn(graph: Topology | Schedule, name: str) -> None:
  _check_rows(graph, name)
  if not graph.is_doubly_stochastic:
    pi = np.array2string(
      np.asarray(graph.stationary_distribution), precision=4, threshold=8
    )
    # The level of the optimizer's caller: this check, `as_averaging` or the
    # optimizer's shared part, and the optimizer itself lie between.
    warnings.warn(
      f"{name}: {graph!r} is row-stochastic but not doubly stochastic, so the "
      f"ranks agree on the average weighted with pi = {pi} instead of 1/n; use "
      f"weights='metropolis_hastings' for the plain average.",
      UserWarning,
      stacklevel=4,
    )


def _check_rows_and_columns(graph: Topology | Schedule, name: str) -> None:
  if not graph.is_doubly_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not doubly stochastic; {name} needs weights W[dst, "
      f"src] that sum to 1 for every dst and for every src. Use "
      f"weights='metropolis_hastings', or check=False."
    )


def _check_columns(graph: Topology | Schedule, name: str) -> None:
  if not graph.is_column_stochastic:
    raise ValueError(
      f"{name}: {graph!r} is not column-stochastic; sums over ranks are kept "
      f"only if the weights W[dst, src] sum to 1 for every src. Use "
      f"jfog.topology.from_networkx(graph, weights='uniform_out'), or "
      f"check=False."
    )


def _check_symmetric(graph: Topology | Schedule, name: str) -> None:
  _check_rows_and_columns(graph, name)
  if not graph.is_symmetric:
    raise ValueError(
      f"{name}: {graph!r} is not symmetric, and {name} may diverge on it; use a "
      f"graph with W[i, j] == W[j, i] such as jfog.topology.ring(size), another "
      f"method such as gradient_tracking, or check=False."
    )


def symmetric_above(bound: float, remedy: str) -> Requirement:
  """One symmetric topology with all eigenvalues above `bound`."""

  def check(graph: Topology | Schedule, name: str) -> None:
    _check_symmetric(graph, name)
    least = min(np.real(t.eigenvalues).min() for t in graph.rounds)
    if least <= bound + _TOLERANCE:
      raise ValueError(
        f"{name}: {graph!r} has the least eigenvalue lambda_min = {least:.6g}, "
        f"and {name} needs one above {bound:.4g}; {remedy}, or check=False."
      )

  return Requirement(check, static=True)


# Rows sum to 1: every average is a convex combination.
ROW_STOCHASTIC = Requirement(_check_rows)

# The same, with a warning where the consensus is not the plain mean.
AVERAGING = Requirement(_check_rows_and_warn)

# Columns sum to 1: every round keeps the sum over ranks.
COLUMN_STOCHASTIC = Requirement(_check_columns)

# Rows and columns sum to 1: every round keeps the mean over ranks.
DOUBLY_STOCHASTIC = Requirement(_check_rows_and_columns)

# One symmetric and doubly stochastic topology.
SYMMETRIC = Requirement(_check_symmetric, static=True)


def require_topology(topology: Any, name: str) -> None:
  """Checks that a graph is one `Topology`, the same in every step.

  Raises:
    TypeError: with the type that was given.
  """
  if isinstance(topology, Schedule):
    raise TypeError(
      f"{name}: topology={topology!r} is a Schedule; {name} needs one that stays "
      f"the same, so pass a jfog.topology.Topology."
    )
  if not isinstance(topology, Topology):
    label = f"{name}: topology"
    raise TypeError(f"{_validation.unlike_graph(topology, label, 'Topology')}.")


def as_inner(
  inner: Any, name: str, argument: str = "inner"
) -> optax.GradientTransformationExtraArgs:
  """An optax transformation as one that takes extra arguments.

  Raises:
    TypeError: if it has no functions `init` and `update`.
  """
  if not callable(getattr(inner, "init", None)) or not callable(
    getattr(inner, "update", None)
  ):
    raise TypeError(
      f"{name}: {argument}={inner!r} is {type(inner).__name__}; pass an optax "
      f"transformation, for example optax.sgd(0.1)."
    )
  return optax.with_extra_args_support(inner)


def as_learning_rate(
  learning_rate: Any, name: str
) -> Callable[[jax.Array], Any]:
  """A learning rate, or an optax schedule of it, as a function of the step.

  Raises:
    TypeError: if it is neither a real scalar nor a function.
  """
  if callable(learning_rate):
    return learning_rate
  if not _validation.is_scalar(learning_rate):
    raise TypeError(
      f"{name}: learning_rate={learning_rate!r} must be a number, or a schedule: "
      f"a function from the step to a number."
    )
  return lambda step: learning_rate


def check_every(every: int, name: str) -> int:
  """Checks the period of the communication, in updates.

  Raises:
    TypeError: if it is not an int.
    ValueError: if it is below 1.
  """
  return _validation.positive(every, f"{name}: every")


def check_factor(value: Any, argument: str, name: str) -> None:
  """Checks that a momentum factor lies in [0, 1), unless it is traced.

  Raises:
    ValueError: if it is out of range.
  """
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"{name}: {argument}={value!r} must be in [0, 1).")


def require_params(params: optax.Params | None, name: str) -> None:
  """Checks that an update has parameters of float or complex dtypes.

  Raises:
    ValueError: if `params` is `None`.
    TypeError: with the path of the first integer or bool leaf.
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
        f"{dtype}, expected floating-point or complex; cast it, or exclude it "
        f"with optax.masked."
      )
