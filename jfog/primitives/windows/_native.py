"""Windows between processes: the rules of the primitives.

The number of the window is an operand, so a program selects its window
at run time, and a result, so that the handle of a split operation returns it.
"""

import enum
import hashlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jfog.primitives import _ffi_attributes, _primitive

NUMBER = jax.ShapeDtypeStruct((), jnp.uint32)


def _number_abstract_eval(
  *operands: Any, **params: Any
) -> list[jax.core.ShapedArray]:
  del operands, params
  return [jax.core.ShapedArray((), jnp.uint32)]


def _update_abstract_eval(
  *operands: Any, fixed: int, **params: Any
) -> list[jax.core.ShapedArray]:
  leaves = [jax.core.ShapedArray(x.shape, x.dtype) for x in operands[fixed:]]
  return [*leaves, *_number_abstract_eval(**params)]


def _no_derivative(
  primitive: Any, primals: Any, results: Any, tangents: Any, **params: Any
) -> list[Any]:
  raise TypeError(
    f"{primitive.name} has no derivative: the contents of a window come from "
    f"earlier operations of other ranks; use jax.lax.stop_gradient on its input."
  )


class _Associated(enum.IntEnum):
  """The dtype of a window's p; numbered as in window.h."""

  NONE = 0
  FLOAT32 = 1
  FLOAT64 = 2


def _create_attributes(*leaves: Any, spec: Any) -> dict[str, Any]:
  del leaves
  topology, rank = spec.topology, spec.comm.rank
  out = topology.out_neighbors(rank)
  associated = _Associated.NONE
  if spec.associated_p:
    associated = _Associated[spec.p_dtype.name.upper()]
  return {
    "context": np.int64(spec.comm.context),
    "graph": np.int64(_ffi_attributes.fingerprint(topology)),
    "structure": np.int64(_fingerprint(str(spec.structure))),
    # An attribute may not be empty: one more element, which is never read.
    "sources": np.array([*topology.in_neighbors(rank), -1], np.int32),
    "destinations": np.array([*out, -1], np.int32),
    # The slot of this rank at each out-neighbor.
    "slots": np.array(
      [*(topology.in_neighbors(d).index(rank) for d in out), -1], np.int32
    ),
    "zero_init": np.int64(spec.zero_init),
    "associated": np.int64(associated),
  }


def _fingerprint(text: str) -> int:
  # Python's hash of a str differs from process to process.
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little", signed=True)


def _attributes(
  *leaves: Any, comm: Any, peers: Any = None, **flags: Any
) -> dict[str, Any]:
  del leaves
  attributes: dict[str, Any] = {"context": np.int64(comm.context)}
  if peers is not None:
    # Not empty, as above: the last element is never read.
    attributes["peers"] = np.array([*peers, -1], np.int32)
  return {**attributes, **{k: np.int64(v) for k, v in flags.items()}}


def _define(
  name: str, abstract_eval: Any = _number_abstract_eval, **rules: Any
) -> Any:
  return _primitive.define(
    name,
    abstract_eval=abstract_eval,
    tangents=_no_derivative,
    # A batch would need a window for each of its elements.
    batch_axis=None,
    **{"attributes": _attributes, **rules},
  )


win_create_p = _define("win_create", attributes=_create_attributes)
win_put_p = _define("win_put")
win_accumulate_p = _define("win_accumulate")
win_get_p = _define("win_get")
win_update_p = _define(
  "win_update", abstract_eval=_update_abstract_eval, in_place=True
)
win_missing_p = _define(
  "win_missing",
  abstract_eval=lambda number, fixed, comm: [
    jax.core.ShapedArray((comm.size,), jnp.bool_)
  ],
)
win_version_p = _define(
  "win_version",
  abstract_eval=lambda number, fixed, comm: [
    jax.core.ShapedArray((comm.size,), jnp.int32)
  ],
)
win_associated_p_p = _define(
  "win_associated_p",
  abstract_eval=lambda number, fixed, dtype, comm: [
    jax.core.ShapedArray((), dtype)
  ],
  attributes=lambda dtype, comm: {"context": np.int64(comm.context)},
)
win_free_p = _define("win_free")
