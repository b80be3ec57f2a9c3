"""Reduction of every element over all ranks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from jfog import _compat, _dtypes
from jfog.primitives import _mesh, _operation, _primitive, _pytree, nccl
from jfog.primitives._operation import Operation
from jfog.primitives.nccl import Reduction
from jfog.runtime import Communicator, resolve

# Numbered as `Reduction` in collectives.cc.
_REDUCTIONS = ("sum", "mean", "min", "max", "prod")


@_operation.operation
def allreduce(
  x: Any, op: str = "mean", *, comm: Communicator | None = None
) -> Any:
  """Reduces every element over all ranks; all get the result.

  Computes `y[i] = (x[0] + ... + x[n-1]) / n` for `op="mean"`, and the sum,
  minimum, maximum or product for the others. All ranks communicate and wait
  for each other. A NaN makes the minimum and the maximum NaN. Sums of integers wrap
  around; the sum of bools is their "or", the product their "and".

  `"sum"` and `"mean"` are differentiable: the transpose of a sum over ranks is
  the sum of the cotangents over ranks, that of a mean their mean.

  Args:
    x: a pytree of arrays, of equal shapes and dtypes on all ranks.
    op: `"mean"`, `"sum"`, `"min"`, `"max"` or `"prod"`; equal on all ranks.
    comm: the communicator; by default the current one, see `jfog.init`.
      `comm.local` reduces inside each machine.

  Returns:
    A pytree like `x`, in shapes and dtypes. 16-bit floats are reduced in
    float32.

  Raises:
    ValueError: if `op` is another string.
    TypeError: for the mean of integer or bool leaves, for the minimum or
      maximum of complex ones, and for a derivative of min, max or prod.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: jfog.allreduce(x, "max"), 3)(jnp.arange(3))
    Array([2, 2, 2], dtype=int32)

  Source: `allreduce` of BlueFog; MPI 4.0, section 6.9.6.
  """
  comm = resolve(comm)
  if op not in _REDUCTIONS:
    raise ValueError(
      f"allreduce: op={op!r} is unknown; use one of {_REDUCTIONS}."
    )
  leaves, names, structure = _pytree.flatten(x, "allreduce")
  if op == "mean":
    _pytree.require_inexact(leaves, names, "allreduce")
  # Complex numbers have no order.
  if op in ("min", "max"):
    for leaf, name in zip(leaves, names, strict=True):
      if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
          f"allreduce: op={op!r} is undefined for the complex leaf {name}; reduce "
          f"its absolute value, or its real and imaginary parts."
        )
  reduce = _mesh_allreduce if op in ("sum", "mean") else _mesh_extremum
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: [reduce(leaf, op, comm) for leaf in leaves],
    primitive=allreduce_p,
    operands=lambda: _pytree.to_native(leaves, names, "allreduce"),
    params={"op": op, "comm": comm},
  )


allreduce_start = _operation.start_of(
  allreduce,
  """>>> total = lambda x: jfog.wait(jfog.allreduce_start(x, "sum"))
    >>> jfog.simulate(total, 2)(jnp.array([1.0, 3.0]))
    Array([4., 4.], dtype=float32)""",
)


# Mesh rendition: collectives of `jax.lax`, which have rules for AD and batching.


def _mesh_allreduce(x: jax.Array, op: str, comm: Any) -> jax.Array:
  if comm.backend == "single":
    return x
  if x.dtype == jnp.bool_:
    return _mesh_extremum(x, "max", comm)
  # In the accumulation dtype: 16-bit sums are rounded once, after the last
  # summand.
  wide = _compat.varying(x.astype(_dtypes.accumulation(x.dtype)), comm.axes)
  total = lax.psum(wide, comm.axes)
  return (total / comm.size if op == "mean" else total).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _mesh_extremum(x: jax.Array, op: str, comm: Any) -> jax.Array:
  if comm.backend == "single":
    return x
  if x.dtype == jnp.bool_:
    number = _mesh_extremum(
      # On 0 and 1 the minimum and the product are "and", the maximum and the
      # sum "or".
      x.astype(jnp.int32),
      "min" if op in ("min", "prod") else "max",
      comm,
    )
    return number.astype(jnp.bool_)
  x = _compat.varying(x, comm.axes)
  if op == "prod":
    wide = x.astype(_dtypes.accumulation(x.dtype))
    return jnp.prod(
      _mesh.gather(wide, comm.axes), axis=0, dtype=wide.dtype
    ).astype(x.dtype)
  extremum = (lax.pmin if op == "min" else lax.pmax)(x, comm.axes)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return extremum
  # XLA's collectives on CPU may drop a NaN.
  is_nan = lax.pmax(jnp.isnan(x).astype(jnp.int32), comm.axes)
  return jnp.where(is_nan > 0, jnp.asarray(jnp.nan, x.dtype), extremum)


@_mesh_extremum.defjvp
def _mesh_extremum_jvp(op: str, comm: Any, primals: Any, tangents: Any) -> Any:
  del comm, primals, tangents
  raise _no_derivative(op)


def _no_derivative(op: str) -> TypeError:
  return TypeError(
    f'allreduce: op="{op}" has no derivative; use "sum" or "mean", or '
    f"jax.lax.stop_gradient on its argument."
  )


# Native rendition: rules of the primitive.


def _tangents(
  primitive: Any,
  primals: Sequence[Any],
  results: Sequence[Any],
  tangents: Sequence[Any],
  *,
  op: str,
  **params: Any,
) -> list[Any]:
  if op not in ("sum", "mean") and any(
    type(dx) is not ad.Zero for dx in tangents
  ):
    raise _no_derivative(op)
  return _primitive.linear_tangents(
    primitive, primals, results, tangents, op=op, **params
  )


def _transpose(cotangents: Sequence[Any], **params: Any) -> Any:
  # y_i = sum_j x_j on every rank i, so ct_x_j = sum_i ct_y_i: the same operation.
  return allreduce_p.bind(*cotangents, **params)


# On GPUs.


class WirePlan:
  """Buffers in which NCCL reduces leaves, and the reduction of each buffer.

  NCCL lacks bools, 16-bit integers and complex numbers, so every leaf has a wire
  type: bools are uint8, 16-bit integers and floats have 32 bits, and a complex
  leaf is a real array of its real and imaginary parts. NCCL does not specify how
  min and max treat NaN, so a uint8 flag per element travels along, reduced by
  max. Products of complex numbers cannot be reduced by parts: those leaves are
  gathered, and every rank multiplies.
  """

  def __init__(self, leaves: Sequence[Any], op: str):
    self._op = op
    self._dtypes = [jnp.dtype(x.dtype) for x in leaves]
    self._flagged = [
      i
      for i, dtype in enumerate(self._dtypes)
      if op in ("min", "max") and jnp.issubdtype(dtype, jnp.floating)
    ]
    # NCCL multiplies real numbers only, and the product of complex ones is not
    # one of their parts: the values are gathered and multiplied in XLA.
    self.gathers = op == "prod" and any(
      jnp.issubdtype(dtype, jnp.complexfloating) for dtype in self._dtypes
    )
    self._leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    # One packing for each reduction, over the places of its wires.
    self._groups: list[tuple[Reduction, list[int], nccl.Packing]] = []
    if self.gathers:
      return
    wires = jax.eval_shape(lambda *leaves: self._wires(leaves), *self._leaves)
    reductions = self._reductions()
    for reduction in sorted(set(reductions)):
      places = [i for i, r in enumerate(reductions) if r == reduction]
      packing = nccl.Packing.of([wires[i] for i in places])
      self._groups.append((reduction, places, packing))

  def _wires(self, leaves: Sequence[Any]) -> list[jax.Array]:
    """One array in its wire type for each leaf, then the flags of NaN."""
    wires = []
    for x, dtype in zip(leaves, self._dtypes, strict=True):
      if jnp.issubdtype(dtype, jnp.complexfloating):
        # Sums of complex numbers are sums of their parts.
        wires.append(jnp.stack([x.real, x.imag]))
      elif dtype == jnp.bool_:
        wires.append(x.astype(jnp.uint8))
      elif dtype in (jnp.int16, jnp.uint16):
        wires.append(x.astype(dtype.name.replace("16", "32")))
      else:
        wires.append(x.astype(_dtypes.accumulation(dtype)))
    # NCCL's min and max may drop a NaN; a maximum of flags keeps it.
    flags = [jnp.isnan(leaves[i]).astype(jnp.uint8) for i in self._flagged]
    return [*wires, *flags]

  def _reductions(self) -> list[Reduction]:
    """The reduction of every wire."""
    usual = Reduction.SUM if self._op == "mean" else Reduction[self._op.upper()]
    # On bytes of 0 and 1, "and" is the minimum and "or" the maximum.
    conjunction = self._op in ("min", "prod")
    of_bools = Reduction.MIN if conjunction else Reduction.MAX
    return [
      *(of_bools if dtype == jnp.bool_ else usual for dtype in self._dtypes),
      *(Reduction.MAX for _ in self._flagged),
    ]

  def encode(
    self, leaves: Sequence[jax.Array], attributes: dict[str, Any]
  ) -> nccl.Send:
    """The call that reduces the leaves."""
    if self.gathers:
      return nccl.Send("allgather", attributes, leaves)
    wires, operands, reductions = self._wires(leaves), [], []
    for reduction, places, packing in self._groups:
      packed = packing.pack([wires[i] for i in places])
      operands.extend(packed)
      reductions.extend([reduction] * len(packed))
    attributes = {**attributes, "reductions": np.array(reductions, np.int64)}
    return nccl.Send("allreduce", attributes, operands)

  def avals(self, size: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the buffers that NCCL fills, for `size` ranks."""
    if self.gathers:
      return [
        jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in self._leaves
      ]
    return [aval for *_, packing in self._groups for aval in packing.avals()]

  def decode(self, received: Sequence[Any], size: int) -> list[jax.Array]:
    """The results from these buffers, for `size` ranks."""
    if self.gathers:
      return [
        jnp.prod(x.astype(_dtypes.accumulation(x.dtype)), axis=0).astype(
          x.dtype
        )
        for x in received
      ]
    # In the order of `encode`: group by group, buffer by buffer.
    buffers = iter(received)
    wires: dict[int, jax.Array] = {}
    for _, places, packing in self._groups:
      packed = [next(buffers) for _ in packing.sizes]
      wires.update(zip(places, packing.unpack(packed), strict=True))
    flags = {i: len(self._dtypes) + k for k, i in enumerate(self._flagged)}
    results = []
    for i, dtype in enumerate(self._dtypes):
      y = wires[i] / size if self._op == "mean" else wires[i]
      if jnp.issubdtype(dtype, jnp.complexfloating):
        y = lax.complex(y[0], y[1])
      if i in flags:
        y = jnp.where(wires[flags[i]] > 0, jnp.nan, y)
      results.append(y.astype(dtype))
    return results


class OnGpus(nccl.Rendition):
  """One reduction for each buffer of a `WirePlan`."""

  in_place = True

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Any,
    *,
    op: str,
    comm: Any,
    operation: str = "allreduce",
  ) -> nccl.Send:
    """The call that reduces the leaves."""
    del scalars
    attributes = nccl.common_attributes(mode, comm, operation, op, leaves)
    return WirePlan(leaves, op).encode(leaves, attributes)

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Avals of the buffers of the plan."""
    op, size = static
    return WirePlan(results, op).avals(size)

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The leaves in the buffers of the plan."""
    del weights
    op, size = static
    return WirePlan(own, op).decode(received, size)

  def static(self, *, op: str, comm: Any, **params: Any) -> tuple[str, int]:
    """The operation and the number of ranks."""
    del params
    return op, comm.size


on_gpus = OnGpus()

allreduce_p = _primitive.define(
  "allreduce",
  attributes=lambda *leaves, op, comm: {
    "context": np.int64(comm.context),
    "reduction": np.int64(_REDUCTIONS.index(op)),
  },
  tangents=_tangents,
  transpose=_transpose,
  in_place=True,
  on_gpus=on_gpus,
)
