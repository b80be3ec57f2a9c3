"""Definition of communication primitives: one place for all their rules."""

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
from jfog.primitives import _nccl
from jfog.primitives._nccl import Mode

# The backends that carry a primitive, by the platform it is compiled for.
_BACKENDS = {"cpu": "mpi", "cuda": "nccl"}


def define(
  name: str,
  *,
  abstract_eval: Callable[..., Sequence[jax.core.ShapedArray]],
  attributes: Callable[..., dict[str, Any]],
  tangents: Callable[..., list[Any]] | None = None,
  transpose: Callable[..., Sequence[jax.Array]] | None = None,
  batch_axis: int | None = 0,
  in_place: bool = False,
  on_gpus: _nccl.OnGpus | None = None,
) -> Primitive:
  """Makes and registers the primitives of one operation between processes.

  Its operands are `fixed` ones (a step, weights) followed by the leaves, and
  its results are one for each leaf. Every rule gets the parameter `fixed`, their
  number. The primitive carries the ordered effect, so calls are posted in
  program order and never dropped, and lowers to the handler
  `jfog_<backend>_<name>`; on GPUs with arithmetic of XLA's around it.

  The operation gets a second primitive, `start_of(primitive)`, with the same
  operands and parameters and all rules derived from these: it returns a number
  to wait for the operation by, an array of weights, and room for the results,
  see `wait_p`.

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
    on_gpus: how it runs there; by default its host handler does the work, on
      copies.

  Returns:
    The primitive, bound with `fixed=` and the operation's own parameters.
  """
  whole = Primitive(name)
  start = Primitive(f"{name}_start")
  _start_of[whole] = start, batch_axis or 0
  _on_gpus[name] = on_gpus

  def start_abstract_eval(*operands, fixed, **params):
    number = jax.core.ShapedArray((), jnp.uint32)
    weights = jax.core.ShapedArray((0,), jnp.float32)
    if on_gpus is not None:
      weigh = functools.partial(on_gpus.weigh, **params)
      like = jax.eval_shape(lambda *fixed: weigh(fixed), *operands[:fixed])
      weights = jax.core.ShapedArray(like.shape, like.dtype)
    results = abstract_eval(*operands, fixed=fixed, **params)
    return [number, weights, *results]

  tangents = tangents or linear_tangents

  def jvp(primals, dprimals, **params):
    results = whole.bind(*primals, **params)
    return results, tangents(whole, primals, results, dprimals, **params)

  def start_jvp(primals, dprimals, **params):
    # The room for the results carries their tangents, which are computed now.
    number, weights, *room = start.bind(*primals, **params)
    moved = tangents(whole, primals, room, dprimals, **params)
    return [number, weights, *room], [
      zero_tangent(number),
      zero_tangent(weights),
      *moved,
    ]

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

  def aliases(operands, fixed):
    if not in_place:
      return {}
    return {i: i - fixed for i in range(fixed, operands)}

  def on_host(backend, mode):
    """The call of one handler."""

    def lower(ctx, *operands, fixed, **params):
      target = f"jfog_{backend}_{name}"
      told = handler_attributes(mode, *ctx.avals_in, fixed=fixed, **params)
      if mode is Mode.WHOLE:
        rule = _compat.ordered_ffi_lowering(
          target, aliases(len(operands), fixed)
        )
        return rule(ctx, *operands, **told)
      number, weights, *room = ctx.avals_out
      rule = _compat.ordered_ffi_lowering(target, {}, avals_out=[number, *room])
      results = rule(ctx, *operands, **told)
      nothing = mlir.ir_constant(np.zeros(weights.shape, weights.dtype))
      return [results[0], nothing, *results[1:]]

    return lower

  def through_xla(stage):

    def run(*operands, fixed, **params):
      results = abstract_eval(*operands, fixed=fixed, **params)
      return stage(on_gpus, results, operands[:fixed], operands[fixed:], params)

    return mlir.lower_fun(run, multiple_results=True)

  staged = on_gpus is None
  _register(
    whole,
    abstract_eval,
    mpi=on_host("mpi", Mode.WHOLE),
    nccl=on_host("nccl", Mode.WHOLE) if staged else through_xla(_nccl.whole),
  )
  _register(
    start,
    start_abstract_eval,
    mpi=on_host("mpi", Mode.START),
    nccl=on_host("nccl", Mode.START) if staged else through_xla(_nccl.start),
  )
  return whole


_start_of: dict[Primitive, tuple[Primitive, int]] = {}


