"""Averages of many virtual ranks over a dense graph, as a matrix product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _dtypes
from jfog.primitives import _weighted_sum
from jfog.topology import Topology
from jfog.topology._neighbor_table import neighbor_table

# Below this part of all edges the sum over in-neighbors takes less time.
_DENSITY = 0.25


def is_dense(topology: Topology, dtype: Any) -> bool:
  """Whether `mix` computes the average of leaves of this dtype over a graph.

  Small graphs keep the order of summation that ranks of their own have.
  """
  table = neighbor_table(topology)
  differences = table.difference[0]
  return bool(
    len(table.sources[0].T) > _weighted_sum.UNROLLED
    and table.present[0].sum() > _DENSITY * topology.size**2
    and (differences == differences[0]).all()
    and jnp.issubdtype(_dtypes.accumulation(dtype), jnp.inexact)
  )


def mix(
  x: jax.Array,
  gathered: jax.Array,
  topology: Topology,
  rank: Any,
  in_slots: Callable[[], jax.Array],
) -> jax.Array:
  """The average of one rank over all, `sum_j W[rank, j] gathered[j]`.

  In difference form it is `x + sum_j W[rank, j] ((gathered[j] - c) - (x - c))`
  with `c = gathered[0]`, which leaves equal values as they are. `vmap` over the
  ranks turns the vector-matrix product into one product of matrices.

  Args:
    x: the value of this rank.
    gathered: the values of all ranks, equal on all of them.
    topology: the graph.
    rank: this rank.
    in_slots: computes the same over the in-neighbors alone. Where the graph is
      not complete and a value is not finite it is the result, for in a product
      a weight of zero would make NaN of that value.
  """
  matrix = np.array(topology.mixing_matrix)
  difference = bool(neighbor_table(topology).difference[0][0])
  own = x.astype(_dtypes.accumulation(x.dtype))
  values = gathered.astype(own.dtype).reshape(len(gathered), -1)
  contributes = matrix != 0
  if difference:
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(contributes, True)
    first = values[0]
    values = values - first
  dtype = _dtypes.real(own.dtype)
  sums = jnp.asarray(matrix.sum(axis=1).astype(dtype))
  row = jnp.asarray(matrix.astype(dtype))[rank]

  def product() -> jax.Array:
    total = jnp.dot(
      row.astype(own.dtype), values, precision=lax.Precision.HIGHEST
    )
    if difference:
      mine = own.reshape(-1)
      total = mine + (total - sums[rank] * (mine - first))
    return total.reshape(x.shape).astype(x.dtype)

  if contributes.all():
    return product()
  return lax.cond(jnp.isfinite(values).all(), product, in_slots)
