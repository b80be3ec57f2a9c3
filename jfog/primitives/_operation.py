"""Calls of operations: whole, or started now and waited for later."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jfog import _compat
from jfog.primitives import _primitive, _pytree


@dataclasses.dataclass
class Call:
  """One operation on one pytree, with all its arguments checked.

  Either `results` holds the leaves of the result, which XLA computes, or
  `primitive` is to be bound.
  """

  leaves: Sequence[jax.Array]
  structure: Any
  results: Sequence[jax.Array] | None = None
  primitive: Primitive | None = None
  fixed: Sequence[Any] = ()  # a step, ranks, weights
  operands: Sequence[jax.Array] = ()  # the leaves in native dtypes
  params: dict[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_pytree_node_class
class Handle:
  """An operation that was started: a pytree, which may cross `jax.jit`.

  `jfog.wait` returns the result, once. Between processes the operation goes on in
  the background, on a copy of the leaves, from its start until it is complete; a
  handle may be carried through loops, out of a jitted function and into the
  next training step. On a mesh and in simulation the result is part of the
  handle, and XLA schedules its computation.

  It is a value of its operation and, for averages, of the largest number of
  in-neighbors in a round: what a loop carries has to keep these.

  All ranks start the same operations in the same order. Where each of them
  waits is its own affair.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> def step(x):
    ...   handle = jfog.allreduce_start(x)
    ...   y = jnp.sin(x)  # meanwhile
    ...   return jfog.wait(handle) + 0 * y
    >>> jfog.simulate(step, 2)(jnp.array([1.0, 3.0]))
    Array([2., 2.], dtype=float32)
  """

  def __init__(
    self, operation, structure, dtypes, waiting, number, weights, room
  ):
    self._operation = operation
    self._structure = structure
    self._dtypes = dtypes
    self._waiting = waiting  # the parameters of `wait_p`, hashable
    self._number = number  # None where the room holds the results
    self._weights = weights
    self._room = room
    self._spent = False

  def __repr__(self) -> str:
    state = "waited on" if self._spent else "open"
    return f"<jfog.Handle of {self._operation}, {state}>"

  def tree_flatten(self):
    """The arrays of the handle, for JAX."""
    static = self._operation, self._structure, self._dtypes, self._waiting
    return (self._number, self._weights, self._room), static

  @classmethod
  def tree_unflatten(cls, static, children):
    """A handle of those arrays, for JAX."""
    return cls(*static, *children)


def operation(prepare: Callable[..., Any]) -> Callable[..., Any]:
  """Makes the public function of an operation of what prepares its `Call`.

  The annotations are those of the public function.
  """

  @functools.wraps(prepare)
  def run(*args, **kwargs):
    call = prepare(*args, **kwargs)
    results = call.results
    if results is None:
      assert call.primitive is not None
      results = call.primitive.bind(
        *call.fixed, *call.operands, fixed=len(call.fixed), **call.params
      )
      results = _pytree.like(results, call.leaves)
    return call.structure.unflatten(results)

  return run


def start_of(run: Callable[..., Any], example: str) -> Callable[..., Handle]:
  """The form of an operation that does not wait for its result."""
  name = run.__name__
  prepare = run.__wrapped__  # type: ignore[attr-defined]

  def start(*args, **kwargs):
    call = prepare(*args, **kwargs)
    dtypes = tuple(leaf.dtype for leaf in call.leaves)
    if call.results is not None:
      results = tuple(call.results)
      return Handle(name, call.structure, dtypes, (), None, None, results)
    assert call.primitive is not None
    primitive, batch_axis = _primitive.start_of(call.primitive)
    number, weights, *room = primitive.bind(
      *call.fixed, *call.operands, fixed=len(call.fixed), **call.params
    )
    waiting = (
      ("operation", call.primitive.name),
      ("batch_axis", batch_axis),
      ("static", _primitive.finishing(call.primitive, call.params)),
    )
    return Handle(
      name, call.structure, dtypes, waiting, number, weights, tuple(room)
    )

  functools.update_wrapper(start, prepare)
  start.__name__ = start.__qualname__ = f"{name}_start"
  start.__annotations__ = {**prepare.__annotations__, "return": Handle}
  del start.__wrapped__  # type: ignore[attr-defined]
  start.__doc__ = f"""Starts `{name}`, and does not wait for it.

  Takes the arguments of `{name}`, sends the same to the same ranks and raises
  the same errors; what goes wrong later is an error of `jfog.wait`.

  The operation works on a copy of the leaves, so `x` may be changed or donated
  at once. Its deadline begins when it is waited on. A handle that is never
  waited on keeps its copy until `jfog.shutdown`. The derivative is that of
  `{name}`, computed where the operation is started.

  Returns:
    A `Handle`, for `jfog.wait` and `jfog.poll`.

  Example:
    >>> import jax.numpy as jnp, jfog
    {example}
  """
  return start


def wait(handle: Handle) -> Any:
  """Waits for an operation that was started, and returns its result.

  Sends nothing that the operation would not have sent by itself. The derivative
  passes through to the start.

  Args:
    handle: what a `..._start` function has returned; it is waited on once.

  Returns:
    What the whole operation would have returned.

  Raises:
    TypeError: if `handle` is no handle.
    ValueError: if this very handle was waited on before, or was made inside of
      a `vmap` that has ended.
    jax.errors.JaxRuntimeError: on MPI, if a copy of it was waited on before or
      its communicator was shut down (`FAILED_PRECONDITION`); and all that the
      whole operation raises.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> total = lambda x: jfog.wait(jfog.allreduce_start(x, "sum"))
    >>> jfog.simulate(total, 2)(jnp.array([1.0, 3.0]))
    Array([4., 4.], dtype=float32)

  Source: `wait` of BlueFog; MPI 4.0, section 3.7.
  """
  _require_open(handle, "wait")
  handle._spent = True
  results = handle._room
  if handle._number is not None:
    results = _primitive.wait_p.bind(
      handle._number, handle._weights, *results, **dict(handle._waiting)
    )
    if _compat.at_top_level():
      try:
        jax.block_until_ready(results)
      except jax.errors.JaxRuntimeError:
        _compat.begin_order_anew()  # the others have nothing to do with it
        raise
    results = [
      y.astype(dtype) for y, dtype in zip(results, handle._dtypes, strict=True)
    ]
  return handle._structure.unflatten(results)


def poll(handle: Handle) -> jax.Array:
  """Says whether `jfog.wait` would return at once.

  Args:
    handle: what a `..._start` function has returned, not waited on yet.

  Returns:
    A bool scalar. True also for an operation that has failed, whose error
    `jfog.wait` raises. Always True on a mesh.

  Raises:
    TypeError, ValueError, jax.errors.JaxRuntimeError: as in `jfog.wait`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> world = jfog.init()
    >>> jfog.poll(jfog.allreduce_start(jnp.ones(2)))
    Array(True, dtype=bool)

  Source: `poll` of BlueFog; MPI 4.0, section 3.7.
  """
  _require_open(handle, "poll")
  if handle._number is None:
    return jnp.asarray(True)
  operation = dict(handle._waiting)["operation"]
  return _primitive.poll_p.bind(handle._number, operation=operation)[0]


def _require_open(handle: Any, name: str) -> None:
  if not isinstance(handle, Handle):
    raise TypeError(
      f"{name}: {handle!r} is {type(handle).__name__}, not a handle; pass what "
      f"a function such as jfog.neighbor_allreduce_start has returned."
    )
  if handle._spent:
    raise ValueError(
      f"{name}: this handle of {handle._operation} was waited on before; keep "
      f"the result of the first jfog.wait."
    )
