"""Operations on windows: slots that in-neighbors write at any time."""

from typing import Any

import jax
import jax.numpy as jnp

from jfog import _log
from jfog.primitives import _ffi_attributes, _operation, _pytree
from jfog.primitives._operation import Operation
from jfog.primitives.windows import _arguments, _delay, _mesh, _native
from jfog.primitives.windows._window import Spec, Window
from jfog.runtime import Communicator, resolve
from jfog.topology import Schedule, Topology


@_operation.operation
def win_create(
  x: Any,
  topology: Topology,
  *,
  zero_init: bool = False,
  associated_p: bool = False,
  delay: Any = None,
  comm: Communicator | None = None,
) -> Window:
  """Makes a window for values like `x`. Collective.

  Exposes `x`, until the first `jfog.win_update` exposes another value, and
  fills the slot of every in-neighbor with a copy of this rank's own `x`, or with
  zeros. All versions start at 0.

  Between processes of one machine the window is MPI shared memory, and its
  writers and readers help themselves. Between machines they send messages, and a
  thread of the other rank does as they say, whatever else that rank is at.

  Args:
    x: a pytree of float, complex or integer arrays, of equal shapes and dtypes
      on all ranks.
    topology: whose edges the window has; equal on all ranks.
    zero_init: whether the slots start as zeros.
    associated_p: whether a scalar p travels with the values and undergoes the
      same arithmetic, as push-sum needs it. It is 1 at the start, also in slots
      that start as copies. Its dtype is that of the widest leaf, at least
      float32.
    delay: for research, on a mesh and in simulation only: what is put,
      accumulated or got arrives that many updates later, where those count that
      read a slot. An int for all edges,
      or an array `delay[dst, src]`, or `delay[t, dst, src]` for the t-th update,
      taken modulo its length. What a rank sends to another one arrives in order.
    comm: the communicator; by default the current one, see `jfog.init`.

  Returns:
    The window.

  Raises:
    TypeError: for a `Schedule` or another graph, for leaves of other dtypes, or a delay that is not an integer.
    ValueError: if the topology and the communicator have different sizes, for a
      negative delay or one of another shape, or a delay on MPI.
    NotInitializedError: if there is no communicator.
    jax.errors.JaxRuntimeError: on MPI, if another rank is in another operation,
      brings other shapes, dtypes or another topology (`FAILED_PRECONDITION`), or
      does not come in time (`DEADLINE_EXCEEDED`); if there is no memory
      (`RESOURCE_EXHAUSTED`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3)
    >>> def versions(x):
    ...   win = jfog.win_create(x, graph)
    ...   return jfog.win_version(jfog.win_put(win, x))
    >>> jfog.simulate(versions, 3)(jnp.zeros(3))
    Array([[0, 1, 1],
           [1, 0, 1],
           [1, 1, 0]], dtype=int32)

  Source: `win_create` of BlueFog; MPI 4.0, chapter 12.
  """
  comm = resolve(comm)
  if isinstance(topology, Schedule):
    raise TypeError(
      f"win_create: topology={topology!r} is a Schedule; a window keeps its "
      f"neighbors, so pass a jfog.topology.Topology."
    )
  _ffi_attributes.check_graph(topology, comm.size, "win_create")
  leaves, names, structure = _pytree.flatten(x, "win_create")
  for leaf, name in zip(leaves, names, strict=True):
    # An accumulate adds to slots, whatever the first operation is.
    if leaf.dtype == jnp.bool_:
      raise TypeError(
        f"win_create: the leaf {name} has dtype bool, which has no sum; cast "
        f"it to int8."
      )
  native = _pytree.to_native(leaves, names, "win_create")
  spec = Spec(
    structure=structure,
    names=tuple(names),
    shapes=tuple(leaf.shape for leaf in leaves),
    dtypes=tuple(leaf.dtype for leaf in leaves),
    topology=topology,
    comm=comm,
    zero_init=bool(zero_init),
    associated_p=bool(associated_p),
    delay=_delay.check(delay, comm),
  )
  _log.logger.info(
    "window of %d leaves, %d bytes, along %r",
    len(leaves),
    sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    topology,
  )
  if comm.backend in ("mesh", "single"):
    window = Window(spec, _mesh.create(spec, leaves))
    return _done(window)
  return _call(
    # Between processes the window lives in C++: the program carries its number,
    # which orders the operations on it by data flow as well.
    [_native.NUMBER],
    jax.tree.structure(Window(spec, 0)),
    primitive=_native.win_create_p,
    operands=native,
    params={"spec": spec},
  )


