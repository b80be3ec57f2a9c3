"""Distances between the parameters of the ranks."""

from typing import Any

import jax
import jax.numpy as jnp

from jfog import _dtypes
from jfog.primitives import allreduce
from jfog.runtime import Communicator


def consensus_distance(
  params: Any, *, comm: Communicator | None = None
) -> jax.Array:
  """The root mean square over ranks of the distance to their mean.

  Computes `sqrt(1/n sum_i ||x[i] - xbar||^2)` over all leaves together, with
  `xbar` the average over ranks. Two operations: an average of `params` and one
  of a scalar.

  Args:
    params: a pytree of float or complex arrays.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A float32 scalar (float64 for 64-bit leaves), equal on all ranks; traced
    under a transformation.

  Raises:
    TypeError: for integer or bool leaves.
    NotInitializedError: without a communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(jfog.diagnostics.consensus_distance, 2)(
    ...     jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)
  """
  mean = allreduce(params, comm=comm)
  return jnp.sqrt(allreduce(square_distance(params, mean), comm=comm))


def square_distance(x: Any, y: Any) -> jax.Array:
  """`||x - y||^2` over all leaves, in the accumulation dtype."""
  squares = jax.tree.map(
    lambda x, y: jnp.sum(
      jnp.abs(_dtypes.accumulated(x) - _dtypes.accumulated(y)) ** 2
    ),
    x,
    y,
  )
  return sum(jax.tree.leaves(squares), jnp.zeros([]))
