"""Private JAX in one place: the ordered effect and other non-public names."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core, dispatch, effects, xla_bridge
from jax.interpreters import mlir


class CommunicationEffect(effects.Effect):
  """Ordered effect: all communication of a program in one chain, in its order.

  XLA:CPU runs independent custom calls concurrently and in an order that
  differs from run to run. An ordered effect threads a token through all calls,
  so every rank posts in the order in which its program was written.
  """

  __str__ = __repr__ = lambda self: "jfog.communication"


_OWN_EFFECT = CommunicationEffect()


@functools.cache
def communication_effect() -> effects.Effect:
  """The one effect that all communication primitives of this process share.

  It is mpi4jax's where mpi4jax can be imported, so that its operations and
  jfog's form one chain. Importing mpi4jax starts MPI, so the first call comes
  from the first trace of an operation between processes; the result is cached.
  """
  effect = _effect_of_mpi4jax() or _OWN_EFFECT
  for allowed in (
    effects.ordered_effects,
    effects.lowerable_effects,
    effects.control_flow_allowed_effects,
    effects.custom_derivatives_allowed_effects,
    effects.remat_allowed_effects,
  ):
    allowed.add_type(type(effect))
  return effect


def _effect_of_mpi4jax() -> effects.Effect | None:
  """The ordered effect of mpi4jax; None if mpi4jax is missing or broken."""
  try:
    with warnings.catch_warnings():
      # Its warning about an untested version of JAX concerns its own users.
      warnings.simplefilter("ignore")
      import mpi4jax  # type: ignore[import-not-found]
  except Exception:  # an import that fails here fails in the whole process
    return None
  try:
    from mpi4jax._src.utils import (  # type: ignore[import-not-found]
      ordered_effect,
    )
  except ImportError:
    warnings.warn(
      f"the ordered effect of mpi4jax {mpi4jax.__version__} is not at its "
      f"expected place, so operations of both in one jitted function may deadlock; keep them "
      f"in separate functions, or install mpi4jax 0.9.",
      RuntimeWarning,
      stacklevel=2,
    )
    return None
  return ordered_effect


def ordered_ffi_lowering(
  target: str,
  aliases: dict[int, int],
  avals_in: Sequence[Any] | None = None,
  avals_out: Sequence[Any] | None = None,
):
  """A lowering rule to the FFI handler `target` with a token in and out.

  The handler's operands are the token of the ordered effect followed by the
  primitive's; its results are the new token followed by the primitive's.

  Args:
    target: the name under which the handler is registered.
    aliases: from the index of an operand of the primitive to that of the
      result that may share its buffer.
    avals_in: the handler's operands; by default those of the primitive.
    avals_out: its results, likewise.
  """

  def rule(ctx: Any, *operands: Any, **attributes: Any) -> Any:
    effect = communication_effect()
    with_token = ctx.replace(
      avals_in=[core.abstract_token, *(avals_in or ctx.avals_in)],
      avals_out=[core.abstract_token, *(avals_out or ctx.avals_out)],
    )
    lower = jax.ffi.build_ffi_lowering_function(
      target,
      has_side_effect=True,
      operand_output_aliases={i + 1: o + 1 for i, o in aliases.items()},
    )
    call = lower(with_token, ctx.tokens_in.get(effect), *operands, **attributes)
    token, *results = call.results
    ctx.set_tokens_out(mlir.TokenSet({effect: token}))
    return results

  return rule


def axis_is_bound(name: Any) -> bool:
  """Whether the named axis `name` is bound where this is traced.

  `jax.jit` keeps the set of bound axes in its cache key, so a cached program
  never comes from a trace with other axes.
  """
  return core.get_axis_env().axis_exists(name)


def at_top_level() -> bool:
  """Whether operations run eagerly here: no transformation is tracing."""
  return core.trace_state_clean()


def backends_are_started() -> bool:
  """Whether JAX has started its backends; their options are fixed from then on."""
  return xla_bridge.backends_are_initialized()


def visible_cuda_devices() -> str:
  """The option `jax_cuda_visible_devices`: `"all"`, or numbers and commas."""
  return xla_bridge.CUDA_VISIBLE_DEVICES.value


def reset_runtime_tokens() -> None:
  """Drops this thread's runtime tokens, so that an earlier error is not inherited.

  The token is one of the results of an operation. After a failure all later
  operations would depend on it and fail with the same error.
  """
  dispatch.runtime_tokens.clear()


def varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Marks `x` as different along `axes`, where a `shard_map` checks that."""
  tracked = _varying_axes(jax.lax.axis_index(axes))
  missing = tuple(a for a in axes if a in tracked and a not in _varying_axes(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
  """Zeros of this shape and dtype, different along the same axes of a mesh."""
  zeros = jnp.zeros(like.shape, like.dtype)
  tracked = like.manual_axis_type  # None outside of a shard_map
  axes = tuple(sorted(tracked.varying)) if tracked else ()
  return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _varying_axes(x: jax.Array) -> frozenset[str]:
  return frozenset(jax.typeof(x).manual_axis_type.varying)
