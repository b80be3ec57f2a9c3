"""Weighted sum of an own value and of received values in slots, in XLA."""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _dtypes
from jfog.primitives import _mesh, _pytree

# A sum over more slots than this is a loop in the program.
UNROLLED = 16


class Weighting(enum.IntEnum):
  """Source of the weights; numbered as in xla_ops/mpi."""

  GRAPH = 0  # the graph's table
  DESTINATION = 1  # y[i] = sum_j row_i[j] x[j]: receivers weight
  SOURCE = 2  # y[i] = sum_j row_j[i] x[j]: senders weight, the transpose


class Row(NamedTuple):
  """Weights of one rank's sum over slots; a pytree that a handle carries."""

  self_weight: Any
  weights: Any  # by slot
  reads: Any  # whether a slot holds a value
  difference: Any  # evaluate as x + sum_k weights[k] (slots[k] - x)


def begin(
  own: jax.Array, self_weight: Any, difference: Any
) -> tuple[jax.Array, jax.Array | None]:
  """First summand, and the value to subtract from all others.

  In difference form, `x + sum_k w[k] (s[k] - x)`, that is the own value twice:
  equal values cancel exactly, so averages do not drift. A weight of zero leaves
  no trace of the own value, not even of a NaN.

  Args:
    own: the own value, in the accumulation dtype.
    self_weight: its weight.
    difference: whether to evaluate in difference form.
  """
  if _is_known(difference) and difference:
    return own, own
  kept = _choose(
    self_weight == 0, _mesh.additive_identity(own), times(self_weight, own)
  )
  if _is_known(difference):
    return kept, None
  minus = jnp.where(difference, own, jnp.zeros_like(own))
  return jnp.where(difference, own, kept), minus


def add(
  total: jax.Array,
  value: jax.Array,
  weight: Any,
  read: Any,
  minus: jax.Array | None,
) -> jax.Array:
  """Adds one slot to a sum; a slot that is not read keeps the bits of the sum."""
  value = value.astype(total.dtype)
  term = times(weight, value if minus is None else value - minus)
  return total + _choose(read, term, _mesh.additive_identity(term))


def combine(
  values: Sequence[jax.Array],
  slots: Sequence[jax.Array],
  self_weight: Any,
  row: Any,
  reads: Any,
  difference: Any,
) -> list[jax.Array]:
  """`self_weight x + sum_k row[k] slots[k]` over the slots that are read.

  In `difference` form, `x + sum_k row[k] (slots[k] - x)`.
  """
  own = [x.astype(sum_dtype(x)) for x in values]
  begun = [begin(x, self_weight, difference) for x in own]
  minus = [x for _, x in begun]

  def step(totals: list[jax.Array], slot: Any) -> tuple[list[jax.Array], None]:
    received, weight, read = slot
    return [
      add(total, value, weight, read, x)
      for total, value, x in zip(totals, received, minus, strict=True)
    ], None

  totals = [total for total, _ in begun]
  if len(reads) > UNROLLED:
    totals, _ = lax.scan(step, totals, (slots, row, reads), unroll=UNROLLED)
  else:
    for k in range(len(reads)):
      totals, _ = step(totals, ([x[k] for x in slots], row[k], reads[k]))
  return _pytree.cast_like(totals, values)


def _is_known(condition: Any) -> bool:
  return isinstance(condition, (bool, np.bool_))


def _choose(condition: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """`jnp.where`, folded if the condition is known."""
  if _is_known(condition):
    return x if condition else y
  return jnp.where(condition, x, y)


def times(weight: Any, x: jax.Array) -> jax.Array:
  """The product in the accumulation dtype of `x`; a weight of 1 keeps the bits.

  Several weights are those of the entries along axis 0. Complex values are
  scaled part by part: a complex product would turn an infinite part into NaN.
  """
  x = x.astype(sum_dtype(x))
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    weight = along(weight, x).astype(jnp.finfo(x.dtype).dtype)
    return lax.complex(weight * x.real, weight * x.imag)
  return along(weight, x).astype(x.dtype) * x


def mean(rows: jax.Array) -> jax.Array:
  """The mean over axis 0, x[0] + sum_k (x[k] - x[0]) / n: exact for equal values."""
  wide = rows.astype(_dtypes.accumulation(rows.dtype))
  mean = wide[0] + jnp.sum(wide[1:] - wide[:1], axis=0) / len(rows)
  return mean.astype(rows.dtype)


def sum_dtype(x: jax.Array) -> np.dtype:
  """The accumulation dtype of values like `x`."""
  return _dtypes.accumulation(x.dtype)


def along(values: Any, x: jax.Array) -> jax.Array:
  """`values` of the first axes of `x`, to be broadcast along the others."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
