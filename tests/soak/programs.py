"""Random programs of operations under transformations, and their dense truth.

All ranks draw the same program from its seed. A program has inputs and steps; each
step applies an operation, under a transformation, to an input or to an earlier
result. Several operations may be in flight; ranks wait for them in orders of their
own.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jfog
from soak import operations, values

RUNS = 3  # of each program, on inputs of their own
LOOPS = 3  # of a scan or a while loop
_MOST = 100.0  # larger values do not enter further steps


@dataclasses.dataclass
class Step:
  """One operation under one transformation."""

  operation: operations.Operation
  transformation: str
  source: int  # into inputs and earlier results
  other: operations.Operation | None = None  # the second branch of `cond`

  def __str__(self):
    other = f" or {self.other.name}" if self.other else ""
    return (
      f"{self.transformation} {self.operation.name}{other} of {self.source}"
    )


def applied(step: Step, x: Any, number: Any) -> Any:
  """The result of a step between processes."""
  kind, call = step.transformation, step.operation.call
  if kind == "jit":
    return jax.jit(call)(x, number)
  if kind == "vmap":
    return jax.vmap(lambda x: call(x, number))(x)
  if kind in ("vjp", "remat"):
    fun = lambda x: call(x, number)  # noqa: E731
    fun = jax.checkpoint(fun) if kind == "remat" else fun
    y, pull = jax.vjp(fun, x)
    return pull(y)[0]
  if kind == "jvp":
    twice = jax.tree.map(lambda x: x + x, x)
    return jax.jvp(lambda x: call(x, number), (x,), (twice,))[1]
  if kind == "scan":
    body = lambda x, k: (call(x, number + k), None)  # noqa: E731
    return lax.scan(body, x, jnp.arange(LOOPS, dtype=jnp.int32))[0]
  if kind == "while":
    return lax.while_loop(
      lambda carry: carry[1] < LOOPS,
      lambda carry: (call(carry[0], number + carry[1]), carry[1] + 1),
      (x, jnp.int32(0)),
    )[0]
  if kind == "cond":
    assert step.other is not None
    branches = (
      lambda x: call(x, number),
      lambda x: step.other.call(x, number),  # type: ignore[union-attr]
    )
    return lax.cond(number % 2 == 0, *branches, x)
  assert kind in ("plain", "start")
  return call(x, number)


def _leaf_truth(step, x, number):
  kind, operation = step.transformation, step.operation
  if kind == "vmap":
    rows = [operation.truth(x[:, k], number) for k in range(x.shape[1])]
    return [np.stack([row[r] for row in rows]) for r in range(len(x))]
  if kind in ("vjp", "remat"):
    return operation.squared(x, number)
  if kind == "jvp":
    return operation.truth(x + x, number)
  if kind in ("scan", "while"):
    for k in range(LOOPS):
      x = operation.truth(x, number + k)
    return x
  if kind == "cond" and number % 2:
    return step.other.truth(x, number)
  return operation.truth(x, number)


def truth_of(step: Step, tree: Any, number: int, ranks: int) -> list[Any]:
  """The results of all ranks, from a stacked tree."""
  leaves, structure = jax.tree.flatten(tree)
  found = [_leaf_truth(step, x, number) for x in leaves]
  return [structure.unflatten([x[r] for x in found]) for r in range(ranks)]


class Program:
  """A program of all ranks.

  Args:
    seed: it determines the program and its inputs.
    world: the communicator.
    pause: is called before each operation, where a rank may be late; in a
      jitted program before each run.
  """

  def __init__(
    self,
    seed: tuple[int, ...],
    world: Any,
    pause: Callable[[], None] | None = None,
  ):
    rng = np.random.default_rng(seed)
    self.seed, self.ranks, self.world = seed, world.size, world
    self.pause = pause
    self.x64 = bool(rng.random() < 0.4)
    self.mode = str(rng.choice(["jit", "jit", "jit", "parts", "eager"]))
    self.donates = bool(rng.random() < 0.3) and self.mode == "jit"
    self.awaits = bool(rng.random() < 0.5)  # each run before the next
    self.specs = [
      {
        "inexact": bool(rng.random() < 0.7),
        "x64": self.x64,
        "rows": int(rng.choice([0, 0, 3])),
      }
      for _ in range(rng.integers(1, 4))
    ]
    self.rng = np.random.default_rng([*seed, 1])
    self.numbers = [int(rng.integers(0, 50)) for _ in range(RUNS)]
    self.inputs = [self._inputs() for _ in range(RUNS)]
    self.steps: list[Step] = []
    self.depths = [1] * len(self.specs)
    trees = list(self.inputs[0])
    kinds: list[dict[str, Any] | None] = list(self.specs)
    for _ in range(rng.integers(1, 7)):
      step = self._step(rng, trees, kinds)
      depth = self.depths[step.source] + 1
      if step.transformation in ("scan", "while"):
        depth += LOOPS
      self.steps.append(step)
      self.depths.append(depth)
      by_rank = truth_of(step, trees[step.source], self.numbers[0], self.ranks)
      same = step.operation.kept and step.transformation != "start"
      small = all(values.largest(y) < _MOST for y in by_rank)
      # A result in flight, one of another shape or a large one is the last.
      if same and small and not _is_extreme(by_rank):
        kinds.append(kinds[step.source])
        trees.append(jax.tree.map(lambda *x: np.stack(x), *by_rank))
      else:
        kinds.append(None)
        trees.append(None)

  def __str__(self):
    steps = "; ".join(str(step) for step in self.steps)
    types = "64 bits" if self.x64 else "32 bits"
    return f"{self.mode}, {types}: {steps}"

  @property
  def operations(self):
    """The number of operations of one run."""
    loops = [s.transformation in ("scan", "while") for s in self.steps]
    return sum(LOOPS if loop else 1 for loop in loops)

  def _inputs(self):
    """Inputs of the drawn kinds; in each run the same shapes, other values."""
    shapes = np.random.default_rng([*self.seed, 2])
    trees = [values.tree(shapes, self.ranks, **spec) for spec in self.specs]
    return jax.tree.map(
      lambda x: values.leaf(self.rng, len(x), x.shape[1:], str(x.dtype)), trees
    )

  def _step(self, rng, trees, kinds):
    sources = [k for k, kind in enumerate(kinds) if kind is not None]
    while True:
      source = int(rng.choice(sources))
      kind, leaves = kinds[source], jax.tree.leaves(trees[source])
      operation = operations.draw(rng, self.ranks, self.world)
      if kind["rows"] and rng.random() < 0.1:
        operation = operations.uneven_allgather(rng, self.ranks, self.world)
      if not _accepts(operation, leaves):
        continue
      step = Step(operation, "plain", source)
      choices = ["plain", "plain", "jit"]
      if operation.start is not None:
        choices += ["start", "start"]
      if kind["rows"] and leaves and "lengths" not in operation.name:
        choices += ["vmap"]
      if operation.is_linear and kind["inexact"]:
        choices += ["vjp", "jvp", "remat"]
      if operation.kept:
        choices += ["scan", "while", "cond"]
      step.transformation = str(rng.choice(choices))
      if step.transformation == "cond":
        other = operations.draw(rng, self.ranks, self.world)
        if not (other.kept and _accepts(other, leaves)):
          continue
        step.other = other
      return step

  def call(self, inputs: list[Any], number: Any) -> list[Any]:
    """The results of all steps on this rank."""
    rank = self.world.rank
    pool, open_handles = list(inputs), {}
    own = np.random.default_rng([*self.seed, 3, rank])
    for step in self.steps:
      x = pool[step.source]
      if self.pause is not None and self.mode != "jit":
        self.pause()
      if step.transformation == "start":
        assert step.operation.start is not None
        open_handles[len(pool)] = self._compiled(step.operation.start)(
          x, number
        )
        pool.append(None)
      else:
        one = lambda x, number, step=step: applied(step, x, number)  # noqa: E731
        pool.append(self._compiled(one)(x, number))
    # Work of another length on each rank, beside the operations.
    work = jnp.tanh(jnp.arange(1000.0 * (1 + own.integers(40)))).sum()
    for k in own.permutation(list(open_handles)):
      if self.mode == "eager" and own.random() < 0.3:
        jfog.poll(open_handles[int(k)])
      pool[int(k)] = jfog.wait(open_handles[int(k)])
    return [*pool[len(inputs) :], work]

  def _compiled(self, fun):
    return jax.jit(fun) if self.mode == "parts" else fun

  def run(self) -> list[str]:
    """Runs the program; returns how results differ from the truth."""
    with jax.enable_x64(self.x64), warnings.catch_warnings():
      # Inputs that cannot be donated are copied.
      warnings.filterwarnings("ignore", message="Some donated buffers")
      return self._run()

  def _run(self):
    rank = self.world.rank
    call = self.call
    if self.mode == "jit":
      call = jax.jit(call, donate_argnums=0 if self.donates else ())
    found = []
    for number, stacked in zip(self.numbers, self.inputs, strict=True):
      own = jax.tree.map(lambda x: jnp.asarray(x[rank]), stacked)
      if self.pause is not None and self.mode == "jit":
        self.pause()
      results = call(own, jnp.int32(number))
      if self.awaits:
        jax.block_until_ready(results)
      found.append(results[:-1])
    problems = []
    for run, results in enumerate(found):
      truths = self._truths(run)
      for k, (result, step) in enumerate(zip(results, self.steps, strict=True)):
        depth = self.depths[len(self.specs) + k]
        if text := values.difference(result, truths[k][rank], depth):
          problems.append(f"run {run}, step {k} ({step}): {text}")
    return problems

  def _truths(self, run):
    pool, truths = list(self.inputs[run]), []
    for step in self.steps:
      by_rank = truth_of(step, pool[step.source], self.numbers[run], self.ranks)
      truths.append(by_rank)
      stacked = None
      with contextlib.suppress(ValueError):  # ranks with other shapes
        stacked = jax.tree.map(lambda *x: np.stack(x), *by_rank)
      pool.append(stacked)
    return truths


def _accepts(operation, leaves):
  inexact = all(values.is_inexact(x.dtype) for x in leaves)
  if operation.inexact and not inexact:
    return False
  return not (
    operation.ordered and any(values.is_complex(x.dtype) for x in leaves)
  )


def _is_extreme(trees):
  leaves = [x for x in jax.tree.leaves(trees) if values.is_inexact(x.dtype)]
  return not all(np.isfinite(values.wide(x)).all() for x in leaves)


def run(
  seed: tuple[int, ...],
  world: Any,
  pause: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Runs the program of a seed; returns its line of the report."""
  start = time.monotonic()
  program = Program(seed, world, pause)
  problems = program.run()
  return {
    "name": str(program),
    "operations": program.operations * RUNS,
    "problems": problems,
    "seconds": time.monotonic() - start,
  }
