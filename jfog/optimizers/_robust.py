"""Averages over neighbors of which some may send anything."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from jfog import _dtypes, _validation
from jfog.optimizers import _requirements
from jfog.primitives import neighbor_allgather
from jfog.runtime import Communicator, resolve
from jfog.topology import Schedule, Topology
from jfog.topology._neighbor_table import neighbor_table

_NETWORK = 16  # values that a network of comparisons sorts


def clipped(
  graph: Topology | Schedule,
  radius: Any = None,
  faulty: int = 1,
  *,
  comm: Communicator | None = None,
) -> Callable[..., Any]:
  """Averages with the neighbors, and clips what is far from the own value.

  Rank `i` computes

      x[i] + sum_j W[i, j] clip(x[j] - x[i], tau)
      clip(v, tau) = v min(1, tau / |v|)

  with the norm over the whole tree. `tau` is `radius`, or by default the distance
  of the `(faulty + 1)`-th farthest in-neighbor: the farthest `faulty` are pulled in
  to it. A difference that is not finite counts as infinitely far, and adds nothing.
  With `radius=inf` and finite values this is `jfog.neighbor_allreduce`, up to
  rounding.

  Each rank sends all its leaves in one message to each out-neighbor and receives
  one from each in-neighbor, as in `jfog.neighbor_allgather`; it holds those of all
  in-neighbors at a time.

  Args:
    graph: a `Topology`, or a `Schedule`, read at `step`; row-stochastic.
    radius: the largest distance that is not clipped, a positive number, traced or
      not.
    faulty: how many in-neighbors of one rank may be faulty; not used with a
      `radius`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    A function `(params, step) -> params` for the `graph` argument of an optimizer.
    The result has the shapes and dtypes of `params`, a pytree of float or complex
    arrays; floats of 16 bits are summed in float32.

  Raises:
    ValueError: if the graph is not row-stochastic, `radius` is not positive, or
      without a radius some rank has `faulty` in-neighbors or fewer in some round.
      With `faulty=0` a rank may have none.
    TypeError: if `graph` is not a graph, or `faulty` not an integer; in a call, for
      integer and bool leaves.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(4)
    >>> average = jfog.optimizers.clipped(graph, radius=4.0)
    >>> run = jfog.simulate(lambda x: average(x, 0), 4)
    >>> run(jnp.array([0.0, 2.0, 4.0, 1000.0]))
    Array([  2.5,   3. ,   3.5, 997. ], dtype=float32)

  Source: He, Karimireddy and Jaggi, "Byzantine-robust decentralized learning via
  ClippedGossip", 2022, arXiv 2202.01545.
  """
  name = "clipped"
  if radius is None:
    faulty = _check(graph, name, faulty, lambda d: d - 1)
  else:
    faulty = _check(graph, name, faulty, None)
    if not _validation.is_scalar(radius):
      raise TypeError(f"{name}: radius={radius!r} must be a number, or None.")
    if not isinstance(radius, jax.core.Tracer) and not radius > 0:
      raise ValueError(f"{name}: radius={radius!r} must be positive.")
  _requirements.ROW_STOCHASTIC.check(graph, name)

  def combine(values: "_Values") -> Any:
    differences, distances = values.differences, values.distances
    limit = radius
    if limit is None:
      # Distances of empty slots are inf, and would come first.
      far = jnp.where(values.present, distances, -jnp.inf)
      limit = jnp.sort(far)[::-1][faulty]
    # Of a rank without neighbors, which only faulty=0 allows, nothing is present.
    factor = jnp.where(distances > limit, limit / distances, 1)
    weights = jnp.where(values.present, values.weights * factor, 0)
    return values.moved(
      [
        jnp.sum(_times(weights, jnp.where(_along(values.finite, v), v, 0)), 0)
        for v in differences
      ]
    )

  return _averaging(graph, name, combine, comm)


def trimmed_mean(
  graph: Topology | Schedule,
  faulty: int,
  *,
  comm: Communicator | None = None,
) -> Callable[..., Any]:
  """The mean without the smallest and largest values, coordinate by coordinate.

  Of the `d + 1` values of a rank and its `d` in-neighbors, sorted in each coordinate,

      mean of sorted[faulty], ..., sorted[d - faulty]

  with equal weights; those of the graph are not used. The real and imaginary parts
  of a complex leaf are coordinates of their own. A NaN counts as the largest value.

  Communicates as `clipped` does.

  Args:
    graph: a `Topology`, or a `Schedule`, read at `step`.
    faulty: how many values are dropped at each end; so many in-neighbors of one
      rank may be faulty.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    A function as of `clipped`.

  Raises:
    ValueError: unless `2 faulty < d + 1` for the in-neighbors of each rank in each
      round.
    TypeError: as in `clipped`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(4)
    >>> average = jfog.optimizers.trimmed_mean(graph, faulty=1)
    >>> run = jfog.simulate(lambda x: average(x, 0), 4)
    >>> run(jnp.array([0.0, 2.0, 4.0, 1000.0]))
    Array([3., 3., 3., 3.], dtype=float32)

  Source: Yin et al., "Byzantine-robust distributed learning: towards optimal
  statistical rates", 2018; Yang and Bajwa, "ByRDiE: Byzantine-resilient distributed
  coordinate descent for decentralized learning", 2019.
  """
  name = "trimmed_mean"
  faulty = _check(graph, name, faulty, lambda d: d // 2)

  def combine(values: "_Values") -> Any:
    last = values.degree - faulty

    def leaf(x: jax.Array) -> jax.Array:
      first = x[faulty]
      place = jnp.arange(len(x))
      kept = _along((place >= faulty) & (place <= last), x)
      # About one of them: the mean of equal values is that value, bit for bit.
      total = jnp.sum(jnp.where(kept, x - first, 0), axis=0)
      return first + total / (last - faulty + 1).astype(x.dtype)

    return values.by_coordinate(leaf)

  return _averaging(graph, name, combine, comm)


def coordinate_median(
  graph: Topology | Schedule, *, comm: Communicator | None = None
) -> Callable[..., Any]:
  """The median over a rank and its in-neighbors, coordinate by coordinate.

  Of an even number of values the mean of the two middle ones. Weights of the graph
  are not used; a NaN counts as the largest value. On `d + 1` values it withstands
  fewer than half of them.

  Communicates as `clipped` does.

  Args:
    graph: a `Topology`, or a `Schedule`, read at `step`.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    A function as of `clipped`.

  Raises:
    TypeError: as in `clipped`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(4)
    >>> average = jfog.optimizers.coordinate_median(graph)
    >>> run = jfog.simulate(lambda x: average(x, 0), 4)
    >>> run(jnp.array([0.0, 2.0, 4.0, 1000.0]))
    Array([3., 3., 3., 3.], dtype=float32)

  Source: Yin et al., "Byzantine-robust distributed learning: towards optimal
  statistical rates", 2018.
  """
  name = "coordinate_median"
  _check(graph, name, 0, None)

  def combine(values: "_Values") -> Any:
    count = values.degree + 1

    def leaf(x: jax.Array) -> jax.Array:
      low, high = x[(count - 1) // 2], x[count // 2]
      return jnp.where(low == high, low, low + (high - low) / 2)

    return values.by_coordinate(leaf)

  return _averaging(graph, name, combine, comm)


def nearest_mean(
  graph: Topology | Schedule,
  faulty: int,
  *,
  comm: Communicator | None = None,
) -> Callable[..., Any]:
  """The mean of the values nearest to the own one.

  Of the `d + 1` values of a rank and its `d` in-neighbors, own included, the mean
  of the `d + 1 - faulty` with the smallest distance from the own value, in the norm
  over the whole tree. At equal distances the lower rank comes first; a value that
  is not finite is infinitely far. Weights of the graph are not used.

  Communicates as `clipped` does.

  Args:
    graph: a `Topology`, or a `Schedule`, read at `step`.
    faulty: how many values are dropped; so many in-neighbors of one rank may be
      faulty.
    comm: the communicator, see `jfog.optimizers`.

  Returns:
    A function as of `clipped`.

  Raises:
    ValueError: if some rank has `faulty` in-neighbors or fewer in some round. With
      `faulty=0` a rank may have none.
    TypeError: as in `clipped`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph = jfog.topology.fully_connected(4)
    >>> average = jfog.optimizers.nearest_mean(graph, faulty=1)
    >>> run = jfog.simulate(lambda x: average(x, 0), 4)
    >>> run(jnp.array([0.0, 3.0, 6.0, 999.0]))
    Array([  3.,   3.,   3., 336.], dtype=float32)

  Source: nearest-neighbor averaging of Farhadkhani et al., "Robust collaborative
  learning with linear gradient overhead", 2023, arXiv 2209.10931.
  """
  name = "nearest_mean"
  faulty = _check(graph, name, faulty, lambda d: d - 1)

  def combine(values: "_Values") -> Any:
    # Empty slots come last, and both sorts keep the order of equal distances.
    order = jnp.argsort(values.distances, stable=True)
    place = jnp.argsort(order, stable=True)
    chosen = values.present & (place < values.degree - faulty)
    count = values.degree + 1 - faulty
    return values.moved(
      [
        jnp.sum(jnp.where(_along(chosen, v), v, 0), axis=0)
        / count.astype(_dtypes.real(v.dtype))
        for v in values.differences
      ]
    )

  return _averaging(graph, name, combine, comm)


class _Values:
  """A rank's leaves and those of its in-neighbors, in slots along axis 0.

  Attributes:
    own: the leaves of the rank, in their accumulation dtypes.
    received: those of the in-neighbors.
    present: whether a slot holds an in-neighbor; the last ones may not.
    weights: the weights of the graph by slot.
    degree: the number of in-neighbors.
  """

  def __init__(
    self,
    own: list[jax.Array],
    received: list[jax.Array],
    present: jax.Array,
    weights: jax.Array,
  ):
    self.own = own
    self.received = received
    self.present = present
    self.weights = weights
    self.degree = jnp.sum(present)
    self.differences = [y - x[None] for x, y in zip(own, received, strict=True)]
    self.finite = present
    for v in self.differences:
      ok = jnp.isfinite(v).reshape(len(v), -1)
      self.finite = self.finite & ok.all(axis=1)

  @property
  def distances(self) -> jax.Array:
    """The norms of the differences by slot; inf where one is not finite or empty."""
    parts = [_real_parts(v) for v in self.differences]
    parts = [jnp.abs(v).reshape(len(v), -1) for v in parts if v.size]
    if not parts:
      return jnp.where(self.finite, 0.0, jnp.inf)
    dtype = jnp.result_type(*parts)
    # In units of the largest entry, so that no square overflows or vanishes.
    unit = jnp.stack([v.max(axis=1).astype(dtype) for v in parts]).max(axis=0)
    usable = self.finite & (unit > 0)
    by = jnp.where(usable, unit, 1)
    squares = [
      jnp.sum((v.astype(dtype) / by[:, None]) ** 2, axis=1) for v in parts
    ]
    norm = by * jnp.sqrt(sum(squares[1:], squares[0]))
    return jnp.where(usable, norm, jnp.where(self.finite, 0, jnp.inf))

  def moved(self, steps: list[jax.Array]) -> list[jax.Array]:
    """The own leaves plus a step of each."""
    return [x + v for x, v in zip(self.own, steps, strict=True)]

  def by_coordinate(
    self, fun: Callable[[jax.Array], jax.Array]
  ) -> list[jax.Array]:
    """`fun` of each coordinate's values in ascending order, own included.

    Behind them are as many inf as slots are empty.
    """
    results = []
    for x, received in zip(self.own, self.received, strict=True):
      both = _real_parts(jnp.concatenate([x[None], received]))
      is_value = _along(jnp.append(True, self.present), both)
      both = jnp.where(is_value & ~jnp.isnan(both), both, jnp.inf)
      result = fun(_ascending(both))
      if jnp.iscomplexobj(x):
        result = lax.complex(result[..., 0], result[..., 1])
      results.append(result)
    return results


def _averaging(
  graph: Topology | Schedule,
  name: str,
  combine: Callable[[_Values], list[jax.Array]],
  comm: Communicator | None,
) -> Callable[..., Any]:
  """An averaging that gathers the in-neighbors' values and combines them."""
  table = neighbor_table(graph)

  def average(params: Any, step: Any = None) -> Any:
    _requirements.require_params(params, name)
    here = resolve(comm)
    leaves, structure = jax.tree.flatten(params)
    leaves = [jnp.asarray(x) for x in leaves]
    if not leaves:
      return params
    gathered = neighbor_allgather(
      [x[None] for x in leaves], graph, step, pad=True, comm=comm
    )
    if not len(gathered[0]):  # no rank has an in-neighbor
      return structure.unflatten(leaves)
    index = 0 if isinstance(graph, Topology) else step % len(graph)
    # The table has the slots of the longest round, a known step those of its own.
    slots = len(gathered[0])
    dtype = jnp.result_type(*(_dtypes.real(_wide(x).dtype) for x in leaves))
    combined = combine(
      _Values(
        [_wide(x) for x in leaves],
        [_wide(x) for x in gathered],
        jnp.asarray(table.present)[index, here.rank, :slots],
        jnp.asarray(table.weights, dtype)[index, here.rank, :slots],
      )
    )
    return structure.unflatten(
      [y.astype(x.dtype) for x, y in zip(leaves, combined, strict=True)]
    )

  return average