@_operation.operation
def win_put(win: Window, x: Any, *, dst_weights: Any = None) -> Window:
  """Writes `w x` into this rank's slot at each out-neighbor.

  With `w[j]` the weight for rank `j`, `slot[j] = w[j] x` there, and that slot's
  version is one more. An associated p is put like the value: the slot's is
  `w[j]` times this rank's. When it returns, the value is in the slot. The
  operation does not wait for the other rank's program.

  Averages of what was put do not keep the mean of all ranks where these update at
  different paces. Push-sum does: `win_accumulate` with an associated p and
  `win_update_then_collect`, or `jfog.optimizers.window_push_sum`.

  Args:
    win: the window.
    x: a pytree like the window's.
    dst_weights: a dict from out-neighbors to weights, which puts to those alone;
      or one number for all out-neighbors; or an array of shape `(size,)`, by
      rank, whose entries for others are not used. Weights may be traced. By
      default 1.

  Returns:
    The window.

  Raises:
    TypeError: if `win` is not a window, or for a weight that is not a real number, or
      one with fractions on an integer leaf.
    ValueError: if `x` has another structure, other shapes or dtypes than the
      window, for a weight of a rank that is not an out-neighbor, or if this very
      window was freed.
    jax.errors.JaxRuntimeError: on MPI, if a copy of it was freed here or the
      window on a rank that is put to (`FAILED_PRECONDITION`), that has ended
      (`ABORTED`, or `UNAVAILABLE` in a fault-tolerant job, see `on_missing` of
      `jfog.init`), or does not answer in time (`DEADLINE_EXCEEDED`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph, zero_init=True)
    ...   win = jfog.win_put(win, x, dst_weights=0.5)
    ...   return jfog.win_update(win, x, self_weight=0, src_weights=1)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 0., 1.], dtype=float32)

  Source: `win_put` of BlueFog; MPI 4.0, section 12.3.1.
  """
  return _send(win, x, dst_weights, "win_put", accumulate=False)


win_put_start = _operation.start_of(
  win_put,
  """>>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph)
    ...   win = jfog.wait(jfog.win_put_start(win, x))
    ...   return jfog.win_update(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 1., 3.], dtype=float32)""",
)


@_operation.operation
def win_accumulate(win: Window, x: Any, *, dst_weights: Any = None) -> Window:
  """Adds `w x` to this rank's slot at each out-neighbor.

  With `w[j]` the weight for rank `j`, `slot[j] += w[j] x` there, and that slot's
  version is one more. An associated p is accumulated like the value. All else is
  as in `jfog.win_put`.

  For push-sum let what is kept and what is sent sum to what there was, for
  example `win_accumulate(win, x, dst_weights=w)` with equal weights, followed by
  `win_update(win, x, self_weight=1 - degree * w, src_weights=1, reset=True)`.

  Args:
    win: the window.
    x: a pytree like the window's.
    dst_weights: as in `jfog.win_put`.

  Returns:
    The window.

  Raises:
    TypeError, ValueError, jax.errors.JaxRuntimeError: as in `jfog.win_put`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph, zero_init=True)
    ...   win = jfog.win_accumulate(jfog.win_accumulate(win, x), x)
    ...   return jfog.win_update_then_collect(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([8., 2., 8.], dtype=float32)

  Source: `win_accumulate` of BlueFog; MPI 4.0, section 12.3.4.
  """
  return _send(win, x, dst_weights, "win_accumulate", accumulate=True)


win_accumulate_start = _operation.start_of(
  win_accumulate,
  """>>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph, zero_init=True)
    ...   win = jfog.wait(jfog.win_accumulate_start(win, x))
    ...   return jfog.win_update_then_collect(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([4., 2., 6.], dtype=float32)""",
)


