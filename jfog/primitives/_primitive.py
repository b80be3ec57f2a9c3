"""Definition of communication primitives: one place for all their rules."""

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jfog import _compat

# The backends that carry a primitive, by the platform it is compiled for.
_BACKENDS = {"cpu": "mpi"}


class _Mode(enum.IntEnum):
  """What a handler does with its operation; numbered as in call.h."""

  WHOLE = 0
  START = 1


def define(
  name: str,
  *,
  abstract_eval: Callable[..., Sequence[jax.core.ShapedArray]],
  attributes: Callable[..., dict[str, Any]],
  tangents: Callable[..., list[Any]] | None = None,
  transpose: Callable[..., Sequence[jax.Array]] | None = None,
  batch_axis: int | None = 0,
  in_place: bool = False,
) -> Primitive:
  """Makes and registers the primitives of one operation between processes.

  Its operands are `fixed` ones (a step, weights) followed by the leaves, and
  its results are one for each leaf. Every rule gets the parameter `fixed`, their
  number. The primitive carries the ordered effect, so calls are posted in
  program order and never dropped, and lowers to the handler
  `jfog_<backend>_<name>`.

  The operation gets a second primitive, `start_of(primitive)`, with the same
  operands and parameters and all rules derived from these: it returns a number
  to wait for the operation by, and room for the results, see `wait_p`.

  Args:
    name: the operation's name.
    abstract_eval: `(*operands, **params)` to the results' shapes and dtypes.
    attributes: `(mode, *shapes of the leaves, **params)` to the handler's
      attributes; the mode itself is added.
    tangents: `(primitive, primals, results, tangents, **params)` to the
      results' tangents; by default those of an operation which is linear in its
      leaves and does not depend smoothly on the others.
    transpose: `(cotangents, *fixed operands, **params)` to the cotangents of
      the leaves, all of them; None for an operation without a transpose.
    batch_axis: where a batch lies in a leaf and in a result, 0 or -1: an axis
      the operation treats like all elements; None for an operation that takes
      no batches.
    in_place: whether a result may share the buffer of its leaf.

  Returns:
    The primitive, bound with `fixed=` and the operation's own parameters.
  """
  whole = Primitive(name)
  start = Primitive(f"{name}_start")
  _start_of[whole] = start, batch_axis or 0

  def start_abstract_eval(*operands, **params):
    number = jax.core.ShapedArray((), jnp.uint32)
    return [number, *abstract_eval(*operands, **params)]

  tangents = tangents or linear_tangents

  def jvp(primals, dprimals, **params):
    results = whole.bind(*primals, **params)
    return results, tangents(whole, primals, results, dprimals, **params)

  def start_jvp(primals, dprimals, **params):
    # The room for the results carries their tangents, which are computed now.
    number, *room = start.bind(*primals, **params)
    moved = tangents(whole, primals, room, dprimals, **params)
    return [number, *room], [zero_tangent(number), *moved]

  ad.primitive_jvps[whole] = jvp
  ad.primitive_jvps[start] = start_jvp
  if transpose is not None:
    ad.primitive_transposes[whole] = functools.partial(
      _transpose_leaves, transpose
    )
  if batch_axis is None:
    for primitive in (whole, start):
      batching.primitive_batchers[primitive] = functools.partial(
        _no_batch, primitive
      )
  else:
    batching.primitive_batchers[whole] = functools.partial(
      _batch, whole, batch_axis
    )
    batching.primitive_batchers[start] = functools.partial(
      _start_batch, start, batch_axis
    )

  def handler_attributes(mode, *operands, fixed, **params):
    leaves = operands[fixed:]
    return {"mode": np.int64(mode), **attributes(mode, *leaves, **params)}

  _register(
    whole,
    name,
    abstract_eval,
    functools.partial(handler_attributes, _Mode.WHOLE),
    lambda operands, fixed, **params: (
      {i: i - fixed for i in range(fixed, operands)} if in_place else {}
    ),
  )
  _register(
    start,
    name,
    start_abstract_eval,
    functools.partial(handler_attributes, _Mode.START),
  )
  return whole


_start_of: dict[Primitive, tuple[Primitive, int]] = {}


def start_of(primitive: Primitive) -> tuple[Primitive, int]:
  """The primitive that starts an operation, and the operation's batch axis."""
  return _start_of[primitive]


def _register(
  primitive: Primitive,
  target: str,
  abstract_eval: Callable[..., Sequence[jax.core.ShapedArray]],
  attributes: Callable[..., dict[str, Any]] = lambda *operands, **params: {},
  aliases: Callable[..., dict[int, int]] = lambda operands, **params: {},
) -> None:
  """Gives a primitive the ordered effect, its eager form and its lowering."""
  primitive.multiple_results = True
  primitive.def_impl(
    lambda *operands, **params: _compiled(primitive, tuple(params.items()))(
      *operands
    )
  )

  def effectful_abstract_eval(*operands, **params):
    results = list(abstract_eval(*operands, **params))
    return results, {_compat.communication_effect()}

  primitive.def_effectful_abstract_eval(effectful_abstract_eval)
  for platform, backend in _BACKENDS.items():

    def lower(ctx, *operands, _backend=backend, **params):
      rule = _compat.ordered_ffi_lowering(
        f"jfog_{_backend}_{target}", aliases(len(operands), **params)
      )
      return rule(ctx, *operands, **attributes(*ctx.avals_in, **params))

    mlir.register_lowering(primitive, lower, platform=platform)


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]):
  """The jitted form that runs when the primitive is called eagerly."""
  bind = functools.partial(primitive.bind, **dict(params))
  bind.__name__ = primitive.name  # type: ignore[attr-defined]
  return jax.jit(bind)


