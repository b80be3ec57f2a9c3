"""Lowerings of operations: handlers on CPUs, XLA and NCCL on GPUs, wait, poll."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jfog import _compat
from jfog.primitives.nccl import _lowering as nccl_lowering
from jfog.primitives.nccl._lowering import Mode, Rendition
from jfog.runtime import refuse_in_fork

# A rule from context, operands and parameters to the values of the results.
LoweringRule = Callable[..., Sequence[Any]]
AbstractEval = Callable[..., Sequence[jax.core.ShapedArray]]
# `(mode, operands, num_scalar_operands, params)` to a handler's attributes.
HandlerAttributes = Callable[[Mode, Sequence[Any], int, Any], dict[str, Any]]

# Native backend by the platform that a program is compiled for.
_BACKENDS = {"cpu": "mpi", "cuda": "nccl"}

_lowerings: dict[Primitive, dict[str, LoweringRule]] = {}

# Rendition on GPUs by the name of the operation; None: the host fallback.
_renditions: dict[str, Rendition | None] = {}


def register(
  primitive: Primitive, abstract_eval: AbstractEval, **lowerings: LoweringRule
) -> None:
  """Gives a primitive the ordered effect, an eager form and its lowerings."""
  primitive.multiple_results = True

  def eager(*operands: Any, **params: Any) -> Any:
    return _compiled(primitive, tuple(params.items()))(*operands)

  def effectful_abstract_eval(*operands: Any, **params: Any) -> Any:
    refuse_in_fork(primitive.name)
    results = list(abstract_eval(*operands, **params))
    return results, {_compat.communication_effect()}

  primitive.def_impl(eager)
  primitive.def_effectful_abstract_eval(effectful_abstract_eval)
  _lowerings[primitive] = lowerings
  for platform, backend in _BACKENDS.items():
    mlir.register_lowering(primitive, lowerings[backend], platform=platform)


@functools.cache
def _compiled(
  primitive: Primitive, params: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
  """The jitted form that an eager call of the primitive runs."""
  bind = functools.partial(primitive.bind, **dict(params))
  bind.__name__ = primitive.name  # type: ignore[attr-defined]
  return jax.jit(bind)


# A fork traces eager calls again, and is refused there. XLA would wait for the
# threads of its parent in a program that was compiled before.
os.register_at_fork(after_in_child=_compiled.cache_clear)


def use_backend_for_tests(backend: str, platform: str) -> None:
  """Lowers all operations for a platform to the handlers of one backend.

  For tests of a backend on a stand-in for its hardware.
  """
  for primitive, lowerings in _lowerings.items():
    mlir.register_lowering(primitive, lowerings[backend], platform=platform)


def register_operation(
  name: str,
  blocking: tuple[Primitive, AbstractEval],
  start: tuple[Primitive, AbstractEval],
  attributes: HandlerAttributes,
  rendition: Rendition | None,
  in_place: bool,
) -> None:
  """Registers the blocking and the split primitive of an operation.

  Args:
    name: the name of the operation.
    blocking: the blocking primitive, and its abstract evaluation.
    start: the primitive that starts the operation, likewise.
    attributes: the attributes of its handlers.
    rendition: the rendition on GPUs; None for the host fallback.
    in_place: whether a result may alias its leaf.
  """
  _renditions[name] = rendition
  for (primitive, abstract_eval), mode in (
    (blocking, Mode.WHOLE),
    (start, Mode.START),
  ):
    on_host = functools.partial(_lower_to_handler, name, attributes, in_place)
    if rendition is None:
      on_gpu = on_host("nccl", mode)
    else:
      stage = (
        nccl_lowering.blocking if mode is Mode.WHOLE else nccl_lowering.start
      )
      on_gpu = _lower_to_xla(stage, rendition, blocking[1])
    register(primitive, abstract_eval, mpi=on_host("mpi", mode), nccl=on_gpu)


def _lower_to_handler(
  name: str,
  attributes: HandlerAttributes,
  in_place: bool,
  backend: str,
  mode: Mode,
) -> LoweringRule:
  """One call of a handler, which reads and writes buffers in host memory."""
  target = f"jfog_{backend}_{name}"

  def lower(
    ctx: mlir.LoweringRuleContext, *operands: Any, fixed: int, **params: Any
  ) -> Sequence[Any]:
    values = attributes(mode, ctx.avals_in, fixed, params)
    if mode is Mode.WHOLE:
      aliases = (
        {i: i - fixed for i in range(fixed, len(operands))} if in_place else {}
      )
      rule = _compat.ordered_ffi_lowering(target, aliases)
      return rule(ctx, *operands, **values)
    # The handler returns a number and placeholders. The weights between them
    # are for `wait` on GPUs only.
    num_weights = len(ctx.avals_out) - 1 - (len(operands) - fixed)
    number, *others = ctx.avals_out
    weights, placeholders = others[:num_weights], others[num_weights:]
    rule = _compat.ordered_ffi_lowering(
      target, {}, avals_out=[number, *placeholders]
    )
    results = rule(ctx, *operands, **values)
    unused = [mlir.ir_constant(np.zeros(x.shape, x.dtype)) for x in weights]
    return [results[0], *unused, *results[1:]]

  return lower


def _lower_to_xla(
  stage: Callable[..., Sequence[Any]],
  rendition: Rendition,
  abstract_eval: AbstractEval,
) -> LoweringRule:
  """XLA arithmetic around a call of NCCL."""

  def run(*operands: Any, fixed: int, **params: Any) -> Sequence[Any]:
    results = abstract_eval(*operands, fixed=fixed, **params)
    return stage(rendition, results, operands[:fixed], operands[fixed:], params)

  return mlir.lower_fun(run, multiple_results=True)


# Wait and poll. Their operands are the number of the operation; then for wait
# the weights of what is received, and the placeholders, which the results take.


def lower_wait_to_handler(target: str) -> LoweringRule:
  """Waits in a handler, which writes the results into the placeholders."""

  def lower(
    ctx: mlir.LoweringRuleContext,
    number: Any,
    *operands: Any,
    num_weights: int,
    **params: Any,
  ) -> Sequence[Any]:
    del params
    placeholders = operands[num_weights:]
    rule = _compat.ordered_ffi_lowering(
      target,
      {i + 1: i for i in range(len(placeholders))},
      avals_in=[ctx.avals_in[0], *ctx.avals_in[1 + num_weights :]],
    )
    return rule(ctx, number, *placeholders)

  return lower


def lower_wait_to_nccl(
  ctx: mlir.LoweringRuleContext,
  *operands: Any,
  operation: str,
  num_weights: int,
  weights_structure: Any,
  static: Any,
  batch_axis: int,
) -> Sequence[Any]:
  """Waits for NCCL, then decodes in XLA; the placeholders hold own values."""
  del batch_axis
  rendition = _renditions[operation]
  if rendition is None:
    rule = lower_wait_to_handler("jfog_nccl_staged_wait")
    return rule(ctx, *operands, num_weights=num_weights)

  def run(number: Any, *operands: Any) -> Sequence[Any]:
    weights = jax.tree.unflatten(weights_structure, operands[:num_weights])
    return nccl_lowering.wait(
      rendition, number, weights, operands[num_weights:], static
    )

  return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def lower_poll(backend: str) -> LoweringRule:
  """Polls an operation in a handler."""

  def lower(
    ctx: mlir.LoweringRuleContext, number: Any, operation: str
  ) -> Sequence[Any]:
    on_host = backend == "nccl" and _renditions[operation] is None
    target = f"jfog_{backend}_{'staged_' if on_host else ''}poll"
    return _compat.ordered_ffi_lowering(target, {})(ctx, number)

  return lower
