"""Reduction of every element over all ranks."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from jfog import _compat, _dtypes
from jfog.primitives import _mesh, _nccl, _operation, _primitive, _pytree
from jfog.primitives._nccl import Reduction
from jfog.primitives._operation import Call
from jfog.runtime import Communicator, resolve

# In the order in which collectives.cc numbers them.
_REDUCTIONS = ("sum", "mean", "min", "max", "prod")


@_operation.operation
def allreduce(
  x: Any, op: str = "mean", *, comm: Communicator | None = None
) -> Any:
  """Reduces every element over all ranks; all get the result.

  Computes `y[i] = (x[0] + ... + x[n-1]) / n` for `op="mean"`, and the sum,
  minimum, maximum or product for the others. All ranks take part and wait for
  each other. A NaN makes the minimum and the maximum NaN. Sums of integers wrap
  around; the sum of bools is their "or", the product their "and".

  `"sum"` and `"mean"` are differentiable: the transpose of a sum over ranks is
  the sum of the cotangents over ranks, that of a mean their mean.

  Args:
    x: a pytree of arrays, of equal shapes and dtypes on all ranks.
    op: `"mean"`, `"sum"`, `"min"`, `"max"` or `"prod"`; equal on all ranks.
    comm: the communicator; by default the one in reach, see `jfog.init`.
      `comm.local` reduces inside each machine.

  Returns:
    A pytree like `x`, in shapes and dtypes. 16-bit floats are reduced in
    float32.

  Raises:
    ValueError: if `op` is none of the five.
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
    raise ValueError(f"allreduce: op={op!r} is none of {_REDUCTIONS}.")
  leaves, names, structure = _pytree.flatten(x, "allreduce")
  if op == "mean":
    _pytree.require_inexact(leaves, names, "allreduce")
  if op in ("min", "max"):
    for leaf, name in zip(leaves, names, strict=True):
      if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(
          f"allreduce: the leaf {name} is complex and has no {op}; reduce its "
          f"absolute value or its parts."
        )
  if not leaves or comm.backend in ("mesh", "single"):
    reduce = _mesh_allreduce if op in ("sum", "mean") else _mesh_extremum
    return Call(leaves, structure, [reduce(leaf, op, comm) for leaf in leaves])
  return Call(
    leaves,
    structure,
    primitive=allreduce_p,
    operands=_pytree.to_native(leaves, names, "allreduce"),
    params={"op": op, "comm": comm},
  )


allreduce_start = _operation.start_of(
  allreduce,
  """>>> total = lambda x: jfog.wait(jfog.allreduce_start(x, "sum"))
    >>> jfog.simulate(total, 2)(jnp.array([1.0, 3.0]))
    Array([4., 4.], dtype=float32)""",
)


# The mesh: lax's collectives, which differentiate and batch by themselves.


def _mesh_allreduce(x, op, comm):
  if comm.backend == "single":
    return x
  if x.dtype == jnp.bool_:
    return _mesh_extremum(x, "max", comm)
  wide = _compat.varying(x.astype(_dtypes.accumulation(x.dtype)), comm.axes)
  total = lax.psum(wide, comm.axes)
  return (total / comm.size if op == "mean" else total).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _mesh_extremum(x, op, comm):
  if comm.backend == "single":
    return x
  if x.dtype == jnp.bool_:
    number = _mesh_extremum(
      x.astype(jnp.int32), "min" if op in ("min", "prod") else "max", comm
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
def _mesh_extremum_jvp(op, comm, primals, tangents):
  del comm, primals, tangents
  raise _no_derivative(op)


def _no_derivative(op):
  return TypeError(
    f'allreduce: op="{op}" has no derivative; use "sum" or "mean", or '
    f"jax.lax.stop_gradient on its argument."
  )


# Between processes: the rules of the primitives.


def _like_operands(*operands, fixed, **params):
  del fixed, params
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in operands]


def _allreduce_tangents(primitive, primals, results, tangents, *, op, **params):
  if op not in ("sum", "mean") and any(
    type(dx) is not ad.Zero for dx in tangents
  ):
    raise _no_derivative(op)
  return _primitive.linear_tangents(
    primitive, primals, results, tangents, op=op, **params
  )


def _allreduce_transpose(cotangents, *, fixed, op, comm):
  return allreduce_p.bind(*cotangents, fixed=fixed, op=op, comm=comm)


