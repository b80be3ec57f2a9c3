"""Private JAX in one place: the ordered effect and other non-public names."""

import atexit
import ctypes
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import api, core, dispatch, effects, xla_bridge
from jax._src.interpreters import mlir as jax_mlir
from jax._src.interpreters import pxla
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as hlo


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
  _install_program_order()
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


def _nothing_to_register() -> None:
  """No module with handlers is loaded."""


_register_handlers: Callable[[], None] = _nothing_to_register


def register_before_lowering(register: Callable[[], None]) -> None:
  """Calls `register` before each lowering to a handler.

  Then JAX's backends have started. Before that, JAX defers registrations and
  later replays handlers before the types that they use, which fails.
  """
  global _register_handlers
  _register_handlers = register


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
    _register_handlers()
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


# The order between programs. JAX passes the token of an ordered effect from one
# program to the next in Python: it waits for the earlier program, and compiled
# programs leave the C++ path of `jax.jit`. Here the effect ends at the border of
# a program instead. The program makes its token at its start, and XLA keeps the
# order between programs: a device starts the programs of one thread in the order
# in which they were dispatched (in xla/pjrt/cpu/cpu_client.cc each execution
# depends on `last_enqueue_event`, that of the last one which was enqueued; a GPU has
# one compute stream).

_ORDERS = ("device", "strict")
_program_p = Primitive("jfog_program")
_program_p.multiple_results = True
# Set by the first program: whether the effect ends at the border of programs.
_ends_at_border: bool | None = None


# Whether this process is a fork of one that runs programs.
_is_fork = False

# The text of the failure of a communicator that is open, "" if there is none.
_failure: Callable[[], str] | None = None


def report_failures(failure: Callable[[], str] | None) -> None:
  """Lets `jax.effects_barrier` raise what `failure` returns, unless it is ""."""
  global _failure
  _failure = failure


# Called with each program that communicates, a closed jaxpr, before it is lowered.
_program: Callable[[Any], None] | None = None
_sees_programs = False  # whether JAX has the function that is wrapped for it


def report_programs(program: Callable[[Any], None] | None) -> None:
  """Calls `program` with each program that communicates, before it is lowered.

  Raises:
    RuntimeError: with a JAX that does not show the programs which it lowers.
  """
  global _program
  _install_program_order()
  if program is not None and not _sees_programs:
    raise RuntimeError(
      f"check_programs: jax {jax.__version__} does not show the programs that it "
      f"lowers; leave the option out, or install a JAX that jfog is tested with."
    )
  _program = program


def requested_order() -> str:
  """The value of `JFOG_ORDER`, checked; "" if it is not set."""
  order = os.environ.get("JFOG_ORDER", "")
  if order and order not in _ORDERS:
    raise ValueError(
      f"JFOG_ORDER={order!r} is not an order of programs; set it to one of "
      f"{', '.join(_ORDERS)}, or unset it."
    )
  return order


def order_between_programs() -> str:
  """`"device"` or `"strict"`: the order between programs that communicate.

  `JFOG_ORDER` chooses. By default it is "device" where JAX runs on CPUs, and
  "strict" on GPUs.

  Raises:
    ValueError: if `JFOG_ORDER` is something else.
  """
  order = requested_order()
  if _ends_at_border is False:
    return "strict"
  return order or ("device" if jax.default_backend() == "cpu" else "strict")


@functools.cache
def _install_program_order() -> None:
  """Lets programs that communicate end their effect, from the next one on.

  JAX calls `_discharge_refs_jaxpr` once for each program that it lowers, and
  `RuntimeTokenSet.block_until_ready` in `jax.effects_barrier` and when Python
  exits: both still wait for communication, and raise its failure.
  """
  discharge = getattr(pxla, "_discharge_refs_jaxpr", None)
  wait = getattr(dispatch.RuntimeTokenSet, "block_until_ready", None)
  if discharge is None or wait is None:
    _keep_ordered_effect(
      "a name is missing: pxla._discharge_refs_jaxpr, or "
      "dispatch.RuntimeTokenSet.block_until_ready"
    )
    return

  @functools.wraps(discharge)
  def discharge_and_end(*args: Any, **kwargs: Any) -> Any:
    results = discharge(*args, **kwargs)
    if _ends_at_border is False and _program is None:
      return results
    try:
      program, *others = results[0], *results[1:]
      communicates = communication_effect() in program.effects
    except Exception as error:  # whatever another JAX returns
      _keep_ordered_effect(f"{type(error).__name__}: {error}")
      return results
    if not communicates:
      return results
    if _program is not None:
      _program(program)
    if _ends_at_border is False:
      return results
    if _HAS_INLINE:
      program = _without_nullary_calls(program, {})
    return (_ended(program) if _effect_ends() else program, *others)

  @functools.wraps(wait)
  def wait_for_effects(tokens: Any) -> None:
    if _is_fork:
      return
    wait(tokens)
    if not _ends_at_border:
      return
    _wait_for_programs()
    # A failed token would be raised here. Without tokens the communicators know.
    if _failure is not None and (text := _failure()):
      raise jax.errors.JaxRuntimeError(text)

  global _sees_programs
  _sees_programs = True
  pxla._discharge_refs_jaxpr = discharge_and_end
  tokens: Any = dispatch.RuntimeTokenSet
  tokens.block_until_ready = wait_for_effects


