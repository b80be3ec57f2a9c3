"""Concatenation of the values of all ranks."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _compat
from jfog.primitives import _mesh, _operation, _primitive, _pytree, nccl
from jfog.primitives._allreduce import allreduce_p
from jfog.primitives._operation import Operation
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
  one of shape (1,). All ranks send to
  all others and wait for each other. The transpose
  gives each rank the sum over ranks of the cotangents of its own part.

  Args:
    x: a pytree of arrays, of equal dtypes on all ranks and equal shapes but for
      what `axis_sizes` allows.
    axis_sizes: the length of axis 0 on every rank, one int for each, where they
      differ; the same for all leaves. On a mesh all ranks have one shape, so
      there they must be equal.
    comm: the communicator; by default the current one, see `jfog.init`.

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
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: [_mesh_allgather(x, comm) for x in leaves],
    primitive=allgather_p,
    operands=lambda: _pytree.to_native(leaves, names, "allgather"),
    params={"axis_sizes": tuple(sizes), "comm": comm},
  )


allgather_start = _operation.start_of(
  allgather,
  """>>> all_of = lambda x: jfog.wait(jfog.allgather_start(x))
    >>> jfog.simulate(all_of, 2)(jnp.array([1.0, 3.0]))
    Array([[1., 3.],
           [1., 3.]], dtype=float32)""",
)


# Mesh rendition.


def _mesh_allgather(x: jax.Array, comm: Any) -> jax.Array:
  if comm.backend == "single":
    return x
  gathered = _mesh.gather(_compat.varying(x, comm.axes), comm.axes)
  return gathered.reshape(len(gathered) * len(x), *x.shape[1:])


# Native rendition: rules of the primitive.


def _abstract_eval(
  *operands: Any, fixed: int, axis_sizes: tuple[tuple[int, ...], ...], comm: Any
) -> list[jax.core.ShapedArray]:
  del fixed, comm
  return [
    jax.core.ShapedArray((sum(sizes), *x.shape[1:]), x.dtype)
    for x, sizes in zip(operands, axis_sizes, strict=True)
  ]


def _transpose(
  cotangents: Sequence[Any],
  *,
  fixed: int,
  axis_sizes: tuple[tuple[int, ...], ...],
  comm: Any,
) -> list[Any]:
  # Every rank has a copy of rank i's part: its cotangent is the sum over ranks of
  # theirs, of which rank i keeps its own rows.
  totals = allreduce_p.bind(*cotangents, fixed=fixed, op="sum", comm=comm)
  own = []
  for total, sizes in zip(totals, axis_sizes, strict=True):
    start = sum(sizes[: comm.rank])
    own.append(lax.slice_in_dim(total, start, start + sizes[comm.rank], axis=0))
  return own


def _attributes(
  *leaves: Any, axis_sizes: tuple[tuple[int, ...], ...], comm: Any
) -> dict[str, Any]:
  return {
    "context": np.int64(comm.context),
    # By leaf and rank, flat: an attribute has one dimension.
    "rows": np.array(axis_sizes, np.int64).ravel(),
    "row_sizes": np.array([math.prod(x.shape[1:]) for x in leaves], np.int64),
  }


class _OnGpus(nccl.Rendition):
  """One ncclAllGather for each leaf.

  NCCL gathers equal parts, so every rank pads its part to the longest one.
  """

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Any,
    *,
    axis_sizes: tuple[tuple[int, ...], ...],
    comm: Any,
  ) -> nccl.Send:
    """The call that gathers the padded leaves."""
    del scalars
    padded = []
    for x, sizes in zip(leaves, axis_sizes, strict=True):
      # ncclAllGather takes equal lengths; `decode` removes the padding.
      behind = max(sizes) - len(x)
      padded.append(jnp.pad(x, [(0, behind)] + [(0, 0)] * (x.ndim - 1)))
    attributes = nccl.common_attributes(
      mode, comm, "allgather", axis_sizes, padded
    )
    return nccl.Send("allgather", attributes, padded)

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Avals of the padded parts of all ranks."""
    return [
      jax.ShapeDtypeStruct((len(sizes) * max(sizes), *y.shape[1:]), y.dtype)
      for y, sizes in zip(results, static, strict=True)
    ]

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The parts without their padding, concatenated."""
    del own, weights
    results = []
    for y, sizes in zip(received, static, strict=True):
      if len(set(sizes)) > 1:
        longest = max(sizes)
        parts = [y[i * longest :][:size] for i, size in enumerate(sizes)]
        y = jnp.concatenate(parts)
      results.append(y)
    return results

  def static(
    self, *, axis_sizes: tuple[tuple[int, ...], ...], **params: Any
  ) -> tuple[tuple[int, ...], ...]:
    """Lengths of axis 0, by leaf and rank."""
    del params
    return axis_sizes


allgather_p = _primitive.define(
  "allgather",
  abstract_eval=_abstract_eval,
  attributes=_attributes,
  tangents=functools.partial(
    # A leaf without a tangent is left out, and its lengths with it.
    _primitive.linear_tangents,
    per_leaf=("axis_sizes",),
  ),
  transpose=_transpose,
  batch_axis=-1,  # axis 0 is concatenated
  on_gpus=_OnGpus(),
)
