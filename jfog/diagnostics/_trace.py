"""Traces of a training: loss, distances between ranks, and bytes sent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jfog.diagnostics._consensus import consensus_distance, square_distance
from jfog.diagnostics._counters import counters
from jfog.primitives import allreduce, varying
from jfog.runtime import Communicator, resolve


class Trace(NamedTuple):
  """The record of `trace`; the entries are equal on all ranks.

  Entry `r` is of step `k = step[r]`: loss and distances are those of the
  parameters at the start of the step, `x[i]` on rank `i`, and the bytes those of
  the steps from this one to the next entry: `jnp.cumsum(bytes_per_step) * every`
  is the sum of bytes sent by a rank before entry `r + 1`.
  """

  step: jax.Array  # shape=(records,), dtype=int32: 0, every, 2 every, ...
  loss: jax.Array  # mean over ranks of each rank's loss at its x[i]
  consensus_distance: jax.Array  # see `consensus_distance`
  distance: jax.Array | None  # sqrt(mean over i of ||x[i] - distance_to||^2)
  bytes_per_step: jax.Array  # sent in a step, mean over ranks; NaN if unknown


def trace(
  tx: optax.GradientTransformation,
  loss: Callable[..., Any],
  params: optax.Params,
  steps: int,
  *,
  batches: Any = None,
  state: Any = None,
  every: int = 1,
  distance_to: optax.Params | None = None,
  bytes_per_step: float | None = None,
  comm: Communicator | None = None,
) -> tuple[Any, Any, Trace]:
  """Trains for a number of steps and records loss, distances and bytes.

  A step on rank `i` is that of any training with optax,

      g = gradient of loss(x[i], batch k)
      u, state = tx.update(g, state, x[i])
      x[i] <- x[i] + u

  and before each `every`-th step the trace records, as averages over ranks,

      loss                 1/n sum_i loss(x[i], batch k)
      consensus distance   sqrt(1/n sum_i ||x[i] - xbar||^2)
      distance             sqrt(1/n sum_i ||x[i] - x*||^2), x* = distance_to

  Inside of `jfog.simulate` and `jfog.spmd`, and under any transformation, all
  steps are one `jax.lax.scan`. There XLA counts no bytes, and the trace repeats
  the argument `bytes_per_step`, for example the value of `bytes_per_step(graph,
  params)`. On processes it is a Python loop over jitted steps, `every` in one
  call, with the counters read around the steps: the argument is ignored, and the
  trace's own averages are not counted. All ranks call it with the same arguments
  except `params`, `batches`, `state` and the closure of the loss.

  Args:
    tx: the optimizer.
    loss: the rank's own loss, `loss(params)`, or `loss(params, batch)` with
      batches, a real scalar.
    params: the rank's parameters, a pytree of float arrays.
    steps: the number of steps.
    batches: the second argument of the rank's loss: a pytree of arrays with axis
      0 of length `steps`.
    state: the optimizer's state at the start; `tx.init(params)` by default.
    every: the number of steps from one record to the next.
    distance_to: a solution, like `params`, to which the distance is recorded.
    bytes_per_step: without counters, the bytes that a rank sends in a step; NaN
      by default.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    The parameters and the state after the last step, and a `Trace` of
    `ceil(steps / every)` entries. Its bytes are float32 (float64 with x64); on a
    world of one nothing is sent, and they are zero.

  Raises:
    ValueError: if `steps` or `every` is less than 1, or a batch is missing.
    TypeError: for integer or bool leaves of `params`, or a loss that is not a
      real scalar.
    NotInitializedError: without a communicator.

  Example:
    >>> import jax.numpy as jnp, jfog, optax
    >>> graph = jfog.topology.ring(4)
    >>> tx = jfog.optimizers.exact_diffusion(optax.sgd(0.5), graph)
    >>> def train(target):
    ...   return jfog.diagnostics.trace(
    ...       tx, lambda x: (x - target)**2 / 2, jnp.zeros([]), 40,
    ...       bytes_per_step=jfog.diagnostics.bytes_per_step(graph, jnp.zeros([])))
    >>> targets = jnp.array([0.0, 1.0, 2.0, 5.0])
    >>> x, _, seen = jfog.simulate(train, 4, out_axes=(0, 0, None))(targets)
    >>> x.round(3)
    Array([2., 2., 2., 2.], dtype=float32)
    >>> print(seen.loss[0], seen.loss[-1].round(2), seen.bytes_per_step[0])
    3.75 1.75 8.0
  """
  comm = resolve(comm)
  for name, value in (("steps", steps), ("every", every)):
    if value < 1:
      raise ValueError(f"trace: {name}={value} must be at least 1.")
  for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
    if jnp.ndim(leaf) == 0 or len(leaf) != steps:
      raise ValueError(
        f"trace: batches{jax.tree_util.keystr(path)} has shape "
        f"{jnp.shape(leaf)}; its axis 0 must have one batch for each of the "
        f"steps={steps}."
      )
  gradient = jax.grad(loss)

  # Values that differ between ranks: shard_map requires the type of a carry of
  # scan to be the same before and after a step.
  def different(tree: Any) -> Any:
    return jax.tree.map(lambda x: varying(jnp.asarray(x), comm), tree)

  def arguments(params: Any, batch: Any) -> tuple[Any, ...]:
    return (params,) if batches is None else (params, batch)

  def record(params: Any, batch: Any) -> Any:
    first = jax.tree.map(lambda x: x[0], batch)
    value = jnp.asarray(loss(*arguments(params, first)))
    distance = None
    if distance_to is not None:
      square = square_distance(params, distance_to)
      distance = jnp.sqrt(allreduce(square, comm=comm))
    return (
      allreduce(value, comm=comm),
      consensus_distance(params, comm=comm),
      distance,
    )

  def advance(params: Any, state: Any, batch: Any, count: int) -> Any:
    def step(carry: Any, batch: Any) -> Any:
      params, state = carry
      updates, state = tx.update(
        gradient(*arguments(params, batch)), state, params
      )
      return different((optax.apply_updates(params, updates), state)), None

    return jax.lax.scan(step, (params, state), batch, length=count)[0]

  params = different(params)
  state = different(tx.init(params) if state is None else state)
  leaves = jax.tree.leaves((params, state, batches))
  counted = comm.is_native and not any(
    isinstance(leaf, jax.core.Tracer) for leaf in leaves
  )
  run = _run_counted if counted else _run_scanned
  params, state, entries, sent = run(
    record, advance, params, state, batches, steps, every, comm
  )
  losses, spreads, distances = entries
  if not counted and comm.backend != "single":
    sent = jnp.nan if bytes_per_step is None else bytes_per_step
  sent = jnp.broadcast_to(jnp.asarray(sent, float), losses.shape)
  step = jnp.arange(0, steps, every, dtype=jnp.int32)
  return params, state, Trace(step, losses, spreads, distances, sent)


def _run_scanned(
  record: Callable[..., Any],
  advance: Callable[..., Any],
  params: Any,
  state: Any,
  batches: Any,
  steps: int,
  every: int,
  comm: Communicator,
) -> Any:
  """Runs all steps in one program, without counters."""
  del comm

  # `every` steps between two entries; the last section may be shorter.
  def section(carry: Any, batch: Any, count: int = every) -> Any:
    entry = record(carry[0], batch)
    return advance(*carry, batch, count), entry

  whole, rest = divmod(steps, every)
  carry, entries = (params, state), []
  if whole:
    stacked = jax.tree.map(
      lambda x: x[: whole * every].reshape(whole, every, *x.shape[1:]), batches
    )
    carry, entry = jax.lax.scan(section, carry, stacked, length=whole)
    entries.append(entry)
  if rest:
    last = jax.tree.map(lambda x: x[whole * every :], batches)
    carry, entry = section(carry, last, rest)
    entries.append(jax.tree.map(lambda x: x[None], entry))
  entries = jax.tree.map(lambda *x: jnp.concatenate(x), *entries)
  return *carry, entries, 0.0


def _run_counted(
  record: Callable[..., Any],
  advance: Callable[..., Any],
  params: Any,
  state: Any,
  batches: Any,
  steps: int,
  every: int,
  comm: Communicator,
) -> Any:
  """Runs one jitted call per entry and reads the counters around the steps."""
  record = jax.jit(record)
  advance = jax.jit(advance, static_argnums=3)
  entries, sent = [], []
  for start in range(0, steps, every):
    batch = jax.tree.map(lambda x, k=start: x[k : k + every], batches)
    count = min(every, steps - start)
    entries.append(record(params, batch))
    before = counters(comm=comm)["bytes_sent"]
    params, state = advance(params, state, batch, count)
    sent.append((counters(comm=comm)["bytes_sent"] - before) / count)
  entries = jax.tree.map(lambda *x: jnp.stack(x), *entries)
  return params, state, entries, allreduce(jnp.asarray(sent), comm=comm)
