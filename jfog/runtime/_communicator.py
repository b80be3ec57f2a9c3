"""Communicators: the ranks of an operation and the carrier of its data."""

import abc
import dataclasses
from typing import Any

import jax
from jax import lax

from jfog import _compat

AXIS_NAME = "jfog"
LOCAL_AXIS_NAME = "jfog_local"


class NotInitializedError(RuntimeError):
  """An operation without a communicator: no `comm`, bound axis or world."""


class Communicator(abc.ABC):
  """A group of ranks; immutable and hashable.

  Ranks of one machine are consecutive: `rank = machine_rank * local_size +
  local_rank` wherever all machines hold the same number of ranks.

  Attributes:
    size: the number of ranks, an int.
    rank: this rank: an int on MPI, a traced int32 scalar on a mesh.
    backend: `"mpi"`, `"nccl"`, `"mesh"` or `"single"`.
    local: the communicator of the ranks on this machine.
    machines: the communicator of the ranks with this local rank, one on each
      machine.
    launched_ranks: after `jfog.recover`, of each rank its rank in the job as it was
      launched, or that of the lost rank whose place it has taken; else empty.
    joined_ranks: the ranks that `jfog.recover` has taken in, and that have no state
      yet, see `jfog.share_state`.
  """

  size: Any
  rank: Any
  launched_ranks: tuple[int, ...] = ()
  joined_ranks: tuple[int, ...] = ()

  @property
  @abc.abstractmethod
  def backend(self) -> str:
    """`"mpi"`, `"nccl"`, `"mesh"` or `"single"`, after what carries the data."""

  @property
  def is_native(self) -> bool:
    """Whether operations have their native rendition, over MPI or NCCL.

    Otherwise XLA's own collectives, or nothing in a world of one, carry them.
    """
    return False

  @property
  @abc.abstractmethod
  def local(self) -> "Communicator":
    """The ranks of this machine."""

  @property
  @abc.abstractmethod
  def machines(self) -> "Communicator":
    """The ranks that have this local rank, one of each machine."""

  @property
  def is_homogeneous(self) -> bool:
    """Whether all machines hold the same number of ranks."""
    return True

  @property
  def local_rank(self) -> Any:
    """The index of this rank among the ranks of its machine."""
    return self.local.rank

  @property
  def local_size(self) -> int:
    """The number of ranks on this machine."""
    return self.local.size

  @property
  def machine_rank(self) -> Any:
    """The index of this rank's machine among the machines."""
    return self.machines.rank

  @property
  def machine_size(self) -> int:
    """The number of machines."""
    return self.machines.size


@dataclasses.dataclass(frozen=True)
class Single(Communicator):
  """A world of one: every operation is local, and no MPI library is needed."""

  size = 1
  rank = 0

  def __repr__(self) -> str:
    return "<jfog communicator: rank 0 of 1, single>"

  @property
  def backend(self) -> str:
    """`"single"`."""
    return "single"

  @property
  def local(self) -> Communicator:
    """Itself."""
    return self

  @property
  def machines(self) -> Communicator:
    """Itself."""
    return self


@dataclasses.dataclass(frozen=True)
class Axis(Communicator):
  """The ranks along one named axis of a mesh or of `jax.vmap`, or along two.

  With `local`, the communicator spans two axes, machines x local ranks, and
  `rank = machine_rank * local_size + local_rank`. The axes are looked up at use,
  so an `Axis` may be made before any mesh exists.

  Args:
    name: the name of the axis; of the axis over machines if `local` is given.
    local: the name of the axis over the ranks inside a machine.

  Raises:
    NotInitializedError: when it is used where its axes are not bound.

  Example:
    >>> import jax, jax.numpy as jnp, jfog
    >>> comm = jfog.Axis("data")
    >>> jax.vmap(lambda x: jfog.allreduce(x, comm=comm), axis_name="data")(
    ...     jnp.array([1.0, 2.0, 6.0]))
    Array([3., 3., 3.], dtype=float32)
  """

  name: str
  local_name: str | None = None

  def __init__(self, name: str, local: str | None = None):
    for axis in (name, local):
      if axis is not None and not isinstance(axis, str):
        raise TypeError(f"an axis name must be a str, got {axis!r}.")
    if name == local:
      raise ValueError(
        f"the two axes need different names, got {name!r} twice."
      )
    object.__setattr__(self, "name", name)
    object.__setattr__(self, "local_name", local)

  @property
  def axes(self) -> tuple[str, ...]:
    """The names of the axes it spans, major first."""
    return (
      (self.name,) if self.local_name is None else (self.name, self.local_name)
    )

  def require_bound(self) -> tuple[str, ...]:
    """Returns the axes, after a check that the current trace binds them.

    Raises:
      NotInitializedError: if one is not.
    """
    for axis in self.axes:
      if not _compat.axis_is_bound(axis):
        raise NotInitializedError(
          f"the axis {axis!r} of {self!r} is not bound here; call this inside "
          f"jax.shard_map or jax.vmap over an axis of that name."
        )
    return self.axes

  @property
  def size(self) -> int:
    """The product of the sizes of its axes."""
    # A Python int: the sizes of bound axes are known while tracing.
    return lax.axis_size(self.require_bound())

  @property
  def rank(self) -> jax.Array:
    """The index along its axes, a traced int32 scalar."""
    # Row-major over two axes: machine * local_size + local.
    return lax.axis_index(self.require_bound())

  @property
  def backend(self) -> str:
    """`"mesh"`."""
    return "mesh"

  @property
  def local(self) -> Communicator:
    """The axis of the local ranks; a world of one without a second axis."""
    # One axis does not say which devices share a machine.
    return Single() if self.local_name is None else LocalAxis(self.local_name)

  @property
  def machines(self) -> Communicator:
    """The axis of the machines."""
    # All ranks of one local rank: the other axis stays bound, so each local
    # rank has an axis of machines of its own.
    return Axis(self.name)


class LocalAxis(Axis):
  """The ranks of one machine, along the second axis of an `Axis` of two."""

  @property
  def local(self) -> Communicator:
    """Itself."""
    return self

  @property
  def machines(self) -> Communicator:
    """A world of one."""
    return Single()


def default_axis() -> Axis | None:
  """The communicator of the bound axis `AXIS_NAME`, if it is bound."""
  if not _compat.axis_is_bound(AXIS_NAME):
    return None
  # Found by name: `simulate` and `spmd` bind both in their two-axis form.
  local = LOCAL_AXIS_NAME if _compat.axis_is_bound(LOCAL_AXIS_NAME) else None
  return Axis(AXIS_NAME, local)
