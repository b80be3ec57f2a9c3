"""Operations, blocking or split into a start and a wait, and their handles."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jfog import _compat
from jfog.primitives import _mesh, _places, _primitive, _pytree
from jfog.primitives._eager import Pack, with_eager_form
from jfog.runtime import (
  Communicator,
  refuse_in_fork,
  refuse_with_attackers,
  refuse_with_missing,
)

# Operations that go on without ranks that are missing.
GO_ON = ("neighbor_allreduce", "peer_allreduce")
# Operations in which it is defined what an attacker sends.
ATTACKED = ("neighbor_allreduce", "neighbor_allgather")


@dataclasses.dataclass
class Operation:
  """One operation on one pytree, with all of its arguments checked.

  It is a pair of renditions. `operation` and `start_of` choose between them by
  the communicator: the primitive where ranks are processes, else `mesh`, plain
  `jax.lax` that XLA compiles. An operation that has computed its `results`
  already communicates nothing.

  Attributes:
    leaves: the leaves of the argument.
    structure: the structure of the result.
    results: the leaves of the result.
    comm: the communicator.
    mesh: from leaves to the leaves of the result.
    primitive: the native rendition.
    fixed: its scalar operands: a step, ranks, weights.
    operands: the leaves in dtypes of the native core, or a function to them,
      called for the native rendition only.
    params: the parameters of the primitive.
  """

  leaves: Sequence[jax.Array]
  structure: Any
  results: Sequence[jax.Array] | None = None
  comm: Communicator | None = None
  mesh: Callable[[list[jax.Array]], Sequence[jax.Array]] | None = None
  primitive: Primitive | None = None
  fixed: Sequence[Any] = ()
  operands: Sequence[jax.Array] | Callable[[], Sequence[jax.Array]] = ()
  params: dict[str, Any] = dataclasses.field(default_factory=dict)

  def on_mesh(self) -> Sequence[jax.Array] | None:
    """The results, unless the native rendition is to compute them."""
    if self.results is not None:
      return self.results
    if self.leaves and (self.comm is None or self.comm.is_native):
      assert self.primitive is not None
      refuse_in_fork(self.primitive.name)
      return None
    if not self.leaves:
      return []
    name = self.primitive.name if self.primitive is not None else ""
    if name and name not in GO_ON:
      refuse_with_missing(name)
    if name and name not in ATTACKED:
      refuse_with_attackers(name)
    assert self.mesh is not None
    return _mesh.on_nonempty(self.mesh, self.leaves)

  def bind(self, primitive: Primitive) -> Any:
    """Binds a primitive of the native rendition."""
    operands = self.operands() if callable(self.operands) else self.operands
    name = primitive.name.removesuffix("_start")
    _places.record(name, operands, self.structure)
    scalars = [np.int32(x) if type(x) is int else x for x in self.fixed]
    return primitive.bind(
      *scalars, *operands, fixed=len(scalars), **self.params
    )


@jax.tree_util.register_pytree_node_class
class Handle:
  """An operation that was started: a pytree, which may cross `jax.jit`.

  `jfog.wait` returns the result, once. Between processes the operation progresses
  in the background, on a copy of the leaves, until it is complete; a handle may be carried through loops, out of a jitted function and into the
  next training step. On a mesh and in simulation the result is part of the
  handle, and XLA schedules its computation.

  Its type includes its operation and, for averages, the largest number of
  in-neighbors in a round: the carry of a loop has to keep these.

  All ranks start the same operations in the same order. They may wait in any
  order and place.

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
    self,
    operation: str,
    structure: Any,
    dtypes: tuple[Any, ...],
    wait_params: tuple[tuple[str, Any], ...],
    number: jax.Array | None,
    weights: Sequence[jax.Array],
    placeholders: Sequence[jax.Array],
  ):
    self._operation = operation
    self._structure = structure
    self._dtypes = dtypes
    self._wait_params = wait_params  # of `wait_p`, hashable
    self._number = number  # None where the placeholders are the results
    self._weights = weights  # for what the operation receives
    self._placeholders = placeholders
    # Flattening a handle loses this flag: it catches the plain mistake only, and
    # the native core refuses the second wait on a copy.
    self._spent = False

  def __repr__(self) -> str:
    state = "waited on" if self._spent else "open"
    return f"<jfog.Handle of {self._operation}, {state}>"

  def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays of the handle, for JAX."""
    static = self._operation, self._structure, self._dtypes, self._wait_params
    return (self._number, self._weights, self._placeholders), static

  @classmethod
  def tree_unflatten(
    cls, static: tuple[Any, ...], children: tuple[Any, ...]
  ) -> "Handle":
    """A handle of those arrays, for JAX."""
    return cls(*static, *children)


def operation(
  prepare: Callable[..., Any],
  pack: Pack | None = None,
) -> Callable[..., Any]:
  """Turns a function that returns an `Operation` into the public, blocking one.

  Args:
    prepare: annotated with the types of the public one.
    pack: from the type of an argument to the function that turns it into arrays,
      for a communicator; `prepare` takes these in its place, and an eager call
      with other arrays is not compiled again.
  """

  scope = f"jfog.{prepare.__name__}"  # in profiles

  def run(*args: Any, **kwargs: Any) -> Any:
    prepared = prepare(*args, **kwargs)
    with jax.named_scope(scope):
      results = prepared.on_mesh()
      if results is None:
        assert prepared.primitive is not None
        results = prepared.bind(prepared.primitive)
        results = _pytree.cast_like(results, prepared.leaves)
    return prepared.structure.unflatten(results)

  return with_eager_form(prepare, run, pack or {})


def start_of(run: Callable[..., Any], example: str) -> Callable[..., Handle]:
  """The split form of an operation, which returns a handle at once."""
  name = run.__name__
  prepare = run.__wrapped__  # type: ignore[attr-defined]

  def begin(*args: Any, **kwargs: Any) -> Handle:
    prepared = prepare(*args, **kwargs)
    dtypes = tuple(leaf.dtype for leaf in prepared.leaves)
    with jax.named_scope(f"jfog.{name}_start"):
      results = prepared.on_mesh()
    if results is not None:
      structure = prepared.structure
      return Handle(name, structure, dtypes, (), None, (), tuple(results))
    primitive = prepared.primitive
    assert primitive is not None
    with jax.named_scope(f"jfog.{name}_start"):
      number, *arrays = prepared.bind(_primitive.start_of(primitive))
    wait_params = _primitive.wait_params(
      primitive, prepared.fixed, prepared.params
    )
    count = dict(wait_params)["num_weights"]
    return Handle(
      name,
      prepared.structure,
      dtypes,
      wait_params,
      number,
      tuple(arrays[:count]),
      tuple(arrays[count:]),
    )

  start = with_eager_form(prepare, begin, run.pack)  # type: ignore[attr-defined]
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
    handle: the result of a `..._start` function; it is waited on once.

  Returns:
    The result of the blocking operation.

  Raises:
    TypeError: if `handle` is not a handle.
    ValueError: if this very handle was waited on before, or was made inside of
      a `vmap` that has ended.
    jax.errors.JaxRuntimeError: on MPI, if a copy of it was waited on before or
      its communicator was shut down (`FAILED_PRECONDITION`); and all errors of
      the blocking operation.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> total = lambda x: jfog.wait(jfog.allreduce_start(x, "sum"))
    >>> jfog.simulate(total, 2)(jnp.array([1.0, 3.0]))
    Array([4., 4.], dtype=float32)

  Source: `wait` of BlueFog; MPI 4.0, section 3.7.
  """
  _require_open(handle, "wait")
  handle._spent = True
  if handle._number is None:
    return handle._structure.unflatten(handle._placeholders)
  if not _compat.at_top_level():
    return _results(handle)
  try:
    # An error of the start is raised here, with its own code.
    jax.block_until_ready(handle._number)
    return jax.block_until_ready(_eager_results(handle))
  except jax.errors.JaxRuntimeError:
    _compat.reset_runtime_tokens()  # later operations do not depend on it
    raise


def _results(handle: Handle) -> Any:
  """The result of an operation between processes."""
  with jax.named_scope("jfog.wait"):
    results = _primitive.wait_p.bind(
      handle._number,
      *handle._weights,
      *handle._placeholders,
      **dict(handle._wait_params),
    )
  return handle._structure.unflatten(
    [y.astype(dtype) for y, dtype in zip(results, handle._dtypes, strict=True)]
  )


_eager_results = jax.jit(_results)


def poll(handle: Handle) -> jax.Array:
  """Whether `jfog.wait` would return at once.

  Args:
    handle: the result of a `..._start` function, not waited on yet.

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
  operation = dict(handle._wait_params)["operation"]
  return _primitive.poll_p.bind(handle._number, operation=operation)[0]


def _require_open(handle: Any, name: str) -> None:
  if not isinstance(handle, Handle):
    raise TypeError(
      f"{name}: {handle!r} is {type(handle).__name__}, not a handle; pass the "
      f"result of a function such as jfog.neighbor_allreduce_start."
    )
  if handle._spent:
    raise ValueError(
      f"{name}: this handle of {handle._operation} was waited on before; keep "
      f"the result of the first jfog.wait."
    )
