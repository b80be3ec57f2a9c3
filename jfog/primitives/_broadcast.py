"""Broadcast of one rank's value to all ranks."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jfog import _compat
from jfog.primitives import _nccl, _operation, _primitive, _pytree
from jfog.primitives._allreduce import allreduce_p
from jfog.primitives._operation import Call
from jfog.runtime import Communicator, resolve


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


broadcast_start = _operation.start_of(
  broadcast,
  """>>> first = lambda x: jfog.wait(jfog.broadcast_start(x))
    >>> jfog.simulate(first, 2)(jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)""",
)


# The mesh.


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


# Between processes: the rules of the primitive.


def _like_operands(*operands, fixed, **params):
  del fixed, params
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in operands]


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