def _send(
  win: Window, x: Any, dst_weights: Any, operation: str, *, accumulate: bool
) -> Any:
  """The call of a put or an accumulate."""
  spec = _arguments.require_window(win, operation)
  leaves = _arguments.require_like(spec, x, operation)
  weights = _arguments.edge_weights(spec, dst_weights, "dst_weights", operation)
  # On a mesh the window's state is arrays of the program, sent by lax; between
  # processes it lies in C++, and the program has its number.
  if spec.comm.backend in ("mesh", "single"):
    state = _mesh.send(spec, win._state, leaves, weights, accumulate)
    return _done(Window(spec, state))
  # The neighbors that have a weight are attributes, the weights an operand: other
  # weights run the same program.
  peers, row = _arguments.own_edges(
    spec.topology.out_neighbors(spec.comm.rank), weights
  )
  return _call(
    [win._state],
    jax.tree.structure(win),
    primitive=_native.win_accumulate_p if accumulate else _native.win_put_p,
    fixed=(win._state, row),
    operands=_pytree.to_native(leaves, spec.names, operation),
    params={"peers": peers, "comm": spec.comm},
  )


@_operation.operation
def win_get(win: Window, *, src_weights: Any = None) -> Window:
  """Copies `w` times each in-neighbor's exposed value into its slot here.

  With `w[j]` the weight for rank `j`, `slot[j] = w[j] exposed[j]`, where rank `j`
  exposes the result of its last `jfog.win_update`, or the `x` of
  `jfog.win_create`. The slot's version is one more. An associated p comes with
  the value. The operation does not wait for the
  other rank's program.

  Args:
    win: the window.
    src_weights: a dict from in-neighbors to weights, which gets from those
      alone; or one number for all in-neighbors; or an array of shape `(size,)`,
      by rank, whose entries for others are not used. Weights may be traced. By
      default 1.

  Returns:
    The window.

  Raises:
    TypeError: if `win` is not a window, or for a weight that is not a real number, or
      one with fractions on an integer leaf.
    ValueError: for a weight of a rank that is not an in-neighbor.
    jax.errors.JaxRuntimeError: as in `jfog.win_put`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_get(jfog.win_create(x, graph))
    ...   return jfog.win_update(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 1., 3.], dtype=float32)

  Source: `win_get` of BlueFog; MPI 4.0, section 12.3.2.
  """
  spec = _arguments.require_window(win, "win_get")
  weights = _arguments.edge_weights(spec, src_weights, "src_weights", "win_get")
  if spec.comm.backend in ("mesh", "single"):
    state = _mesh.get(spec, win._state, weights)
    return _done(Window(spec, state))
  peers, row = _arguments.own_edges(
    spec.topology.in_neighbors(spec.comm.rank), weights
  )
  return _call(
    [win._state],
    jax.tree.structure(win),
    primitive=_native.win_get_p,
    fixed=(win._state, row),
    params={"peers": peers, "comm": spec.comm},
  )


win_get_start = _operation.start_of(
  win_get,
  """>>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.wait(jfog.win_get_start(jfog.win_create(x, graph)))
    ...   return jfog.win_update(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 1., 3.], dtype=float32)""",
)


