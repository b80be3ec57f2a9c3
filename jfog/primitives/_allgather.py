"""Concatenation of the values of all ranks."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from jfog import _compat
from jfog.primitives import _mesh, _nccl, _operation, _primitive, _pytree
from jfog.primitives._allreduce import allreduce_p
from jfog.primitives._operation import Call
from jfog.runtime import Communicator, resolve


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


allgather_start = _operation.start_of(
  allgather,
  """>>> all_of = lambda x: jfog.wait(jfog.allgather_start(x))
    >>> jfog.simulate(all_of, 2)(jnp.array([1.0, 3.0]))
    Array([[1., 3.],
           [1., 3.]], dtype=float32)""",
)


# The mesh.


def _mesh_allgather(x, comm):
  gathered = _mesh.gather(_compat.varying(x, comm.axes), comm.axes)
  return gathered.reshape(len(gathered) * len(x), *x.shape[1:])


# Between processes: the rules of the primitive.


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
