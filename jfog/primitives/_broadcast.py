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
  x: Any, root: int = 0, *, comm: Communicator | None = None
) -> Any:
  """Copies the value of one rank to all ranks.

  Computes `y[i] = x[root]`. The root sends to all other ranks, which wait for it. The
  derivative is that of a copy: the root's cotangent is the sum of the
  cotangents over all ranks, the others' are zero. `broadcast(params)` and
  `broadcast(opt_state)` start a run from equal values.

  Args:
    x: a pytree of arrays, of equal shapes and dtypes on all ranks.
    root: the rank whose value is taken, an int, equal on all ranks.
    comm: the communicator; by default the current one, see `jfog.init`.

  Returns:
    A pytree like `x`, bit for bit that of the root.

  Raises:
    ValueError: if `root` is out of range.
    TypeError: if `root` is not an int.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, as in `neighbor_allreduce`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(lambda x: jfog.broadcast(x, root=1), 3)(jnp.arange(3))
    Array([1, 1, 1], dtype=int32)

  Source: `broadcast` and `broadcast_parameters` of BlueFog.
  """
  comm = resolve(comm)
  root = _validation.rank_of_comm(root, comm.size, "broadcast: root")
  leaves, names, structure = _pytree.flatten(x, "broadcast")
  return Operation(
    leaves,
    structure,
    comm=comm,
    mesh=lambda leaves: [_mesh_broadcast(x, root, comm) for x in leaves],
    primitive=broadcast_p,
    operands=lambda: _pytree.to_native(leaves, names, "broadcast"),
    params={"root": int(root), "comm": comm},
  )


broadcast_start = _operation.start_of(
  broadcast,
  """>>> first = lambda x: jfog.wait(jfog.broadcast_start(x))
    >>> jfog.simulate(first, 2)(jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)""",
)


# Mesh rendition.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _mesh_broadcast(x: jax.Array, root: int, comm: Any) -> jax.Array:
  """The sum of the root's bits and zeros; a sum of floats would lose a -0."""
  if comm.backend == "single":
    return x
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
def _mesh_broadcast_jvp(
  root: int, comm: Any, primals: Any, tangents: Any
) -> Any:
  (x,), (dx,) = primals, tangents
  if comm.backend == "single":
    return x, dx
  return _mesh_broadcast(x, root, comm), _from_root(dx, root, comm)


def _from_root(x: jax.Array, root: int, comm: Any) -> jax.Array:
  x = _compat.varying(x, comm.axes)
  own = jnp.where(comm.rank == root, x, jnp.zeros_like(x))
  return lax.psum(own, comm.axes)


# Native rendition: rules of the primitive.


def _transpose(
  cotangents: Sequence[Any], *, fixed: int, root: int, comm: Any
) -> Any:
  # y[i] = x[root] for all i, so ct_x[root] = sum_i ct_y[i].
  totals = allreduce_p.bind(*cotangents, fixed=fixed, op="sum", comm=comm)
  if comm.rank == root:
    return totals
  return [jnp.zeros_like(ct) for ct in totals]


class _OnGpus(nccl.Rendition):
  """One broadcast for each buffer of the packing."""

  in_place = True

  def encode(
    self,
    mode: nccl.Mode,
    scalars: Sequence[Any],
    leaves: Any,
    *,
    root: int,
    comm: Any,
  ) -> nccl.Send:
    """The call that broadcasts the packed leaves."""
    del scalars
    attributes = {
      **nccl.common_attributes(mode, comm, "broadcast", root, leaves),
      "root": np.int64(root),
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
  attributes=lambda mode, *leaves, root, comm: {
    "context": np.int64(comm.context),
    "root": np.int64(root),
  },
  transpose=_transpose,
  in_place=True,
  on_gpus=_OnGpus(),
)
