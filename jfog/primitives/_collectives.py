"""Collectives over all ranks: allreduce, broadcast, allgather, barrier."""

import functools
import math
from collections.abc import Sequence
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


@_operation.operation
def broadcast(
  x: Any, root: int = 0, *, comm: Communicator | None = None
) -> Any:
  """Gives every rank the value of one.

  Computes `y[i] = x[root]`. All ranks take part and wait for the root. The
  derivative is that of a copy: the root's cotangent is the sum of the
  cotangents over all ranks, the others' are zero. `broadcast(params)` and
  `broadcast(opt_state)` start a run from equal values.

  Args:
    x: a pytree of arrays, of equal shapes and dtypes on all ranks.
    root: the rank whose value is taken, an int, equal on all ranks.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A pytree like `x`, bit for bit that of the root.

  Raises:
    ValueError: if there is no such rank.
    TypeError: if `root` is no int.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: jfog.broadcast(x, root=1), 3)(jnp.arange(3))
    Array([1, 1, 1], dtype=int32)

  Source: `broadcast` and `broadcast_parameters` of BlueFog.
  """
  comm = resolve(comm)
  if isinstance(root, bool) or not isinstance(root, (int, np.integer)):
    raise TypeError(f"broadcast: root={root!r} must be an int, not traced.")
  if not 0 <= root < comm.size:
    raise ValueError(
      f"broadcast: root={root} is no rank of a communicator of {comm.size}; "
      f"take one from 0 to {comm.size - 1}."
    )
  leaves, names, structure = _pytree.flatten(x, "broadcast")
  if not leaves or comm.backend == "single":
    return Call(leaves, structure, leaves)
  if comm.backend == "mesh":
    results = [_mesh_broadcast(leaf, root, comm) for leaf in leaves]
    return Call(leaves, structure, results)
  return Call(
    leaves,
    structure,
    primitive=broadcast_p,
    operands=_pytree.to_native(leaves, names, "broadcast"),
    params={"root": int(root), "comm": comm},
  )


@_operation.operation
def allgather(
  x: Any,
  *,
  axis_sizes: Sequence[int] | None = None,
  comm: Communicator | None = None,
) -> Any:
  """Concatenates the values of all ranks along axis 0, in the order of ranks.

  Every rank gets `y = concatenate([x[0], ..., x[n-1]])`; a scalar leaf counts as
  one of shape (1,). All ranks take part and wait for each other. The transpose
  gives each rank the sum over ranks of the cotangents of its own part.

  Args:
    x: a pytree of arrays, of equal dtypes on all ranks and equal shapes but for
      what `axis_sizes` allows.
    axis_sizes: the length of axis 0 on every rank, one int for each, where they
      differ; the same for all leaves. On a mesh all ranks have one shape, so
      there they must be equal.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A pytree like `x` whose leaves have the total length along axis 0.

  Raises:
    ValueError: if `axis_sizes` has another number of entries than ranks, or
      does not give this rank's own length.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(jfog.allgather, 2)(jnp.array([[1, 2], [3, 4]]))
    Array([[1, 2, 3, 4],
           [1, 2, 3, 4]], dtype=int32)

  Source: `allgather` of BlueFog; MPI 4.0, section 6.7.
  """
  comm = resolve(comm)
  leaves, names, structure = _pytree.flatten(x, "allgather")
  leaves = [jnp.atleast_1d(leaf) for leaf in leaves]
  sizes = [
    _pytree.axis_sizes(leaf, name, axis_sizes, comm, "allgather")
    for leaf, name in zip(leaves, names, strict=True)
  ]
  if not leaves or comm.backend == "single":
    return Call(leaves, structure, leaves)
  if comm.backend == "mesh":
    results = [_mesh_allgather(leaf, comm) for leaf in leaves]
    return Call(leaves, structure, results)
  return Call(
    leaves,
    structure,
    primitive=allgather_p,
    operands=_pytree.to_native(leaves, names, "allgather"),
    params={"axis_sizes": tuple(sizes), "comm": comm},
  )


