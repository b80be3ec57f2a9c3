"""Places in the user's program from which operations are called."""

import functools
import os
import sys
import sysconfig
import types
from collections.abc import Sequence
from typing import Any

import jax

from jfog import runtime

_JFOG = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Python's own modules, and those that are installed.
_LIBRARIES = tuple(
  os.path.join(sysconfig.get_paths()[name], "")
  for name in ("stdlib", "platstdlib")
)
_PACKAGES = (
  f"{os.sep}site-packages{os.sep}",
  f"{os.sep}dist-packages{os.sep}",
)
# Native operations that a primitive of another name calls.
_NATIVE = {"peer_allreduce": ("neighbor_allreduce", "pair_gossip")}


def record(operation: str, leaves: Sequence[Any], structure: Any) -> None:
  """Records the place of the caller and its leaves, for texts of errors.

  Called where an operation is traced, so that a run costs nothing.

  Args:
    operation: the name of the operation.
    leaves: its arrays.
    structure: the structure of the pytree that they are the leaves of.
  """
  place = _of(sys._getframe(1))
  if not place:
    return
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  for name in _NATIVE.get(operation, (operation,)):
    _add(name, size, place, _texts(leaves, structure))


_seen: set[tuple[int, int]] = set()  # call sites of eager operations


def record_eager(operation: str, x: Any) -> None:
  """Records the place of an eager call, which is not traced each time.

  Args:
    operation: the name of the operation.
    x: its pytree of arrays.
  """
  caller = sys._getframe(2)
  # Not the code itself, whose hash reads all of it.
  site = id(caller.f_code), caller.f_lasti
  if site in _seen:
    return
  _seen.add(site)
  leaves, structure = jax.tree.flatten(x)
  record(operation, [x for x in leaves if hasattr(x, "dtype")], structure)


@functools.cache
def _add(
  operation: str, size: int, place: str, leaves: tuple[str, ...]
) -> None:
  """Adds a place to the table of C++, once."""
  runtime.mpi().add_place(operation, size, place, leaves)


def _texts(leaves: Sequence[Any], structure: Any) -> tuple[str, ...]:
  """`x['w'] of shape (3, 4)` for each leaf; nothing where some are left out."""
  if structure.num_leaves != len(leaves):
    return ()
  tree = jax.tree.unflatten(structure, range(len(leaves)))
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return tuple(
    f"x{jax.tree_util.keystr(path)} of shape {leaf.shape}"
    for (path, _), leaf in zip(paths, leaves, strict=True)
  )


def _of(frame: types.FrameType | None) -> str:
  """The innermost frame of the user: `train.py:12 in train_step`.

  That of a library that calls jfog, if there is no other.
  """
  library = ""
  while frame is not None:
    path = frame.f_code.co_filename
    if not path.startswith((_JFOG, "<frozen")):
      name, function = os.path.basename(path), frame.f_code.co_name
      place = f"{name}:{frame.f_lineno}"
      if function != "<module>":
        place += f" in {function}"
      if not path.startswith(_LIBRARIES) and not any(
        part in path for part in _PACKAGES
      ):
        return place
      # JAX itself lies between every operation and its caller.
      if not library and f"{os.sep}jax{os.sep}" not in path:
        library = place
    frame = frame.f_back
  return library
