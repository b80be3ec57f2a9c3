"""Lowering of an operation on GPUs: XLA arithmetic around one NCCL call."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jfog import _compat


class Mode(enum.IntEnum):
  """Form of an operation; numbered as in xla_ops."""

  WHOLE = 0
  START = 1


class Reduction(enum.IntEnum):
  """Numbered as `ncclRedOp_t`."""

  SUM = 0
  PROD = 1
  MAX = 2
  MIN = 3


class Send(NamedTuple):
  """Target, attributes and operands of one call into `jfog._nccl`."""

  target: str  # without the prefix jfog_nccl_
  attributes: dict[str, Any]
  operands: Sequence[Any]


class Rendition:
  """Rendition of an operation on GPUs: encode in XLA, one NCCL call, decode.

  A split operation encodes in one program and decodes in another. Its handle
  carries the further inputs of `decode`: the arrays of `weights` and the value
  of `static`.

  Attributes:
    in_place: whether received buffers may alias the sent ones.
  """

  in_place = False

  def encode(
    self, mode: Mode, scalars: Sequence[Any], leaves: Any, **params: Any
  ) -> Send:
    """The call that sends the leaves."""
    raise NotImplementedError

  def received(self, results: Sequence[Any], static: Any) -> Sequence[Any]:
    """Avals of the buffers that NCCL fills, from those of the results."""
    del static
    return results

  def decode(
    self, own: Any, weights: Any, received: Any, static: Any
  ) -> Sequence[Any]:
    """The results, from the received buffers.

    `own` holds this rank's leaves. In a split operation whose results differ in
    shape it holds zeros shaped like the results.
    """
    del own, weights, static
    return received

  def weights(self, scalars: Sequence[Any], **params: Any) -> Any:
    """A pytree of arrays for `decode`."""
    del scalars, params
    return ()

  def static(self, **params: Any) -> Any:
    """A hashable value for `received` and `decode`, part of a handle's type."""
    del params
    return ()

  def blocking(
    self,
    call: Callable[..., list[Any]],
    results: Sequence[Any],
    scalars: Sequence[Any],
    leaves: Sequence[Any],
    **params: Any,
  ) -> Sequence[Any]:
    """The blocking form; an operation of several calls has its own.

    Args:
      call: `(Send, avals of the received buffers)` to these buffers.
      results: the avals of the results.
      scalars: the scalar operands.
      leaves: the leaves.
      **params: the parameters of the primitive.
    """
    static = self.static(**params)
    send = self.encode(Mode.WHOLE, scalars, leaves, **params)
    received = call(send, self.received(results, static), self.in_place)
    weights = self.weights(scalars, **params)
    return self.decode(leaves, weights, received, static)


# One call of a handler. Only the lowerings below bind this primitive, so it needs
# no rules for differentiation or batching. It carries the ordered effect: the
# token makes XLA issue the calls of a program in the same order on all ranks.

call_p = Primitive("nccl")
call_p.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Attributes:
  """Attributes of a call, as a parameter of a primitive."""

  values: dict[str, Any]


@call_p.def_effectful_abstract_eval
def _call_abstract_eval(
  *operands: Any, received: Sequence[jax.ShapeDtypeStruct], **params: Any
) -> tuple[list[jax.core.ShapedArray], set[Any]]:
  del operands, params
  results = [jax.core.ShapedArray(x.shape, x.dtype) for x in received]
  return results, {_compat.communication_effect()}


def _lower_call(
  ctx: mlir.LoweringRuleContext,
  *operands: Any,
  target: str,
  attributes: _Attributes,
  received: Sequence[jax.ShapeDtypeStruct],
  aliases: Sequence[tuple[int, int]],
) -> Sequence[Any]:
  del received
  rule = _compat.ordered_ffi_lowering(f"jfog_nccl_{target}", dict(aliases))
  return rule(ctx, *operands, **attributes.values)


mlir.register_lowering(call_p, _lower_call)


def call(
  send: Send, received: Sequence[Any], aliases: dict[int, int] | None = None
) -> list[Any]:
  """Adds the call of a handler to the program; returns the received buffers."""
  return call_p.bind(
    *send.operands,
    target=send.target,
    attributes=_Attributes(send.attributes),
    received=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in received),
    aliases=tuple((aliases or {}).items()),
  )


def _blocking_call(
  send: Send, received: Sequence[Any], in_place: bool = False
) -> list[Any]:
  """One blocking call, whose buffers alias where `in_place` and shapes allow."""
  # The leaves are the last operands; a selector may precede them.
  shift = len(send.operands) - len(received)
  aliases = {
    i + shift: i
    for i, y in enumerate(received)
    if in_place and jnp.shape(send.operands[i + shift]) == y.shape
  }
  return call(send, received, aliases)


def blocking(
  rendition: Rendition,
  results: Sequence[Any],
  scalars: Sequence[Any],
  leaves: Sequence[Any],
  params: dict[str, Any],
) -> Sequence[Any]:
  """Results of a blocking operation; `results` are their avals."""
  return rendition.blocking(_blocking_call, results, scalars, leaves, **params)


def start(
  rendition: Rendition,
  results: Sequence[Any],
  scalars: Sequence[Any],
  leaves: Sequence[Any],
  params: dict[str, Any],
) -> Sequence[Any]:
  """Number, weights and placeholders of a started operation."""
  static = rendition.static(**params)
  send = rendition.encode(Mode.START, scalars, leaves, **params)
  sizes = [
    x.size * x.dtype.itemsize for x in rendition.received(results, static)
  ]
  # FFI attributes may not be empty: one more element, which is never read.
  send.attributes["received_bytes"] = np.array([*sizes, -1], np.int64)
  # The started call returns at once; the buffers that NCCL fills belong to the
  # native side until `wait` copies them out.
  (number,) = call(send, [jax.ShapeDtypeStruct((2,), jnp.uint32)])
  weights = jax.tree.leaves(rendition.weights(scalars, **params))
  if all(
    x.shape == y.shape and x.dtype == y.dtype
    for x, y in zip(leaves, results, strict=True)
  ):
    # No new arrays: `wait` reads their shapes, and for a sum the own values.
    placeholders = leaves
  else:
    placeholders = [jnp.zeros(y.shape, y.dtype) for y in results]
  return [number, *map(jnp.asarray, weights), *placeholders]


def wait(
  rendition: Rendition,
  number: Any,
  weights: Any,
  placeholders: Sequence[Any],
  static: Any,
) -> Sequence[Any]:
  """Results of a started operation."""
  avals = rendition.received(placeholders, static)
  received = call(Send("wait", {}, [number]), avals)
  return rendition.decode(placeholders, weights, received, static)