@_operation.operation
def win_update(
  win: Window,
  x: Any,
  *,
  self_weight: Any = None,
  src_weights: Any = None,
  reset: bool = False,
  expose: bool = True,
) -> tuple[Any, Window]:
  """Combines `x` with the slots, and exposes the result.

  Computes `y = self_weight x + sum_j w[j] slot[j]` over the in-neighbors `j`,
  clears the versions of the slots it has read, and only those, and with `reset`
  sets those slots to zero. An associated p is combined like the value. Where
  both weights are the topology's and sum to 1 it is evaluated as
  `x + sum_j w[j] (slot[j] - x)`, which does not drift.

  Each slot is read and reset in one piece: a put or an accumulate comes before
  that or after it. Nothing is communicated.

  To expose `x` itself, read no slot: `win_update(win, x, self_weight=1,
  src_weights={})`.

  Args:
    win: the window.
    x: a pytree like the window's.
    self_weight: a number; by default the topology's.
    src_weights: as in `jfog.win_get`; slots of ranks that a dict leaves out are
      not read. By default the topology's row.
    reset: whether the slots that are read become zero.
    expose: whether the result is exposed, with its p; otherwise other ranks go
      on getting what was exposed before, and p stays as it was.

  Returns:
    A pytree like `x`, and the window. Floats of at most 32 bits are summed in
    float32, wider ones and complex ones in their own precision; the sum goes over
    this rank first and then the in-neighbors in ascending order.

  Raises:
    TypeError: if `win` is not a window, or for a weight that is not a real number, or
      one with fractions on an integer leaf, as those of most topologies are.
    ValueError: if `x` has another structure, other shapes or dtypes than the
      window, or for a weight of a rank that is not an in-neighbor.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`) or a rank whose slot is read has failed (`UNAVAILABLE`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(3)
    >>> def program(x):
    ...   win = jfog.win_put(jfog.win_create(x, graph), x)
    ...   return jfog.win_update(win, x)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 3.0, 6.0]))
    Array([3., 3., 3.], dtype=float32)

  Source: `win_update` of BlueFog.
  """
  return _update(
    win, x, self_weight, src_weights, "win_update", reset=reset, expose=expose
  )


@_operation.operation
def win_update_then_collect(win: Window, x: Any) -> tuple[Any, Window]:
  """Adds all slots to `x`, and sets them to zero.

  Computes `y = x + sum_j slot[j]` over the in-neighbors `j`, sets the slots to
  zero, clears their versions and exposes the result: the collect of push-sum. It
  is `jfog.win_update` with all weights 1 and `reset=True`.

  Args:
    win: the window.
    x: a pytree like the window's.

  Returns:
    A pytree like `x`, and the window.

  Raises:
    TypeError, ValueError, jax.errors.JaxRuntimeError: as in `jfog.win_update`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph, zero_init=True)
    ...   win = jfog.win_accumulate(win, x, dst_weights=0.5)
    ...   return jfog.win_update_then_collect(win, x * 0.5)[0]
    >>> jfog.simulate(program, 3)(jnp.array([0.0, 2.0, 4.0]))
    Array([2., 1., 3.], dtype=float32)

  Source: `win_update_then_collect` of BlueFog.
  """
  return _update(
    win, x, 1, 1, "win_update_then_collect", reset=True, expose=True
  )


def _update(
  win: Window,
  x: Any,
  self_weight: Any,
  src_weights: Any,
  operation: str,
  *,
  reset: bool,
  expose: bool,
) -> Any:
  """The call of an update."""
  spec = _arguments.require_window(win, operation)
  leaves = _arguments.require_like(spec, x, operation)
  defaults = self_weight is None and src_weights is None
  matrix, rank = spec.topology.mixing_matrix, spec.comm.rank
  # All ranks of a mesh trace one program: the row is selected when it runs.
  if spec.comm.backend == "mesh":  # where the rank is traced
    matrix = jnp.asarray(matrix)
  if self_weight is None:
    self_weight = matrix[rank, rank]
  if src_weights is None:
    src_weights = matrix[rank]
  own = _arguments.real_weight(spec, self_weight, "self_weight", operation)
  weights = _arguments.edge_weights(spec, src_weights, "src_weights", operation)
  if spec.comm.backend in ("mesh", "single"):
    results, state = _mesh.update(
      spec,
      win._state,
      leaves,
      own,
      weights,
      defaults=defaults,
      reset=bool(reset),
      expose=bool(expose),
    )
    return _done((spec.structure.unflatten(results), Window(spec, state)))
  peers, row = _arguments.own_edges(spec.topology.in_neighbors(rank), weights)
  # One operand for the weights: own first, then those of the peers in their
  # order.
  dtype = jnp.promote_types(own.dtype, row.dtype)
  structure = jax.tree.structure((spec.structure.unflatten(leaves), win))
  # Given weights need not sum to 1, and traced ones cannot be checked.
  difference = defaults and _ffi_attributes.difference_rows(spec.topology)[rank]
  return _call(
    [*leaves, win._state],
    structure,
    primitive=_native.win_update_p,
    fixed=(
      win._state,
      _arguments.numpy_or_jax(own, row).append(
        own.astype(dtype), row.astype(dtype)
      ),
    ),
    operands=_pytree.to_native(leaves, spec.names, operation),
    params={
      "peers": peers,
      "difference": bool(difference),
      "reset": bool(reset),
      "expose": bool(expose),
      "comm": spec.comm,
    },
  )


