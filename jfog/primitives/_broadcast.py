"""Broadcast of one rank's value to all ranks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _compat, _validation
from jfog.primitives import _operation, _primitive, _pytree, nccl
from jfog.primitives._allreduce import allreduce_p
from jfog.primitives._operation import Operation
from jfog.runtime import Communicator, resolve


@_operation.operation
def broadcast(
  x: Any, root: Any = 0, *, comm: Communicator | None = None
) -> Any:
  """Copies the value of one rank to all ranks.

  Computes `y[i] = x[root]`. The root sends to all other ranks, which wait for it. The
  derivative is that of a copy: the root's cotangent is the sum of the
  cotangents over all ranks, the others' are zero. `broadcast(params)` and
  `broadcast(opt_state)` start a run from equal values.

  Args:
    x: a pytree of arrays, of equal shapes and dtypes on all ranks.
    root: the rank whose value is taken, equal on all ranks: an int, or except on
      NCCL a traced integer scalar, another value of which compiles nothing. On
      a mesh a traced root that is out of range counts as the nearest rank.
    comm: the communicator; by default the current one, see `jfog.init`.

  Returns:
    A pytree like `x`, bit for bit that of the root.

  Raises:
    ValueError: if `root` is an int that is out of range.
    TypeError: if `root` is not an integer, or is traced on NCCL.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`; and if a
      traced root is out of range (`INVALID_ARGUMENT`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: jfog.broadcast(x, root=1), 3)(jnp.arange(3))
    Array([1, 1, 1], dtype=int32)

  Source: `broadcast` and `broadcast_parameters` of BlueFog.
  """
  comm = resolve(comm)
  root = _checked_root(root, comm)
  leaves, names, structure = _pytree.flatten(x, "broadcast")
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: [_mesh_broadcast(x, root, comm) for x in leaves],
    primitive=broadcast_p,
    operands=lambda: _pytree.to_native(leaves, names, "broadcast"),
    # NCCL's call has the root as an attribute, MPI's as an operand.
    fixed=(root,),
    params={
      "static_root": root if comm.backend == "nccl" else None,
      "comm": comm,
    },
  )


broadcast_start = _operation.start_of(
  broadcast,
  """>>> first = lambda x: jfog.wait(jfog.broadcast_start(x))
    >>> jfog.simulate(first, 2)(jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)""",
)


def _checked_root(root: Any, comm: Communicator) -> Any:
  """A rank, as an int, or an integer scalar of JAX."""
  if not isinstance(root, jax.Array):
    return _validation.rank_of_comm(root, comm.size, "broadcast: root")
  if not jnp.issubdtype(root.dtype, jnp.integer) or root.shape != ():
    raise TypeError(
      f"broadcast: root has dtype {root.dtype} and shape {root.shape}; pass an "
      f"integer scalar."
    )
  if comm.backend == "nccl":
    raise TypeError(
      "broadcast: root is a JAX array, and NCCL needs it when the program is "
      "compiled; pass an int."
    )
  return root.astype(jnp.int32)


# Mesh rendition.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mesh_broadcast(x: jax.Array, root: Any, comm: Any) -> jax.Array:
  """The sum of the root's bits and zeros; a sum of floats would lose a -0."""
  if comm.backend == "single":
    return x
  # Complex numbers have no bitcast, and bool no sum.
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
def _mesh_broadcast_jvp(comm: Any, primals: Any, tangents: Any) -> Any:
  (x, root), (dx, _) = primals, tangents
  if comm.backend == "single":
    return x, dx
  # Tangents are floats whose sign of zero does not matter: no bitcast, so that
  # JAX can transpose the sum.
  return _mesh_broadcast(x, root, comm), _from_root(dx, root, comm)


def _from_root(x: jax.Array, root: Any, comm: Any) -> jax.Array:
  x = _compat.varying(x, comm.axes)
  # A traced root is not known here; on a mesh there are no errors at run time, so
  # one that is out of range counts as the nearest rank.
  root = jnp.clip(root, 0, comm.size - 1)
  own = jnp.where(comm.rank == root, x, jnp.zeros_like(x))
  return lax.psum(own, comm.axes)


# Native rendition: rules of the primitive.


def _transpose(
  cotangents: Sequence[Any],
  root: Any,
  *,
  fixed: int,
  comm: Any,
  **params: Any,
) -> Any:
  del fixed, params
  # y[i] = x[root] for all i, so ct_x[root] = sum_i ct_y[i].
  # Every rank takes part, as the others cannot know whose cotangents are zero.
  totals = allreduce_p.bind(*cotangents, fixed=0, op="sum", comm=comm)
  return [jnp.where(root == comm.rank, ct, jnp.zeros_like(ct)) for ct in totals]


class _OnGpus(nccl.Rendition):
  """One broadcast for each buffer of the packing."""

  in_place = True

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Any,
    *,
    static_root: int,
    comm: Any,
  ) -> nccl.Send:
    """The call that broadcasts the packed leaves."""
    del scalars
    attributes = {
      **nccl.common_attributes(mode, comm, "broadcast", static_root, leaves),
      "root": np.int64(static_root),
    }
    packed = nccl.Packing.of(leaves).pack(leaves)
    return nccl.Send("broadcast", attributes, packed)

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Avals of the packed leaves."""
    del static
    return nccl.Packing.of(results).avals()

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The leaves in the received buffers."""
    del weights, static
    return nccl.Packing.of(own).unpack(received)


broadcast_p = _primitive.define(
  "broadcast",
  attributes=lambda *leaves, static_root, comm: {
    "context": np.int64(comm.context)
  },
  transpose=_transpose,
  in_place=True,
  on_gpus=_OnGpus(),
)
