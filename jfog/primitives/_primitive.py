"""Definition of communication primitives: one place for all their rules."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jfog import _compat

# The backends that carry a primitive, by the platform it is compiled for.
_BACKENDS = {"cpu": "mpi"}


def define(
  name: str,
  *,
  abstract_eval: Callable[..., Sequence[jax.core.ShapedArray]],
  attributes: Callable[..., dict[str, Any]],
  jvp: Callable[..., Any] | None = None,
  transpose: Callable[..., Sequence[jax.Array]] | None = None,
  batch: Callable[..., Any] | None = None,
  in_place: bool = False,
) -> Primitive:
  """Makes and registers the primitive of one operation between processes.

  Its operands are `fixed` ones (a step, weights) followed by the leaves, and
  its results are one for each leaf. Every rule gets the parameter `fixed`, their
  number. The primitive carries the ordered effect, so calls are posted in
  program order and never dropped, and lowers to the handler
  `jfog_<backend>_<name>`.

  Args:
    name: the operation's name.
    abstract_eval: `(*operands, **params)` to the results' shapes and dtypes.
    attributes: `(**params)` to the handler's attributes.
    jvp: the forward derivative; by default that of an operation which is linear
      in its leaves and does not depend smoothly on the others.
    transpose: `(cotangents, *fixed operands, **params)` to the cotangents of
      the leaves, all of them; None for an operation without a transpose.
    batch: the batching rule; by default that of an operation which treats all
      elements of a leaf alike.
    in_place: whether a result may share the buffer of its leaf.

  Returns:
    The primitive, bound with `fixed=` and the operation's own parameters.
  """
  primitive = Primitive(name)
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
  ad.primitive_jvps[primitive] = functools.partial(jvp or linear_jvp, primitive)
  if transpose is not None:
    ad.primitive_transposes[primitive] = functools.partial(
      _transpose_leaves, transpose
    )
  batching.primitive_batchers[primitive] = functools.partial(
    batch or _elementwise_batch, primitive
  )

  for platform, backend in _BACKENDS.items():

    def lower(ctx, *operands, fixed, _backend=backend, **params):
      shared = range(fixed, len(operands)) if in_place else ()
      rule = _compat.ordered_ffi_lowering(
        f"jfog_{_backend}_{name}", {i: i - fixed for i in shared}
      )
      return rule(ctx, *operands, **attributes(**params))

    mlir.register_lowering(primitive, lower, platform=platform)
  return primitive


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]):
  """The jitted form that runs when the primitive is called eagerly."""
  bind = functools.partial(primitive.bind, **dict(params))
  bind.__name__ = primitive.name  # type: ignore[attr-defined]
  return jax.jit(bind)


def zero_tangent(y: jax.Array) -> ad.Zero:
  """The symbolic zero that stands for an absent tangent of `y`."""
  return ad.Zero(jax.typeof(y).to_tangent_aval())


def linear_jvp(primitive, primals, tangents, *, fixed, **params):
  """y = f(x) is linear in the leaves: dy = f(dx), one more operation."""
  results = primitive.bind(*primals, fixed=fixed, **params)
  out = [zero_tangent(y) for y in results]
  leaves = tangents[fixed:]
  moving = [i for i, dx in enumerate(leaves) if type(dx) is not ad.Zero]
  if moving:
    dy = primitive.bind(
      *primals[:fixed], *(leaves[i] for i in moving), fixed=fixed, **params
    )
    for i, tangent in zip(moving, dy, strict=True):
      out[i] = tangent
  return results, out


def _transpose_leaves(rule, cotangents, *operands, fixed, **params):
  """Runs a transpose on all leaves, in one operation on every rank."""
  cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
  results = rule(cotangents, *operands[:fixed], fixed=fixed, **params)
  return [None] * fixed + [
    ct if ad.is_undefined_primal(x) else None
    for x, ct in zip(operands[fixed:], results, strict=True)
  ]


def _elementwise_batch(primitive, operands, dims, *, fixed, **params):
  """All elements of a leaf are treated alike, so a batch is a larger leaf."""
  if any(dim is not None for dim in dims[:fixed]):
    return map_batch(primitive, operands, dims, fixed=fixed, **params)
  results = primitive.bind(*operands, fixed=fixed, **params)
  return results, list(dims[fixed:])


def map_batch(primitive, operands, dims, **params):
  """One operation for each element of the batch, in their order."""
  mapped = [d is not None for d in dims]
  moved = [
    jax.numpy.moveaxis(x, d, 0)
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
