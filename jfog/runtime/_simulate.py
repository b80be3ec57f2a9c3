"""Ranks without MPI: `simulate` on one device and `spmd` on a mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jfog import _validation
from jfog.runtime import _attackers, _delays, _presence
from jfog.runtime._communicator import AXIS_NAME, LOCAL_AXIS_NAME


def simulate(
  fun: Callable[..., Any],
  size: int,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  local_size: int = 1,
  alive: Any = None,
  edge_ok: Any = None,
  delay: Any = None,
  attackers: Mapping[int, _attackers.Attack] | None = None,
) -> Callable[..., Any]:
  """Runs `fun` on `size` virtual ranks of one device, without MPI.

  The ranks are the indices of a `jax.vmap` axis named `"jfog"`, the default
  communicator of every operation inside `fun`. The result can be jitted,
  differentiated and vmapped, and `fun` may be jitted already.

  Args:
    fun: the program of one rank.
    size: the number of ranks.
    in_axes: as in `jax.vmap`, a prefix of the positional arguments: an argument
      whose axis is 0 is stacked over ranks, and rank i sees element i without
      that axis; `None` passes the same value to all ranks. Keyword arguments are
      stacked along axis 0.
    out_axes: the same for the results; `None` only for values that are equal on
      all ranks by construction, such as the result of `jfog.allreduce`.
    local_size: the number of consecutive ranks that form a pretended machine.
    alive: bools of shape `(size,)`, the ranks that take part in this call; traced or
      not, so that a `lax.scan` over steps can scan a trace of failures. In
      `jfog.neighbor_allreduce` and `jfog.pair_gossip` a rank adds the weights of
      missing in-neighbors to its own, by the rule of `jfog.topology.without`, as processes do with
      `jfog.init(on_missing="reweight")`. So does `jfog.win_update` (with `reset=True` a missing
      rank adds nothing), whereas `jfog.win_put`, `jfog.win_accumulate` and `jfog.win_get` leave
      slots as they are. A missing rank computes on, by itself; its
      results have no meaning. Any other operation inside `fun` is a `ValueError`.
    edge_ok: bools of shape `(size, size)`, the messages that arrive in this call,
      by `[dst, src]`. Slots of windows are read without messages.
    delay: of the windows that `fun` makes, unless they have one of their own; as in
      `jfog.win_create`.
    attackers: from ranks to attacks of `jfog.attacks`. In
      `jfog.neighbor_allreduce` and `jfog.neighbor_allgather` such a rank sends what
      the attack chooses, and its own part in its own result stays what it holds.
      Any other operation inside `fun` is a `ValueError`, an integer leaf a
      `TypeError`.

  Returns:
    A function of the stacked arguments to the stacked results.

  Raises:
    ValueError: if `size` is not positive, `local_size` does not divide it, a
      stacked argument has a length other than `size`, `alive`, `edge_ok` or `delay`
      has another shape or dtype, an attacking rank is out of range, or all ranks attack.
    TypeError: if `attackers` is not a dict from ints to attacks, or `delay` has no
      integers.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(jfog.allreduce, 4)(jnp.array([0.0, 1.0, 2.0, 5.0]))
    Array([2., 2., 2., 2.], dtype=float32)
    >>> average = lambda x: jfog.neighbor_allreduce(x, jfog.topology.ring(4))
    >>> alive = jnp.array([True, True, True, False])
    >>> jfog.simulate(average, 4, alive=alive)(jnp.array([0.0, 3.0, 6.0, 9.0]))
    Array([1., 3., 5., 9.], dtype=float32)
    >>> liar = {3: jfog.attacks.sign_flip()}
    >>> jfog.simulate(average, 4, attackers=liar)(jnp.array([0.0, 3.0, 6.0, 9.0]))
    Array([-2.,  3.,  0.,  5.], dtype=float32)
  """
  _validation.positive(size, "size")
  _validation.positive(local_size, "local_size")
  if size % local_size != 0:
    raise ValueError(
      f"local_size={local_size} does not divide size={size}; take a divisor."
    )
  machines = size // local_size
  attacking = _attackers.checked(attackers, size)
  delays = (
    None if delay is None else _delays.checked_delay(delay, size, "simulate")
  )

  @functools.wraps(fun)
  def simulated(*args: Any, **kwargs: Any) -> Any:
    run = functools.partial(run_all, *args, **kwargs)
    if attacking is not None:
      run = functools.partial(_attackers.run, run, attacking)
    if delays is not None:
      run = functools.partial(_delays.run, run, delays)
    if alive is None and edge_ok is None:
      return run()
    return _presence.run(run, size, alive, edge_ok)

  def run_all(*args: Any, **kwargs: Any) -> Any:
    axes = leaf_axes(in_axes, args)
    keyword_axes = leaf_axes(0, kwargs)
    _check_stacked(args, axes, size, "pass in_axes=None")
    _check_stacked(
      kwargs, keyword_axes, size, "pass it by position, in_axes=None"
    )
    if local_size == 1:
      run = jax.vmap(
        fun, in_axes, out_axes, axis_name=AXIS_NAME, axis_size=size
      )
      return run(*args, **kwargs)
    # Machines are the outer axis, so that rank = machine * local_size + local.
    inner = jax.vmap(
      fun, in_axes, out_axes, axis_name=LOCAL_AXIS_NAME, axis_size=local_size
    )
    outer = jax.vmap(
      inner, in_axes, out_axes, axis_name=AXIS_NAME, axis_size=machines
    )
    # The outer vmap maps the axis in the caller's position and removes it,
    # after which the inner one finds the local ranks in the same position.
    split = functools.partial(_split_axis, sizes=(machines, local_size))
    args = map_leaves(split, args, axes)
    kwargs = map_leaves(split, kwargs, keyword_axes)
    out = outer(*args, **kwargs)
    return map_leaves(_join_axis, out, leaf_axes(out_axes, out))

  return simulated


def spmd(
  fun: Callable[..., Any],
  mesh: Mesh | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  axis: str | tuple[str, str] = AXIS_NAME,
) -> Callable[..., Any]:
  """Runs `fun` on the devices along an axis of a mesh, one rank to a device.

  A `jax.shard_map` with the contract of `jfog.simulate`; the data moves by
  XLA's own collectives. Further axes of the mesh stay with the compiler.

  Args:
    fun: the program of one rank.
    mesh: the mesh; by default one of all devices, in their order.
    in_axes: as in `jfog.simulate`.
    out_axes: as in `jfog.simulate`. Where it is `None` the value must be equal
      on all ranks; that is not verified, and the first rank's is returned.
    axis: the name of the axis over ranks, or those of two, machines x local
      ranks. `"jfog"` (with `"jfog_local"`) is the default of operations, any
      other name needs `comm=jfog.Axis(...)`.

  Returns:
    A function of the stacked arguments to the stacked results.

  Raises:
    ValueError: if the mesh has no such axis, or a stacked argument has another
      length than the number of ranks.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> x = jnp.arange(jax.device_count(), dtype=jnp.float32)
    >>> bool((jfog.spmd(jfog.allreduce)(x) == x.mean()).all())
    True
  """
  names = (axis,) if isinstance(axis, str) else tuple(axis)
  if mesh is not None:
    _check_mesh(mesh, names)
    # Explicit axes would require the caller to shard every argument.
    mesh = Mesh(mesh.devices, mesh.axis_names)

  @functools.wraps(fun)
  def mapped(*args: Any, **kwargs: Any) -> Any:
    # At the call, not before: making a mesh starts JAX's backends.
    over = _default_mesh(names) if mesh is None else mesh
    size = int(np.prod([over.shape[name] for name in names]))
    axes = leaf_axes(in_axes, args)
    keyword_axes = leaf_axes(0, kwargs)
    _check_stacked(args, axes, size, "pass in_axes=None")
    _check_stacked(
      kwargs, keyword_axes, size, "pass it by position, in_axes=None"
    )

    def body(args: Any, kwargs: Any) -> Any:
      # shard_map keeps a rank's axis of length 1, which `fun` does not see.
      args = map_leaves(jnp.squeeze, args, axes)
      kwargs = map_leaves(jnp.squeeze, kwargs, keyword_axes)
      out = fun(*args, **kwargs)
      return map_leaves(jnp.expand_dims, out, leaf_axes(out_axes, out))

    run = jax.shard_map(
      body,
      mesh=over,
      in_specs=(_specs(in_axes, names), _specs(0, names)),
      out_specs=_specs(out_axes, names),
      axis_names=set(names),
      check_vma=False,  # programs of one rank carry no varying types
    )
    return run(args, kwargs)

  return mapped


def _check_mesh(mesh: Mesh, names: tuple[str, ...]) -> None:
  for name in names:
    if name not in mesh.shape:
      raise ValueError(
        f"the mesh has axes {tuple(mesh.shape)}, none of them named {name!r}; "
        f"make it with that name or pass axis=."
      )


def _default_mesh(names: tuple[str, ...]) -> Mesh:
  if len(names) == 1:
    return Mesh(np.array(jax.devices()), names)
  # Devices come sorted by process, so that one row holds the devices of one
  # machine.
  machines = {device.process_index for device in jax.devices()}
  devices = np.array(jax.devices()).reshape(len(machines), -1)
  return Mesh(devices, names)


def _is_none(x: Any) -> bool:
  return x is None


def leaf_axes(axes: Any, tree: Any) -> list[int | None]:
  """The axis of every leaf of `tree`; `axes` is a prefix of it, as for `vmap`."""
  if isinstance(axes, list):
    axes = tuple(axes)
  flat: list[int | None] = []

  def add(axis: Any, part: Any) -> None:
    if axis is not None and (not isinstance(axis, int) or axis < 0):
      raise ValueError(
        f"an axis over ranks must be None or an int >= 0, got {axis!r}."
      )
    flat.extend([axis] * len(jax.tree.leaves(part)))

  # A None in `axes` covers its whole subtree, as a number does.
  jax.tree.map(add, axes, tree, is_leaf=_is_none)
  return flat


def map_leaves(
  fun: Callable[..., Any], tree: Any, axes: Sequence[int | None]
) -> Any:
  """Applies `fun(leaf, axis)` to the leaves that have an axis."""
  leaves, structure = jax.tree.flatten(tree)
  pairs = zip(leaves, axes, strict=True)
  return structure.unflatten(
    [leaf if axis is None else fun(leaf, axis) for leaf, axis in pairs]
  )


def _check_stacked(
  tree: Any, axes: Sequence[int | None], size: int, shared: str
) -> None:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  for (path, leaf), axis in zip(leaves, axes, strict=True):
    shape = jnp.shape(leaf)
    if axis is not None and (axis >= len(shape) or shape[axis] != size):
      raise ValueError(
        f"argument {jax.tree_util.keystr(path)} of shape {shape} is not stacked "
        f"over {size} ranks along axis {axis}; stack it, or {shared}, for a "
        f"value that all ranks share."
      )


def _specs(axes: Any, names: tuple[str, ...]) -> Any:
  """The partition of every entry of a prefix of axes."""

  def spec(axis: int | None) -> PartitionSpec:
    if axis is None:
      return PartitionSpec()
    # Both names on one dimension: the ranks are stacked major axis first.
    return PartitionSpec(*[None] * axis, names)

  if isinstance(axes, list):
    axes = tuple(axes)
  return jax.tree.map(spec, axes, is_leaf=_is_none)


def _split_axis(x: Any, axis: int, sizes: tuple[int, int]) -> jax.Array:
  """Splits the axis over ranks into machines and, just behind, local ranks.

  The outer vmap removes the axis of the machines, so that the one of the local
  ranks moves to its position.
  """
  shape = jnp.shape(x)
  return jnp.reshape(x, shape[:axis] + sizes + shape[axis + 1 :])


def _join_axis(x: jax.Array, axis: int) -> jax.Array:
  shape = x.shape
  return jnp.reshape(
    x, (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
  )
