"""`neighbor_allgather` and its transpose on GPUs: one exchange each."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfog.primitives import _weighted_sum
from jfog.primitives.nccl import _exchange
from jfog.primitives.nccl._lowering import Mode, Rendition, Send

_NAME = "neighbor_allgather"


class NeighborAllgather(Rendition):
  """One exchange, into the parts of the result."""

  def encode(
    self,
    mode: Mode,
    scalars: Sequence[Any],
    leaves: Sequence[jax.Array],
    *,
    rounds: _exchange.Rounds,
    first: int,
    fingerprint: int,
    axis_sizes: Sequence[Sequence[int]],
    comm: Any,
    **params: Any,
  ) -> Send:
    """The exchange, with the lengths of the parts."""
    del params
    return _exchange.exchange(
      _NAME,
      mode,
      comm,
      scalars[0],
      leaves,
      rounds,
      variant=(fingerprint, first),
      like=_rows(leaves),
      receive_counts=_counts(leaves, axis_sizes),
    )


class NeighborAllgatherTranspose(Rendition):
  """Each source gets its part of the cotangent; the received slots are summed.

  `static` is the number of slots, `weights` whether the round fills each.
  """

  def encode(
    self,
    mode: Mode,
    scalars: Sequence[Any],
    leaves: Sequence[jax.Array],
    *,
    rounds: _exchange.Rounds,
    first: int,
    fingerprint: int,
    axis_sizes: Sequence[Sequence[int]],
    comm: Any,
    **params: Any,
  ) -> Send:
    """The exchange on the transposed graph, with the lengths of the parts."""
    del params
    return _exchange.exchange(
      f"{_NAME}_transpose",
      mode,
      comm,
      scalars[0],
      leaves,
      # The adjoint sends along every edge backward.
      [(to, sources) for sources, to in rounds],
      variant=(fingerprint, first, "transpose"),
      like=_rows(leaves),
      # Each destination gets another part of the cotangent.
      apart=True,
      send_counts=_counts(leaves, axis_sizes),
    )

  def received(self, results: Sequence[Any], static: int) -> Sequence[Any]:
    """One slot for each destination of the operation itself."""
    return [jax.ShapeDtypeStruct((static, *x.shape), x.dtype) for x in results]

  def decode(
    self, own: Any, weights: Any, received: Any, static: int
  ) -> Sequence[Any]:
    """The sum over the slots."""
    del own, static
    return _weighted_sum.combine(
      # No own value in the sum: its weight is 0.
      [jnp.zeros(x.shape[1:], x.dtype) for x in received],
      received,
      0,
      jnp.ones(len(weights), np.float32),
      weights,
      False,
    )

  def weights(
    self, scalars: Sequence[Any], *, rounds: _exchange.Rounds, **params: Any
  ) -> Any:
    """Whether the round fills each slot."""
    del params
    counts = np.array([len(to) for _, to in rounds])
    # Rounds with fewer destinations leave the last slots as they are.
    table = np.arange(max(counts)) < counts[:, None]
    return _exchange.at_step(table, scalars[0])

  def static(self, *, rounds: _exchange.Rounds, **params: Any) -> int:
    """The number of slots."""
    del params
    return max(len(to) for _, to in rounds)


def _rows(leaves: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
  """One row of each leaf: ranks have different numbers of them."""
  return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]


def _counts(
  leaves: Sequence[jax.Array], axis_sizes: Sequence[Sequence[int]]
) -> list[int]:
  """The elements that each rank has of each leaf, in one list."""
  return [
    size * math.prod(x.shape[1:])
    for x, sizes in zip(leaves, axis_sizes, strict=True)
    for size in sizes
  ]