def _check(
  graph: Any,
  name: str,
  faulty: int,
  most: Callable[[int], int] | None,
) -> int:
  """Checks a graph and the number of faulty in-neighbors.

  Args:
    graph: the graph.
    name: of the average, for error texts.
    faulty: the number of faulty in-neighbors of one rank.
    most: from a number of in-neighbors to the largest `faulty` that it allows.
  """
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(f"{_validation.unlike_graph(graph, f'{name}: graph')}.")
  faulty = _validation.integer(
    faulty, f"{name}: faulty", 0, "pass the number of faulty in-neighbors"
  )
  if most is None or faulty == 0:
    return faulty
  for number, topology in enumerate(graph.rounds):
    for rank in range(topology.size):
      degree = len(topology.in_neighbors(rank))
      if faulty > most(degree):
        where = f" in round {number}" if isinstance(graph, Schedule) else ""
        raise ValueError(
          f"{name}: faulty={faulty}, and rank {rank} has {degree} in-neighbors"
          f"{where}, which allow at most {max(most(degree), 0)}; pass a smaller "
          f"faulty or a graph with more in-neighbors."
        )
  return faulty


def _ascending(x: jax.Array) -> jax.Array:
  """`x` without NaN, sorted along axis 0."""
  if len(x) > _NETWORK:
    return jnp.sort(x, axis=0)
  # Odd-even transposition: on CPUs a tenth of the time of XLA's sort.
  rows = list(x)
  for number in range(len(rows)):
    for k in range(number % 2, len(rows) - 1, 2):
      low, high = rows[k], rows[k + 1]
      rows[k], rows[k + 1] = jnp.minimum(low, high), jnp.maximum(low, high)
  return jnp.stack(rows)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(_dtypes.accumulation(x.dtype))


def _along(values: jax.Array, x: jax.Array) -> jax.Array:
  """One value for each slot of `x`."""
  return values.reshape(values.shape + (1,) * (x.ndim - 1))


def _times(weights: jax.Array, x: jax.Array) -> jax.Array:
  """The slots of `x`, each times its weight, in the dtype of `x`."""
  return _along(weights.astype(_dtypes.real(x.dtype)), x) * x


def _real_parts(x: jax.Array) -> jax.Array:
  """Complex numbers as two real ones along a last axis; real ones as they are."""
  return jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x
