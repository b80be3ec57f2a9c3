"""The weighted sum of an own value and of what lies in slots, in XLA."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _dtypes
from jfog.primitives import _mesh, _pytree

# A sum over more slots than this is a loop in the program.
_UNROLLED = 16


def combine(
  values: Sequence[jax.Array],
  slots: Sequence[jax.Array],
  self_weight: Any,
  row: Any,
  reads: Any,
  difference: Any,
) -> list[jax.Array]:
  """`self_weight x + sum_k row[k] slots[k]` over the slots that are read.

  Where it is to be a `difference`, `x + sum_k row[k] (slots[k] - x)`.
  """
  own = [x.astype(sum_dtype(x)) for x in values]
  minus = [_choose(difference, x, jnp.zeros_like(x)) for x in own]

  def first(x):
    # A weight of zero leaves no trace of the value.
    kept = _choose(self_weight == 0, _mesh.nothing(x), times(self_weight, x))
    return _choose(difference, x, kept)

  def add(totals, slot):
    values, weight, read = slot
    terms = [
      times(weight, value.astype(x.dtype) - x)
      for value, x in zip(values, minus, strict=True)
    ]
    return [
      total + _choose(read, term, _mesh.nothing(term))
      for total, term in zip(totals, terms, strict=True)
    ], None

  totals = [first(x) for x in own]
  if len(reads) > _UNROLLED:
    totals, _ = lax.scan(add, totals, (slots, row, reads), unroll=_UNROLLED)
  else:
    for k in range(len(reads)):
      totals, _ = add(totals, ([x[k] for x in slots], row[k], reads[k]))
  return _pytree.like(totals, values)


def _choose(condition: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """`where`, decided at once if that is known."""
  if isinstance(condition, (bool, np.bool_)):
    return x if condition else y
  return jnp.where(condition, x, y)


def times(weight: jax.Array, x: jax.Array) -> jax.Array:
  """The product in the dtype in which `x` is summed; 1 returns the bits.

  Several weights are those of the entries along axis 0.
  """
  x = x.astype(sum_dtype(x))
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    weight = along(weight, x).astype(jnp.finfo(x.dtype).dtype)
    return lax.complex(weight * x.real, weight * x.imag)
  return along(weight, x).astype(x.dtype) * x


def sum_dtype(x: jax.Array) -> np.dtype:
  """The dtype in which values like `x` are weighted and summed."""
  return _dtypes.accumulation(x.dtype)


def along(values: Any, x: jax.Array) -> jax.Array:
  """`values` of the first axes of `x`, to be broadcast along the others."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
