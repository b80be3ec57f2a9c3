"""One script in four places: programs of one rank, and data with an axis over ranks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jfog import _validation
from jfog.runtime import _simulate, _world
from jfog.runtime._communicator import AXIS_NAME
from jfog.runtime._process_communicator import ProcessCommunicator


def map_ranks(
  fun: Callable[..., Any],
  size: int | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  local_size: int = 1,
  mesh: Mesh | None = None,
) -> Callable[..., Any]:
  """Runs `fun` on the ranks of this process, wherever the script was started.

  - Under `jfog run` or `mpirun`, each process runs `fun` for its own rank.
  - In one process with several devices it is `jfog.spmd` over these, if `size` is
    their number or left out, or over those of `mesh`.
  - In one process otherwise it is `jfog.simulate` on `size` virtual ranks.

  Arguments and results have an axis over the ranks that this process runs, of
  length 1 between processes. There an argument may also hold the values of all
  ranks, of which the process takes its own. A result may be an argument of the
  next call in all places. Calls `jfog.init()` if the script has not.

  Args:
    fun: the program of one rank.
    size: the number of ranks in one process; by default that of its devices.
      Between processes their number counts; `jfog.num_ranks(size)` is the one in
      use.
    in_axes: as in `jfog.simulate`.
    out_axes: as in `jfog.simulate`.
    local_size: ranks of a pretended machine, in simulation only.
    mesh: the mesh of `jfog.spmd`, with an axis `"jfog"` of `size` ranks; further
      axes stay with the compiler. Between processes it is not used.

  Returns:
    A function of the arguments of `fun`, with an axis over ranks, to its results
    with one.

  Raises:
    ValueError: for an argument whose axis has another length, for a `mesh` of
      another number of ranks, and as `jfog.simulate` does.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> mean = jfog.map_ranks(jfog.allreduce, 4)
    >>> mean(jnp.array([0.0, 1.0, 2.0, 5.0]))
    Array([2., 2., 2., 2.], dtype=float32)
  """

  @functools.wraps(fun)
  def mapped(*args: Any, **kwargs: Any) -> Any:
    comm = _processes()
    if comm is not None:
      return _run_own(fun, comm, in_axes, out_axes, args, kwargs)
    ranks = num_ranks(size)
    if mesh is not None:
      held = mesh.shape.get(AXIS_NAME)
      if size is not None and held not in (None, size):
        raise ValueError(
          f"map_ranks: the mesh has {held} ranks along {AXIS_NAME!r}, size is "
          f"{size}; make them equal, or leave size out."
        )
      run = _simulate.spmd(fun, mesh, in_axes=in_axes, out_axes=out_axes)
    elif local_size == 1 and 1 < ranks == jax.device_count():
      run = _simulate.spmd(fun, in_axes=in_axes, out_axes=out_axes)
    else:
      run = _simulate.simulate(
        fun, ranks, in_axes=in_axes, out_axes=out_axes, local_size=local_size
      )
    return run(*args, **kwargs)

  return mapped


def num_ranks(size: int | None = None) -> int:
  """The number of ranks of `jfog.map_ranks(fun, size)`.

  That of the processes under `jfog run`, else `size`, by default the number of
  devices. Calls `jfog.init()` if the script has not.

  Raises:
    ValueError: if `size` is not positive.

  Example:
    >>> import jfog
    >>> jfog.num_ranks(8)
    8
  """
  comm = _processes()
  if size is not None:
    size = _validation.size(size)
  if comm is not None:
    return comm.size
  return jax.device_count() if size is None else size


def stack(tree: Any, size: int | None = None) -> Any:
  """One value for all ranks, with an axis over the ranks that this process runs.

  Args:
    tree: a pytree of arrays.
    size: as in `jfog.map_ranks`.

  Returns:
    A pytree of arrays with one more axis in front, of length 1 between processes
    and else of the number of ranks.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.stack(jnp.zeros(3), 8).shape
    (8, 3)
  """
  held = _num_held(size)
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (held, *jnp.shape(x))), tree
  )


def shard(tree: Any, size: int | None = None) -> Any:
  """Divides samples between ranks, in equal and consecutive parts.

  Args:
    tree: a pytree of arrays whose axis 0 holds equally many samples in all.
    size: as in `jfog.map_ranks`.

  Returns:
    A pytree of arrays of shape `(ranks, samples // number of ranks, ...)`. Ranks
    are those that this process runs: 1 between processes, each of which gets its
    own part. Samples beyond a multiple of the number of ranks are left out.

  Raises:
    ValueError: if there are fewer samples than ranks, or leaves differ in their
      number.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.shard(jnp.arange(9), 4)
    Array([[0, 1],
           [2, 3],
           [4, 5],
           [6, 7]], dtype=int32)
  """
  comm, ranks = _processes(), num_ranks(size)
  lengths = {(jnp.shape(x) or (0,))[0] for x in jax.tree.leaves(tree)}
  if len(lengths) > 1 or any(length < ranks for length in lengths):
    raise ValueError(
      f"shard: the leaves have {sorted(lengths)} samples along axis 0 for {ranks} "
      f"ranks; pass equally many in all leaves, at least one for each rank."
    )

  def divide(x: Any) -> jax.Array:
    count = len(x) // ranks
    if comm is not None:
      return jnp.asarray(x[comm.rank * count : (comm.rank + 1) * count])[None]
    return jnp.asarray(x[: ranks * count]).reshape(ranks, count, *x.shape[1:])

  return jax.tree.map(divide, tree)


def _processes() -> ProcessCommunicator | None:
  """The world, if its ranks are processes; started if need be."""
  world = _world.world() or _world.init()
  return world if isinstance(world, ProcessCommunicator) else None


def _num_held(size: int | None) -> int:
  """The number of ranks that this process runs."""
  return num_ranks(size) if _processes() is None else 1


def _run_own(
  fun: Callable[..., Any],
  comm: ProcessCommunicator,
  in_axes: Any,
  out_axes: Any,
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
) -> Any:
  """Runs `fun` on this rank's elements, and gives its results an axis."""

  def own(path: Any, x: Any, axis: int | None) -> Any:
    if axis is None:
      return x
    shape = np.shape(x)
    if axis >= len(shape) or shape[axis] not in (1, comm.size):
      raise ValueError(
        f"argument {jax.tree_util.keystr(path)} of shape {shape} has along axis "
        f"{axis} neither this rank's value alone nor those of {comm.size} ranks; "
        f"use jfog.stack or jfog.shard, or in_axes=None for a value that all "
        f"ranks share."
      )
    index = comm.rank if shape[axis] > 1 else 0
    return x[(*[slice(None)] * axis, index)]

  def map_with_axes(tree: Any, axes: list[int | None]) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return structure.unflatten(
      [own(path, x, axis) for (path, x), axis in zip(leaves, axes, strict=True)]
    )

  args = map_with_axes(args, _simulate.leaf_axes(in_axes, args))
  kwargs = map_with_axes(kwargs, _simulate.leaf_axes(0, kwargs))
  out = fun(*args, **kwargs)
  return _simulate.map_leaves(
    jnp.expand_dims, out, _simulate.leaf_axes(out_axes, out)
  )