def zero_tangent(y: jax.Array) -> ad.Zero:
  """The symbolic zero that stands for an absent tangent of `y`."""
  return ad.Zero(jax.typeof(y).to_tangent_aval())


def linear_tangents(primitive, primals, results, tangents, *, fixed, **params):
  """y = f(x) is linear in the leaves: dy = f(dx), one more operation."""
  out: list[Any] = [zero_tangent(y) for y in results]
  leaves = tangents[fixed:]
  moving = [i for i, dx in enumerate(leaves) if type(dx) is not ad.Zero]
  if moving:
    dy = primitive.bind(
      *primals[:fixed], *(leaves[i] for i in moving), fixed=fixed, **params
    )
    for i, tangent in zip(moving, dy, strict=True):
      out[i] = tangent
  return out


def _transpose_leaves(rule, cotangents, *operands, fixed, **params):
  """Runs a transpose on all leaves, in one operation on every rank."""
  cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
  results = rule(cotangents, *operands[:fixed], fixed=fixed, **params)
  return [None] * fixed + [
    ct if ad.is_undefined_primal(x) else None
    for x, ct in zip(operands[fixed:], results, strict=True)
  ]


def _no_batch(primitive, operands, dims, **params):
  raise ValueError(
    f"{primitive.name} under vmap would be one operation for each element of the "
    f"batch, on one state; make the batch part of the value."
  )


def _batch(primitive, axis, operands, dims, *, fixed, **params):
  """A batch of a leaf is a larger leaf, and travels in one operation."""
  if any(dim is not None for dim in dims[:fixed]):
    return _map_batch(primitive, operands, dims, fixed=fixed, **params)
  moved, out = _move_batches(operands[fixed:], dims[fixed:], axis)
  results = primitive.bind(*operands[:fixed], *moved, fixed=fixed, **params)
  return results, out(results)


def _start_batch(primitive, axis, operands, dims, *, fixed, **params):
  if any(dim is not None for dim in dims[:fixed]):
    raise ValueError(
      f"{primitive.name} under vmap with a batched step, peer or weights is "
      f"one operation for each of them; use the form that is not split."
    )
  moved, out = _move_batches(operands[fixed:], dims[fixed:], axis)
  number, *room = primitive.bind(
    *operands[:fixed], *moved, fixed=fixed, **params
  )
  return [number, *room], [None, *out(room)]


def _move_batches(leaves, dims, axis):
  """Leaves with their batches at `axis`, and where those of results lie."""
  moved = [
    x if d is None else jnp.moveaxis(x, d, axis)
    for x, d in zip(leaves, dims, strict=True)
  ]

  def out(results):
    return [
      None if d is None else axis % y.ndim
      for y, d in zip(results, dims, strict=True)
    ]

  return moved, out


def _map_batch(primitive, operands, dims, **params):
  """One operation for each element of the batch, in their order."""
  mapped = [d is not None for d in dims]
  moved = [
    jnp.moveaxis(x, d, 0)
    for x, d, m in zip(operands, dims, mapped, strict=True)
    if m
  ]

  def one(batched):
    batched = iter(batched)
    merged = [
      next(batched) if m else x for x, m in zip(operands, mapped, strict=True)
    ]
    return primitive.bind(*merged, **params)

  results = jax.lax.map(one, moved)
  return results, [0] * len(results)


# Waiting for a started operation: the number, and the room for its results,
# which they take.

wait_p = Primitive("wait")
poll_p = Primitive("poll")


def _check_number(number):
  if number.shape != ():
    raise ValueError(
      "wait: a handle that was made inside of vmap has to be waited on inside "
      "of it."
    )


def _wait_abstract_eval(number, *room, batch_axis):
  del batch_axis
  _check_number(number)
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in room]


def _wait_jvp(primals, tangents, **params):
  return wait_p.bind(*primals, **params), list(tangents[1:])


def _wait_batch(operands, dims, *, batch_axis):
  number, *room = operands
  if dims[0] is not None:
    _check_number(number)
  # Back to where `_start_batch` has put the batches.
  moved, out = _move_batches(room, dims[1:], batch_axis)
  results = wait_p.bind(number, *moved, batch_axis=batch_axis)
  return results, out(results)


def _poll_abstract_eval(number):
  _check_number(number)
  return [jax.core.ShapedArray((), jnp.bool_)]


_register(
  wait_p,
  "wait",
  _wait_abstract_eval,
  aliases=lambda operands, batch_axis: {i: i - 1 for i in range(1, operands)},
)
ad.primitive_jvps[wait_p] = _wait_jvp
batching.primitive_batchers[wait_p] = _wait_batch
_register(poll_p, "poll", _poll_abstract_eval)
ad.primitive_jvps[poll_p] = lambda primals, tangents: (
  ended := poll_p.bind(*primals),
  [zero_tangent(ended[0])],
)
batching.primitive_batchers[poll_p] = lambda operands, dims: (
  poll_p.bind(*operands),
  [None],
)
