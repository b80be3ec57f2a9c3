"""Ranks that disagree on an operation: all of them get an error, none a wrong number.

Each case opens a world, lets one rank do something else in one operation, and ends
the world again, so that one job runs many of them.
"""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfog
from jfog import topology

TIMEOUT = 6.0  # of operations, in seconds
SLOW = TIMEOUT + 20.0  # seconds, after which an error is late
_STATUS = re.compile(
  r"(FAILED_PRECONDITION|ABORTED|DEADLINE_EXCEEDED|INVALID_ARGUMENT).*jfog"
)


def _average(x, graph):
  return jax.jit(lambda x: jfog.neighbor_allreduce(x, graph))(x)


def _nothing(x, world):
  return None


def _kinds(ranks, length):
  """By name what all ranks do, and what one of them does instead."""
  ring = topology.ring(ranks)
  schedule = topology.one_peer_exponential(ranks)
  average = lambda x, world: _average(x, ring)  # noqa: E731
  total = lambda x, world: jfog.allreduce(x, "sum")  # noqa: E731
  kinds = {
    "skips an average": (average, _nothing),
    "skips an allreduce": (total, _nothing),
    "averages once more": (_nothing, average),
    "has another length": (
      average,
      lambda x, world: _average(jnp.append(x, 1), ring),
    ),
    "has another long length": (
      average,
      lambda x, world: _average(jnp.ones(100_000), ring),
    ),
    "has another dtype": (
      average,
      lambda x, world: _average(x.astype(jnp.float16), ring),
    ),
    "has another leaf": (
      average,
      lambda x, world: _average((x, x), ring),
    ),
    "has other weights": (
      average,
      lambda x, world: _average(x, ring.lazy()),
    ),
    "reduces instead": (average, total),
    "averages instead": (total, average),
    "takes the maximum": (total, lambda x, world: jfog.allreduce(x, "max")),
    "has another root": (
      lambda x, world: jfog.broadcast(x, 0),
      lambda x, world: jfog.broadcast(x, 1),
    ),
    "gathers another dtype": (
      lambda x, world: jfog.allgather(x),
      lambda x, world: jfog.allgather(x.astype(jnp.int32)),
    ),
    "starts another length": (
      lambda x, world: jfog.wait(jfog.neighbor_allreduce_start(x, ring)),
      lambda x, world: jfog.wait(
        jfog.neighbor_allreduce_start(jnp.append(x, 1), ring)
      ),
    ),
    "names another peer": (
      lambda x, world: jfog.neighbor_allreduce(x, _around(world, 1)),
      lambda x, world: jfog.neighbor_allreduce(x, jfog.Peers(1.0, {}, [])),
    ),
    "makes another window": (
      lambda x, world: jfog.win_create(x, ring),
      lambda x, world: jfog.win_create(jnp.append(x, 1), ring),
    ),
  }
  if len(schedule) > 1:
    kinds["is in another step"] = (
      lambda x, world: jfog.neighbor_allreduce(x, schedule, 0),
      lambda x, world: jfog.neighbor_allreduce(x, schedule, 1),
    )
  del length
  return kinds


def _around(world, shift):
  """Peers of a directed ring."""
  n, rank = world.size, world.rank
  return jfog.Peers(0.5, {(rank - shift) % n: 0.5}, [(rank + shift) % n])


def _truth(kind, ranks, length):
  """The results of the common operation, by rank; None where it has none."""
  own = np.arange(ranks, dtype=float)
  ring = topology.ring(ranks).mixing_matrix
  if kind in ("skips an allreduce", "averages instead", "takes the maximum"):
    return np.full(ranks, own.sum())
  if kind in ("has another root",):
    return np.zeros(ranks)
  if kind == "names another peer":
    return 0.5 * own + 0.5 * np.roll(own, 1)
  if kind.startswith(("skips", "has", "reduces", "starts")):
    return ring @ own
  return None


def run(seed: tuple[int, ...]) -> dict[str, Any]:
  """Runs one case on this rank; returns its line of the report."""
  start = time.monotonic()
  rng = np.random.default_rng(seed)
  world = jfog.init(timeout=TIMEOUT)
  rank, ranks = world.rank, world.size
  length = int(rng.choice([3, 3, 40_000]))
  kinds = _kinds(ranks, length)
  kind = str(rng.choice(list(kinds)))
  victim = int(rng.integers(ranks))
  common, other = kinds[kind]
  problems, texts = [], []
  jfog.barrier()
  x = jnp.full(length, float(rank))
  began = time.monotonic()
  try:
    operation = other if rank == victim else common
    y = jax.block_until_ready(operation(x, world))
    truth = _truth(kind, ranks, length)
    if rank == victim or not isinstance(y, jax.Array):
      truth = None
    if (
      truth is not None and not np.abs(np.asarray(y) - truth[rank]).max() < 1e-4
    ):
      problems.append(f"a wrong number: {y} instead of {truth[rank]}")
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    texts.append(str(error))
  try:
    jax.block_until_ready(jfog.barrier())
    jax.effects_barrier()
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    texts.append(str(error))
  took = time.monotonic() - began
  if not texts:
    problems.append(
      "no error, neither in the operation nor in the next barrier"
    )
  problems += [
    f"an error of another form: {text}"
    for text in texts
    if not _STATUS.search(text.replace("\n", " "))
  ]
  if took > SLOW:
    problems.append(f"the error came after {took:.1f} s")
  jfog.shutdown()
  return {
    "name": f"rank {victim} of {ranks} {kind}, {length} elements",
    "victim": victim,
    "texts": texts,
    "operations": 3,
    "problems": problems,
    "seconds": time.monotonic() - start,
  }