def _effect_ends() -> bool:
  """Whether the effect of the program that is being lowered ends at its border."""
  global _ends_at_border
  if order_between_programs() == "strict":
    return False
  if _ends_at_border is None:
    _ends_at_border = True  # the test itself lowers a program
    try:
      _test_program_order()
    except Exception as error:  # whatever another JAX does
      _keep_ordered_effect(f"{type(error).__name__}: {error}")
  return _ends_at_border


def _keep_ordered_effect(reason: str) -> None:
  global _ends_at_border
  _ends_at_border = False
  warnings.warn(
    f"jfog keeps JAX's order between programs (JFOG_ORDER=strict), with which a "
    f"call costs more: jax {jax.__version__} is not as expected ({reason}).",
    RuntimeWarning,
    stacklevel=2,
  )


def _test_program_order() -> None:
  """Lowers a program with the effect; raises if it has tokens at its border."""
  probe = Primitive("jfog_probe")

  @probe.def_effectful_abstract_eval
  def abstract_eval(x: Any) -> Any:
    return x, {communication_effect()}

  def lower(ctx: Any, x: Any) -> Any:
    return ordered_ffi_lowering("jfog_probe", {})(ctx, x)

  mlir.register_lowering(probe, lower)
  lowered = jax.jit(lambda x: probe.bind(probe.bind(x))).lower(
    jax.ShapeDtypeStruct((), np.float32)
  )
  tokens = lowered._lowering.compile_args["ordered_effects"]
  if tokens or lowered.as_text().count("jfog_probe") < 2:
    raise RuntimeError("a program's token does not end at its border")


# The pass nullary-function-wrap-inliner of JAX 0.12's XLA inlines the calls of
# functions that have no argument but a token, and makes their constants depend on
# it. A later pass merges equal constants and fails a check where one of them has
# such a dependency, which ends the process. So JAX inlines these calls, early.
# JAX 0.11.0 and earlier cannot, and have another XLA.
_HAS_INLINE = (
  "inline_jax_late" in inspect.signature(mlir.core_call_lowering).parameters
)


def _without_nullary_calls(jaxpr: Any, seen: dict[int, Any]) -> Any:
  """A jaxpr in which JAX inlines the jitted functions without arguments."""
  if id(jaxpr) not in seen:
    equations = [_with_inlined_call(eqn, seen) for eqn in jaxpr.eqns]
    is_same = all(a is b for a, b in zip(equations, jaxpr.eqns, strict=True))
    result = jaxpr if is_same else jaxpr.replace(eqns=equations)
    seen[id(jaxpr)] = result
  return seen[id(jaxpr)]


def _with_inlined_call(eqn: Any, seen: dict[int, Any]) -> Any:
  """An equation of `_without_nullary_calls`; itself if nothing is inlined."""
  inside = lambda value: (  # noqa: E731
    _without_nullary_calls(value, seen)
    if isinstance(value, core.Jaxpr)
    else value
  )
  changed = {}
  for name, value in eqn.params.items():
    new = inside(value)
    if isinstance(value, tuple):
      new = tuple(map(inside, value))
      new = new if any(a is not b for a, b in zip(new, value)) else value  # noqa: B905
    if new is not value:
      changed[name] = new
  is_nullary = eqn.primitive.name == "jit" and not eqn.invars
  if is_nullary and communication_effect() in eqn.effects:
    changed["inline"] = api.Inline.JAX_LATE  # pyright: ignore
  return eqn.replace(params={**eqn.params, **changed}) if changed else eqn