def start_of(primitive: Primitive) -> tuple[Primitive, int]:
  """The primitive that starts an operation, and the operation's batch axis."""
  return _start_of[primitive]


# The rendition on GPUs, by the name of the operation; None: the host's.
_on_gpus: dict[str, _nccl.OnGpus | None] = {}


def finishing(primitive: Primitive, params: dict[str, Any]) -> Any:
  """What of an operation is known where it is started, for `wait_p`."""
  on_gpus = _on_gpus[primitive.name]
  return () if on_gpus is None else on_gpus.static(**params)


_lowerings: dict[Primitive, dict[str, Callable[..., Any]]] = {}


def _register(
  primitive: Primitive,
  abstract_eval: Callable[..., Sequence[jax.core.ShapedArray]],
  **lowerings: Callable[..., Any],
) -> None:
  """Gives a primitive the ordered effect, its eager form and its lowerings."""
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
  _lowerings[primitive] = lowerings
  for platform, backend in _BACKENDS.items():
    mlir.register_lowering(primitive, lowerings[backend], platform=platform)


def carry_by(backend: str, platform: str) -> None:
  """Lets a backend carry all operations that are compiled for a platform.

  For tests of a backend on a stand-in for its hardware.
  """
  for primitive, lowerings in _lowerings.items():
    mlir.register_lowering(primitive, lowerings[backend], platform=platform)


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
  number, weights, *room = primitive.bind(
    *operands[:fixed], *moved, fixed=fixed, **params
  )
  return [number, weights, *room], [None, None, *out(room)]


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


# Waiting for a started operation: its number, weights for what it has received,
# and the room for its results, which they take. On GPUs the room holds the own
# values, and the results are computed where they are waited for.

wait_p = Primitive("wait")
poll_p = Primitive("poll")


def _check_number(number):
  if number.shape != ():
    raise ValueError(
      "wait: a handle that was made inside of vmap has to be waited on inside "
      "of it."
    )


def _wait_abstract_eval(number, weights, *room, **params):
  del weights, params
  _check_number(number)
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in room]


def _wait_jvp(primals, tangents, **params):
  return wait_p.bind(*primals, **params), list(tangents[2:])


def _wait_batch(operands, dims, *, batch_axis, **params):
  number, weights, *room = operands
  if dims[0] is not None:
    _check_number(number)
  # Back to where `_start_batch` has put the batches.
  moved, out = _move_batches(room, dims[2:], batch_axis)
  results = wait_p.bind(
    number, weights, *moved, batch_axis=batch_axis, **params
  )
  return results, out(results)


def _wait_on_host(target):

  def lower(ctx, number, weights, *room, **params):
    del weights, params
    rule = _compat.ordered_ffi_lowering(
      target,
      {i + 1: i for i in range(len(room))},
      avals_in=[ctx.avals_in[0], *ctx.avals_in[2:]],
    )
    return rule(ctx, number, *room)

  return lower


def _wait_on_gpus(ctx, *operands, operation, static, batch_axis):
  on_gpus = _on_gpus[operation]
  if on_gpus is None:
    return _wait_on_host("jfog_nccl_staged_wait")(ctx, *operands)

  def run(number, weights, *room):
    return _nccl.wait(on_gpus, number, weights, room, static)

  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _poll_abstract_eval(number, **params):
  del params
  _check_number(number)
  return [jax.core.ShapedArray((), jnp.bool_)]


def _poll_by(backend):

  def lower(ctx, number, operation):
    staged = backend == "nccl" and _on_gpus[operation] is None
    target = f"jfog_{backend}_{'staged_' if staged else ''}poll"
    return _compat.ordered_ffi_lowering(target, {})(ctx, number)

  return lower


_register(
  wait_p,
  _wait_abstract_eval,
  mpi=_wait_on_host("jfog_mpi_wait"),
  nccl=_wait_on_gpus,
)
ad.primitive_jvps[wait_p] = _wait_jvp
batching.primitive_batchers[wait_p] = _wait_batch
_register(
  poll_p, _poll_abstract_eval, mpi=_poll_by("mpi"), nccl=_poll_by("nccl")
)
ad.primitive_jvps[poll_p] = lambda primals, tangents, **params: (
  ended := poll_p.bind(*primals, **params),
  [zero_tangent(ended[0])],
)
batching.primitive_batchers[poll_p] = lambda operands, dims, **params: (
  poll_p.bind(*operands, **params),
  [None],
)