# On GPUs NCCL reduces in the types that it has, here called wires: bools are
# bytes, integers and floats of 16 bits have 32, and the parts of a complex number
# are two numbers. Products of complex numbers it has not: those are gathered.


def _wires(leaves, op):
  """What NCCL reduces: one array for each leaf, and then flags of NaN."""
  wires = []
  for x in leaves:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      wires.append(jnp.stack([x.real, x.imag]))
    elif x.dtype == jnp.bool_:
      wires.append(x.astype(jnp.uint8))
    elif x.dtype in (jnp.int16, jnp.uint16):
      wires.append(x.astype(x.dtype.name.replace("16", "32")))
    else:
      wires.append(x.astype(_dtypes.accumulation(x.dtype)))
  flags = [jnp.isnan(x).astype(jnp.uint8) for x in leaves if _flags(x, op)]
  return [*wires, *flags]


def _flags(x, op):
  """Whether NaN travels beside: NCCL promises nothing of it."""
  return op in ("min", "max") and jnp.issubdtype(x.dtype, jnp.floating)


def _reductions(leaves, op):
  """How each of the wires is reduced."""
  usual = Reduction.SUM if op == "mean" else Reduction[op.upper()]
  every = op in ("min", "prod")
  of_bools = Reduction.MIN if every else Reduction.MAX
  return [
    *(of_bools if x.dtype == jnp.bool_ else usual for x in leaves),
    *(Reduction.MAX for x in leaves if _flags(x, op)),
  ]


def _gathers(leaves, op):
  return op == "prod" and any(
    jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves
  )


def _wire_groups(leaves, op):
  """For each reduction the wires of its vectors: `(reduction, places, packing)`."""
  wires = jax.eval_shape(lambda *leaves: _wires(leaves, op), *leaves)
  reductions = _reductions(leaves, op)
  groups = []
  for reduction in sorted(set(reductions)):
    places = [i for i, r in enumerate(reductions) if r == reduction]
    packing = _nccl.Packing([wires[i] for i in places])
    groups.append((reduction, places, packing))
  return groups


def send_allreduce(mode, fixed, leaves, *, op, comm, operation="allreduce"):
  """The call that reduces leaves on GPUs."""
  del fixed
  attributes = _nccl.told(mode, comm, operation, op, leaves)
  if _gathers(leaves, op):
    return _nccl.Send("allgather", attributes, leaves)
  wires, operands, reductions = _wires(leaves, op), [], []
  for reduction, places, packing in _wire_groups(leaves, op):
    packed = packing.pack([wires[i] for i in places])
    operands.extend(packed)
    reductions.extend([reduction] * len(packed))
  attributes["reductions"] = np.array(reductions, np.int64)
  return _nccl.Send("allreduce", attributes, operands)


def received_allreduce(results, static):
  """What comes in of it."""
  op, size = static
  if _gathers(results, op):
    return [jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in results]
  return [
    aval
    for *_, packing in _wire_groups(results, op)
    for aval in packing.avals()
  ]


def finish_allreduce(own, weights, received, static):
  """The results of what has come in."""
  del weights
  op, size = static
  if _gathers(own, op):
    return [
      jnp.prod(x.astype(_dtypes.accumulation(x.dtype)), axis=0).astype(x.dtype)
      for x in received
    ]
  wires: dict[int, jax.Array] = {}
  received = list(received)
  for _, places, packing in _wire_groups(own, op):
    packed = [received.pop(0) for _ in packing.sizes]
    wires.update(zip(places, packing.unpack(packed), strict=True))
  flags = iter(range(len(own), len(wires)))
  results = []
  for i, x in enumerate(own):
    y = wires[i] / size if op == "mean" else wires[i]
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      y = lax.complex(y[0], y[1])
    if _flags(x, op):
      y = jnp.where(wires[next(flags)] > 0, jnp.nan, y)
    results.append(y.astype(x.dtype))
  return results


allreduce_p = _primitive.define(
  "allreduce",
  abstract_eval=_like_operands,
  attributes=lambda mode, *leaves, op, comm: {
    "context": np.int64(comm.context),
    "reduction": np.int64(_REDUCTIONS.index(op)),
  },
  tangents=_allreduce_tangents,
  transpose=_allreduce_transpose,
  in_place=True,
  on_gpus=_nccl.OnGpus(
    send=send_allreduce,
    received=received_allreduce,
    finish=finish_allreduce,
    static=lambda *, op, comm: (op, comm.size),
    in_place=True,
  ),
)
