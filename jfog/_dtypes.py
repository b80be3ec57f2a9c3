"""Dtypes of the arithmetic and of the wire: accumulation, real part, native."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The dtypes that the native core reads; see xla_ops/common/dtype.h.
NATIVE = frozenset(
  jnp.dtype(name)
  for name in (
    *("bool", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
  )
)


def accumulation(dtype: Any) -> np.dtype:
  """Returns the dtype in which values of `dtype` are weighted and summed.

  float32 for floats of at most 32 bits, else the dtype itself.

  Example:
    >>> accumulation(jnp.bfloat16), accumulation(jnp.int8)
    (dtype('float32'), dtype('int8'))
  """
  dtype = jnp.dtype(dtype)
  if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
    return jnp.dtype(jnp.float32)
  return dtype


def accumulated(x: Any) -> jax.Array:
  """Returns `x` in its accumulation dtype.

  Example:
    >>> accumulated(jnp.zeros(2, jnp.float16)).dtype
    dtype('float32')
  """
  x = jnp.asarray(x)
  dtype = accumulation(x.dtype)
  # A cast to its own dtype would strip a weak type.
  return x if x.dtype == dtype else x.astype(dtype)


def real(dtype: Any) -> np.dtype:
  """Returns the dtype of the real part of an inexact `dtype`; that of weights.

  Example:
    >>> real(jnp.complex64), real(jnp.float16)
    (dtype('float32'), dtype('float16'))
  """
  return jnp.finfo(dtype).dtype


def wire(dtype: Any) -> np.dtype:
  """Returns the dtype in which values of `dtype` travel between processes.

  The dtype itself if the native core reads it, float32 for smaller floats.

  Raises:
    TypeError: for an integer dtype without a native form, such as int4.

  Example:
    >>> wire(jnp.float8_e4m3fn), wire(jnp.bfloat16)
    (dtype('float32'), dtype(bfloat16))
  """
  dtype = jnp.dtype(dtype)
  if dtype in NATIVE:
    return dtype
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.dtype(jnp.float32)
  raise TypeError(f"MPI has no type for dtype {dtype}; cast it to int8.")