def _ended(program: Any) -> Any:
  """The program, a closed jaxpr, as one that makes the token of its own.

  The result refers to the program, so a cache of it would keep the program and
  its constants alive. JAX caches the lowering by the program itself.
  """

  def run(*operands: Any) -> Any:
    return _program_p.bind(*operands, program=program)

  debug_info = program.jaxpr.debug_info
  ended = jax.make_jaxpr(run)(*program.in_avals)
  return ended.replace(jaxpr=ended.jaxpr.replace(debug_info=debug_info))


@_program_p.def_effectful_abstract_eval
def _program_abstract_eval(*operands: Any, program: Any) -> Any:
  del operands
  return program.out_avals, program.effects - {communication_effect()}


def _lower_program(ctx: Any, *operands: Any, program: Any) -> Any:
  effect = communication_effect()
  devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
  if devices > 1:
    raise ValueError(
      f"a program over {devices} devices has an operation between processes, "
      f"which runs on one: use jfog.Axis for the devices of one process."
    )
  token = _begin_program(ctx)
  tokens = {**dict(ctx.tokens_in.items()), effect: token}
  inside = ctx.replace(tokens_in=mlir.TokenSet(tokens), tokens_out=None)
  inline: Any = {"inline_jax_late": True} if _HAS_INLINE else {}
  results = mlir.core_call_lowering(
    inside, *operands, name="jfog_program", call_jaxpr=program, **inline
  )
  others = [item for item in inside.tokens_out.items() if item[0] != effect]
  ctx.set_tokens_out(mlir.TokenSet(dict(others)))
  return results


mlir.register_lowering(_program_p, _lower_program, cacheable=False)


def _begin_program(ctx: Any) -> Any:
  """The token of a program, which XLA:CPU takes for one that is not cheap.

  XLA:CPU runs a program of less than 1000 operations on the thread that
  dispatches it, where it would wait for its peers, and where jaxlib turns its
  errors into ValueError. XLA counts the larger branch of a conditional, so the
  branch that is never taken makes the program one that runs on another thread.
  """
  _register_handlers()
  effect = communication_effect()
  start = mlir.TokenSet.create([effect]).get(effect)
  if ctx.module_context.platforms != ("cpu",):
    return start
  pred = core.ShapedArray((), np.bool_)
  matrix = core.ShapedArray((16, 16), np.float32)
  token = core.abstract_token

  def call(target: str, avals_in: Any, avals_out: Any, *operands: Any) -> Any:
    lower = jax.ffi.build_ffi_lowering_function(target, has_side_effect=True)
    context = ctx.replace(avals_in=avals_in, avals_out=avals_out)
    return lower(context, *operands).results

  begun, never, x = call(
    "jfog_mpi_program_begin", [token], [token, pred, matrix], start
  )
  choice = hlo.IfOp([x.type], never)
  for region, costly in (
    (choice.true_branch, True),
    (choice.false_branch, False),
  ):
    with ir.InsertionPoint(region.blocks.append()):
      hlo.return_([_product(x) if costly else x])
  (ready,) = call(
    "jfog_mpi_program_ready", [token, matrix], [token], begun, choice.results[0]
  )
  return ready


def _product(x: Any) -> Any:
  """The matrix product of x and x."""
  dimensions = hlo.DotDimensionNumbers.get([], [], [1], [0])
  return hlo.dot_general(x.type, x, x, dimensions)


def _wait_for_programs() -> None:
  """Waits for the programs that this thread has dispatched.

  A device runs the programs of a thread in order, so it is enough to wait for
  one more on each device. Errors of the programs are not raised here.
  """
  # At exit JAX waits for effects once it has cleared its backends, and asking for
  # devices would start them again.
  if not xla_bridge.backends_are_initialized():
    return
  for device in jax.local_devices():
    with jax.default_device(device):
      jax.block_until_ready(_nothing())


@jax.jit
def _nothing() -> jax.Array:
  return jnp.zeros((), np.bool_)


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


def forget_backends() -> None:
  """In a fork: leaves alone what needs the threads of its parent.

  The end of a backend of XLA, or of MLIR's thread pool, joins their threads,
  which a fork does not have. A reference that stays keeps them from their end.
  """
  global _is_fork
  _is_fork = True
  atexit.unregister(api.clean_up)
  kept = [getattr(jax_mlir, "global_thread_pool", None)]
  if xla_bridge.backends_are_initialized():
    kept += xla_bridge.backends().values()
  for each in kept:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


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
