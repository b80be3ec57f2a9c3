"""Diagnostics: traces of a training, how far ranks are apart, what they sent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jfog import _dtypes, runtime
from jfog.optimizers import Compressor, message_bytes
from jfog.primitives import allreduce, varying
from jfog.runtime import Communicator, MpiCommunicator, resolve
from jfog.topology import ExactAverage, Schedule, Topology


def consensus_distance(
  params: Any, *, comm: Communicator | None = None
) -> jax.Array:
  """The root mean square over ranks of the distance to the average.

  Computes `sqrt(1/n sum_i ||x[i] - xbar||^2)` over all leaves together, with
  `xbar` the average over ranks. Two operations: an average of `params` and one
  of a scalar.

  Args:
    params: a pytree of float or complex arrays.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A float32 scalar (float64 for 64-bit leaves), equal on all ranks; traced
    under a transformation.

  Raises:
    TypeError: for integer or bool leaves.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> jfog.simulate(jfog.diagnostics.consensus_distance, 2)(
    ...     jnp.array([1.0, 3.0]))
    Array([1., 1.], dtype=float32)
  """
  mean = allreduce(params, comm=comm)
  return jnp.sqrt(allreduce(_square_distance(params, mean), comm=comm))


def bytes_per_step(
  graph: Topology | Schedule | ExactAverage,
  x: Any,
  *,
  compressor: Compressor | None = None,
) -> float:
  """The payload bytes that a rank sends in one step of averaging, on average.

  `bytes of x`, or of a message that a compressor makes of it, times the number of
  messages that a rank sends in a step, averaged over ranks and, for a schedule,
  over its period. Static: nothing is sent.

  Args:
    graph: the graph of the averaging.
    x: a pytree of arrays (or of `jax.ShapeDtypeStruct`): what travels, or is
      compressed. Optimizers send float32 for 16-bit parameters.
    compressor: what makes a message of `x`; without one, `x` travels.

  Returns:
    The bytes, a float.

  Raises:
    TypeError: if `graph` is no graph, or `compressor` no `Compressor` or none
      that takes `x`.
    ValueError: if `compressor` refuses `x`.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> graph, x = jfog.topology.ring(8), jnp.zeros(10)
    >>> jfog.diagnostics.bytes_per_step(graph, x)
    80.0
    >>> sign = jfog.optimizers.sign()
    >>> jfog.diagnostics.bytes_per_step(graph, x, compressor=sign)
    12.0
  """
  if compressor is None:
    size = sum(
      leaf.size * jnp.dtype(leaf.dtype).itemsize
      for leaf in jax.tree.leaves(jax.eval_shape(lambda: x))
    )
  else:
    size = message_bytes(compressor, x)
  if isinstance(graph, ExactAverage):
    return float(size) if graph.size > 1 else 0.0
  if not isinstance(graph, (Topology, Schedule)):
    raise TypeError(f"bytes_per_step: {graph!r} is no graph of jfog.topology.")
  messages = sum(
    len(topology.out_neighbors(rank))
    for topology in graph.rounds
    for rank in range(graph.size)
  )
  return size * messages / (graph.size * len(graph))


class Trace(NamedTuple):
  """What `trace` has recorded; the entries are equal on all ranks.

  Entry `r` is of step `k = step[r]`: loss and distances are those of the
  parameters that this step starts from, `x[i]` on rank `i`, and the bytes those of
  the steps from this one to the next entry: `jnp.cumsum(bytes_per_step) * every`
  is what a rank has sent when entry `r + 1` is taken.
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
  """Trains for a number of steps and records how it goes.

  A step on rank `i` is that of any training with optax,

      g = gradient of loss(x[i], batch k)
      u, state = tx.update(g, state, x[i])
      x[i] <- x[i] + u

  and before each `every`-th step the trace notes, with averages over ranks,

      loss                 1/n sum_i loss(x[i], batch k)
      consensus distance   sqrt(1/n sum_i ||x[i] - xbar||^2)
      distance             sqrt(1/n sum_i ||x[i] - x*||^2), x* = distance_to

  Inside of `jfog.simulate` and `jfog.spmd`, and under any transformation, all
  steps are one `jax.lax.scan`. There nobody counts what is sent, and the trace
  shows the argument `bytes_per_step` instead, such as `bytes_per_step(graph,
  params)` gives. On processes it is a Python loop over jitted steps, `every` in
  one call, and the bytes are counted around the steps: neither the argument nor
  the trace's own averages count. All ranks call it with the same arguments but
  for `params`, `batches`, `state` and what the loss holds.

  Args:
    tx: the optimizer.
    loss: the rank's own loss, `loss(params)`, or `loss(params, batch)` with
      batches, a real scalar.
    params: the rank's parameters, a pytree of float arrays.
    steps: the number of steps.
    batches: what the rank's loss gets besides: a pytree of arrays with axis 0 of
      length `steps`.
    state: the optimizer's state, to go on from; `tx.init(params)` by default.
    every: the number of steps from one record to the next.
    distance_to: a solution, like `params`, to which the distance is recorded.
    bytes_per_step: where nobody counts, the bytes that a rank sends in a step;
      the trace has NaN without.
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    The parameters and the state after the last step, and a `Trace` of
    `ceil(steps / every)` entries. Its bytes are float32 (float64 with x64); on a
    world of one nothing is sent, and they are zero.

  Raises:
    ValueError: if `steps` or `every` is less than 1, or a batch is missing.
    TypeError: for integer or bool leaves of `params`, or a loss that is no real
      scalar.
    NotInitializedError: if there is no communicator.

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

  def different(tree):
    return jax.tree.map(lambda x: varying(jnp.asarray(x), comm), tree)

  def arguments(params, batch):
    return (params,) if batches is None else (params, batch)

  def record(params, batch):
    first = jax.tree.map(lambda x: x[0], batch)
    value = jnp.asarray(loss(*arguments(params, first)))
    distance = None
    if distance_to is not None:
      square = _square_distance(params, distance_to)
      distance = jnp.sqrt(allreduce(square, comm=comm))
    return (
      allreduce(value, comm=comm),
      consensus_distance(params, comm=comm),
      distance,
    )

  def advance(params, state, batch, count):
    def step(carry, batch):
      params, state = carry
      updates, state = tx.update(
        gradient(*arguments(params, batch)), state, params
      )
      return different((optax.apply_updates(params, updates), state)), None

    return jax.lax.scan(step, (params, state), batch, length=count)[0]

  params = different(params)
  state = different(tx.init(params) if state is None else state)
  leaves = jax.tree.leaves((params, state, batches))
  counted = comm.backend in ("mpi", "nccl") and not any(
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


def _run_scanned(record, advance, params, state, batches, steps, every, comm):
  """All steps in one program; nothing is counted."""
  del comm

  def section(carry, batch, count=every):
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


def _run_counted(record, advance, params, state, batches, steps, every, comm):
  """A call of a jitted program for each entry; counts around the steps."""
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


def _square_distance(x: Any, y: Any) -> jax.Array:
  squares = jax.tree.map(
    lambda x, y: jnp.sum(
      jnp.abs(_dtypes.accumulated(x) - _dtypes.accumulated(y)) ** 2
    ),
    x,
    y,
  )
  return sum(jax.tree.leaves(squares), jnp.zeros([]))


def counters(*, comm: Communicator | None = None) -> dict[str, Any]:
  """What this rank has sent and received on a communicator of processes.

  Payload bytes as they travel in neighbor operations, for each peer and in all.
  A collective counts under this rank itself, with the bytes that it contributes
  and gets, for its way through the peers is the MPI library's own. Operations on
  windows count at the rank that calls them: what it writes as sent, what it gets
  as received. Agreements are the comparisons with other ranks before the first use
  of a graph or of a set of peers.

  Args:
    comm: the communicator; by default the one in reach, see `jfog.init`.

  Returns:
    A dict with `bytes_sent`, `bytes_received`, `messages_sent`, `operations` and
    `agreements`, and under `"peers"` a dict from each peer to the first three.

  Raises:
    ValueError: on a mesh, where XLA moves the data and nobody counts.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.diagnostics.counters()["bytes_sent"]
    0
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return {
      "bytes_sent": 0,
      "bytes_received": 0,
      "messages_sent": 0,
      "operations": 0,
      "agreements": 0,
      "peers": {},
    }
  # What is still running has not been counted.
  jax.effects_barrier()
  *columns, (operations, agreements) = runtime.counters(_of_processes(comm))
  names = ("bytes_sent", "bytes_received", "messages_sent")
  totals = {
    name: sum(column) for name, column in zip(names, columns, strict=True)
  }
  peers = {
    peer: dict(zip(names, row, strict=True))
    for peer, row in enumerate(zip(*columns, strict=True))
    if any(row)
  }
  return {
    **totals,
    "operations": operations,
    "agreements": agreements,
    "peers": peers,
  }


def reset_counters(*, comm: Communicator | None = None) -> None:
  """Sets the counters of a communicator to zero.

  Raises:
    ValueError: on a mesh, which has none.
    NotInitializedError: if there is no communicator.

  Example:
    >>> import jfog
    >>> comm = jfog.init(backend="single")
    >>> jfog.diagnostics.reset_counters()
  """
  comm = resolve(comm)
  if comm.backend == "single":
    return
  jax.effects_barrier()
  runtime.reset_counters(_of_processes(comm))


def _of_processes(comm: Communicator) -> MpiCommunicator:
  if not isinstance(comm, MpiCommunicator):
    raise ValueError(
      "a mesh has no counters, because XLA moves its data; use "
      "jfog.diagnostics.bytes_per_step."
    )
  return comm