allreduce_start = _operation.start_of(
  allreduce,
  """>>> total = lambda x: jfog.wait(jfog.allreduce_start(x, "sum"))
    >>> jfog.simulate(total, 2)(jnp.array([1.0, 3.0]))
    Array([4., 4.], dtype=float32)""",
)

broadcast_start = _operation.start_of(
  broadcast,
  """>>> first = lambda x: jfog.wait(jfog.broadcast_start(x))
    >>> jfog.simulate(first, 2)(jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)""",
)

allgather_start = _operation.start_of(
  allgather,
  """>>> all_of = lambda x: jfog.wait(jfog.allgather_start(x))
    >>> jfog.simulate(all_of, 2)(jnp.array([1.0, 3.0]))
    Array([[1., 3.],
           [1., 3.]], dtype=float32)""",
)


def barrier(*, comm: Communicator | None = None) -> None:
  """Waits until every rank has come here.

  Called eagerly it returns when all ranks have called it. In a jitted function
  on MPI it is an operation like the others, in program order. On a mesh nothing
  has to wait: all ranks are one program, and the call does nothing.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Raises:
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jfog
    >>> world = jfog.init()
    >>> jfog.barrier()

  Source: `barrier` of BlueFog.
  """
  comm = resolve(comm)
  if comm.backend in ("mesh", "single"):
    return
  barrier_p.bind(fixed=0, comm=comm)
  if _compat.at_top_level():
    jax.effects_barrier()


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _mesh_broadcast(x, root, comm):
  """The sum of the root's bits and zeros; a sum of floats would lose a -0."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    parts = (_mesh_broadcast(part, root, comm) for part in (x.real, x.imag))
    return lax.complex(*parts)
  if x.dtype == jnp.bool_:
    return _from_root(x.astype(jnp.uint8), root, comm).astype(jnp.bool_)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return _from_root(x, root, comm)
  bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  return lax.bitcast_convert_type(_from_root(bits, root, comm), x.dtype)


@_mesh_broadcast.defjvp
def _mesh_broadcast_jvp(root, comm, primals, tangents):
  (x,), (dx,) = primals, tangents
  return _mesh_broadcast(x, root, comm), _from_root(dx, root, comm)


def _from_root(x, root, comm):
  x = _compat.varying(x, comm.axes)
  own = jnp.where(comm.rank == root, x, jnp.zeros_like(x))
  return lax.psum(own, comm.axes)


def _mesh_allgather(x, comm):
  gathered = _mesh.gather(_compat.varying(x, comm.axes), comm.axes)
  return gathered.reshape(len(gathered) * len(x), *x.shape[1:])


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


def _broadcast_transpose(cotangents, *, fixed, root, comm):
  # y[i] = x[root] for all i, so ct_x[root] = sum_i ct_y[i].
  totals = allreduce_p.bind(*cotangents, fixed=fixed, op="sum", comm=comm)
  if comm.rank == root:
    return totals
  return [jnp.zeros_like(ct) for ct in totals]


def _send_broadcast(mode, fixed, leaves, *, root, comm):
  del fixed
  return _nccl.Send(
    "broadcast",
    {
      **_nccl.told(mode, comm, "broadcast", root, leaves),
      "root": np.int64(root),
    },
    _nccl.Packing(leaves).pack(leaves),
  )


broadcast_p = _primitive.define(
  "broadcast",
  abstract_eval=_like_operands,
  attributes=lambda mode, *leaves, root, comm: {
    "context": np.int64(comm.context),
    "root": np.int64(root),
  },
  transpose=_broadcast_transpose,
  in_place=True,
  on_gpus=_nccl.OnGpus(
    send=_send_broadcast,
    received=lambda results, static: _nccl.Packing(results).avals(),
    finish=lambda own, weights, received, static: _nccl.Packing(own).unpack(
      received
    ),
    in_place=True,
  ),
)


def _allgather_abstract_eval(*operands, fixed, axis_sizes, comm):
  del fixed, comm
  return [
    jax.core.ShapedArray((sum(sizes), *x.shape[1:]), x.dtype)
    for x, sizes in zip(operands, axis_sizes, strict=True)
  ]


def _allgather_tangents(
  primitive, primals, results, tangents, *, fixed, axis_sizes, comm
):
  """Linear, but each leaf comes with its own lengths."""
  del primals
  out: list[Any] = [_primitive.zero_tangent(y) for y in results]
  moving = [i for i, dx in enumerate(tangents) if type(dx) is not ad.Zero]
  if moving:
    dy = primitive.bind(
      *(tangents[i] for i in moving),
      axis_sizes=tuple(axis_sizes[i] for i in moving),
      fixed=fixed,
      comm=comm,
    )
    for i, tangent in zip(moving, dy, strict=True):
      out[i] = tangent
  return out


def _allgather_transpose(cotangents, *, fixed, axis_sizes, comm):
  # Rank i's part went to everybody: the cotangents of it are summed.
  totals = allreduce_p.bind(*cotangents, fixed=fixed, op="sum", comm=comm)
  own = []
  for total, sizes in zip(totals, axis_sizes, strict=True):
    start = sum(sizes[: comm.rank])
    own.append(lax.slice_in_dim(total, start, start + sizes[comm.rank], axis=0))
  return own


def _allgather_attributes(mode, *leaves, axis_sizes, comm):
  del mode
  return {
    "context": np.int64(comm.context),
    "rows": np.array(axis_sizes, np.int64).ravel(),
    "row_sizes": np.array([math.prod(x.shape[1:]) for x in leaves], np.int64),
  }


# On GPUs all ranks bring what the longest brings, padded, for NCCL gathers equal
# parts.


def _send_allgather(mode, fixed, leaves, *, axis_sizes, comm):
  del fixed
  padded = []
  for x, sizes in zip(leaves, axis_sizes, strict=True):
    behind = max(sizes) - len(x)
    padded.append(jnp.pad(x, [(0, behind)] + [(0, 0)] * (x.ndim - 1)))
  told = _nccl.told(mode, comm, "allgather", axis_sizes, padded)
  return _nccl.Send("allgather", told, padded)


def _received_allgather(results, static):
  return [
    jax.ShapeDtypeStruct((len(sizes) * max(sizes), *y.shape[1:]), y.dtype)
    for y, sizes in zip(results, static, strict=True)
  ]


def _finish_allgather(own, weights, received, static):
  del own, weights
  results = []
  for y, sizes in zip(received, static, strict=True):
    if len(set(sizes)) > 1:
      longest = max(sizes)
      parts = [y[i * longest :][:size] for i, size in enumerate(sizes)]
      y = jnp.concatenate(parts)
    results.append(y)
  return results


allgather_p = _primitive.define(
  "allgather",
  abstract_eval=_allgather_abstract_eval,
  attributes=_allgather_attributes,
  tangents=_allgather_tangents,
  transpose=_allgather_transpose,
  batch_axis=-1,  # axis 0 is concatenated
  on_gpus=_nccl.OnGpus(
    send=_send_allgather,
    received=_received_allgather,
    finish=_finish_allgather,
    static=lambda *, axis_sizes, comm: axis_sizes,
  ),
)

barrier_p = _primitive.define(
  "barrier",
  abstract_eval=lambda *, fixed, comm: [],
  attributes=lambda mode, *leaves, comm: {"context": np.int64(comm.context)},
  on_gpus=_nccl.OnGpus(
    send=lambda mode, fixed, leaves, *, comm: _nccl.Send(
      "barrier", _nccl.told(mode, comm, "barrier", None, leaves), []
    ),
  ),
)