@_operation.operation
def win_version(win: Window) -> jax.Array:
  """Number of writes to each slot since its last read.

  Puts, accumulates and gets count one each; `jfog.win_update` clears the counts
  of the slots that it reads. Nothing is communicated.

  Args:
    win: the window.

  Returns:
    An int32 array of shape `(size,)`, by rank; 0 for ranks that are not
    in-neighbors.

  Raises:
    TypeError: if `win` is not a window.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph)
    ...   return jfog.win_version(jfog.win_get(jfog.win_put(win, x)))
    >>> jfog.simulate(program, 3)(jnp.zeros(3))
    Array([[0, 0, 2],
           [2, 0, 0],
           [0, 2, 0]], dtype=int32)

  Source: `get_win_version` of BlueFog.
  """
  spec = _arguments.require_window(win, "win_version")
  if spec.comm.backend in ("mesh", "single"):
    return _done(_mesh.versions(spec, win._state))
  # A stand-in for the aval of the result.
  result = jnp.zeros(spec.comm.size, jnp.int32)
  return _call(
    [result],
    jax.tree.structure(0),
    primitive=_native.win_version_p,
    fixed=(win._state,),
    params={"comm": spec.comm},
  )


@_operation.operation
def win_associated_p(win: Window) -> jax.Array:
  """This rank's scalar p, which undergoes the arithmetic of its value.

  It is 1 at the start, and `self_weight p + sum_j w[j] p[j]` after
  `jfog.win_update`, with `p[j]` what came with the value in slot j. Where weights
  of what is sent and kept sum to 1, `x / p` is push-sum's estimate of the
  average. Nothing is communicated.

  Args:
    win: a window that was made with `associated_p=True`.

  Returns:
    A float scalar.

  Raises:
    TypeError: if `win` is not a window.
    ValueError: if the window has no associated p.
    jax.errors.JaxRuntimeError: on MPI, if the window was freed
      (`FAILED_PRECONDITION`).

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.ring(3, "right")
    >>> def program(x):
    ...   win = jfog.win_create(x, graph, zero_init=True, associated_p=True)
    ...   win = jfog.win_accumulate(win, x)
    ...   _, win = jfog.win_update_then_collect(win, x)
    ...   return jfog.win_associated_p(win)
    >>> jfog.simulate(program, 3)(jnp.zeros(3))
    Array([2., 2., 2.], dtype=float32)

  Source: `win_associated_p` of BlueFog; Kempe, Dobra and Gehrke, "Gossip-based
  computation of aggregate information", 2003.
  """
  spec = _arguments.require_window(win, "win_associated_p")
  if not spec.associated_p:
    raise ValueError(
      "win_associated_p: this window has none; make it with "
      "win_create(..., associated_p=True)."
    )
  if spec.comm.backend in ("mesh", "single"):
    return _done(_mesh.associated_p(spec, win._state))
  return _call(
    [jnp.zeros([], spec.p_dtype)],
    jax.tree.structure(0),
    primitive=_native.win_associated_p_p,
    fixed=(win._state,),
    params={"dtype": spec.p_dtype, "comm": spec.comm},
  )


def _call(*args: Any, **kwargs: Any) -> Any:
  """A call, which `_operation.operation` makes the result that is annotated."""
  return Operation(*args, **kwargs)


def _done(results: Any) -> Any:
  """The call of what XLA computes."""
  leaves, structure = jax.tree.flatten(results)
  return _call(leaves, structure, leaves)
