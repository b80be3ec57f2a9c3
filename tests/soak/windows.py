"""Random programs on windows, against a dense model of the slots of all ranks.

Barriers between the operations make their order one that the model knows; mutexes
are checked by a count that only exclusive access keeps right.
"""

import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support.windows import Model

import jfog
from soak import graphs

RUNS = 2  # of each program, one after the other on the same window
ROUNDING = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3}
SHAPES = ((), (3,), (0,), (2, 3), (1000,), (15_361,), (70_001,))
KINDS = (
  *("put", "put", "accumulate", "get", "get"),
  *("update", "update", "update of some", "reset", "collect", "look"),
)
LOCKS = 3  # of each rank, in a program with a mutex


class WindowProgram:
  """A window and a sequence of operations on it, the same on all ranks.

  Args:
    seed: it determines the program and its values.
    world: the communicator.
    pause: is called before each operation outside of `jit`, where a rank may be
      late.
  """

  def __init__(
    self,
    seed: tuple[int, ...],
    world: Any,
    pause: Callable[[], None] | None = None,
  ):
    rng = np.random.default_rng(seed)
    self.pause = pause or (lambda: None)
    self.world, n = world, world.size
    self.dtype = str(rng.choice(list(ROUNDING)))
    self.mode = str(rng.choice(["jit", "parts", "eager"]))
    self.graph = graphs.random_topology(rng, n)
    self.zero_init = bool(rng.random() < 0.5)
    self.locks = bool(rng.random() < 0.4)
    self.folder = os.environ["JFOG_SOAK_FOLDER"]
    count = rng.choice([1, 1, 2, 3])
    self.shapes = [SHAPES[rng.integers(len(SHAPES))] for _ in range(count)]
    self.sizes = [int(np.prod(shape)) for shape in self.shapes]
    self.name = "-".join(map(str, seed))
    self.x = self._values(rng)
    self.kinds = [str(rng.choice(KINDS)) for _ in range(rng.integers(2, 9))]
    self.starts = [
      bool(rng.random() < 0.3) and kind in ("put", "accumulate", "get")
      for kind in self.kinds
    ]
    self.noise = [self._values(rng) for _ in self.kinds]
    # Slots accumulate: weights that sum to less than 1 keep values small.
    self.weights = rng.integers(0, 5, (len(self.kinds), n, n)) / (4 * n)
    self.own = rng.integers(0, 5, (len(self.kinds), n)) / 8
    self.some = rng.random((len(self.kinds), n)) < 0.6
    self.plain = [bool(rng.random() < 0.3) for _ in self.kinds]

  def __str__(self):
    kinds = ", ".join(
      kind + (" started" if starts else "")
      for kind, starts in zip(self.kinds, self.starts, strict=True)
    )
    locks = ", mutex" if self.locks else ""
    return f"{self.mode}, {self.dtype}, {self.graph!r}: {kinds}{locks}"

  def _values(self, rng):
    """One row for each rank."""
    shape = self.world.size, sum(self.sizes)
    return (rng.integers(-8, 9, shape) / 4).astype(self.dtype)

  def tree(self, row):
    """The leaves of a row."""
    ends = np.cumsum(self.sizes)[:-1]
    parts = np.split(np.asarray(row), ends)
    return {
      f"leaf{k}": jnp.asarray(part.reshape(shape))
      for k, (part, shape) in enumerate(zip(parts, self.shapes, strict=True))
    }

  def row(self, tree):
    """A row of leaves."""
    leaves = [np.asarray(tree[f"leaf{k}"]) for k in range(len(self.shapes))]
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])

  def _chosen(self, k, ends, weights):
    """A dict of the weights of those neighbors that take part."""
    return {r: weights[r] for r in ends if self.some[k, r]}

  def operate(self, k, win, x, noise):
    """Operation k on this rank; with a barrier on both sides it is in order."""
    rank, kind, graph = self.world.rank, self.kinds[k], self.graph
    x = jax.tree.map(jnp.add, x, noise)
    if kind in ("put", "accumulate", "get"):
      ends, weights = graph.out_neighbors(rank), self.weights[k, :, rank]
      arguments = (win, x)
      if kind == "get":
        ends, weights = graph.in_neighbors(rank), self.weights[k, rank]
        arguments = (win,)
      key = "src_weights" if kind == "get" else "dst_weights"
      given = {key: self._chosen(k, ends, weights)}
      if self.plain[k]:
        given = {key: 0.25}
      if self.starts[k]:
        start = getattr(jfog, f"win_{kind}_start")
        win = jfog.wait(start(*arguments, **given))
      else:
        win = getattr(jfog, f"win_{kind}")(*arguments, **given)
    elif kind == "update":
      x, win = jfog.win_update(win, x)
    elif kind == "collect":
      x, win = jfog.win_update_then_collect(win, x)
    elif kind == "look":
      _, win = jfog.win_update(win, x, self_weight=1, src_weights={})
    else:
      chosen = self._chosen(k, graph.in_neighbors(rank), self.weights[k, rank])
      x, win = jfog.win_update(
        win,
        x,
        self_weight=self.own[k, rank],
        src_weights=chosen,
        reset=kind == "reset",
      )
    jfog.barrier()
    seen = jfog.win_associated_p(win), jfog.win_version(win)
    jfog.barrier()
    return x, win, seen

  def model(self, k, model, x, noise):
    """Operation k of all ranks."""
    kind, n = self.kinds[k], len(x)
    x = x + noise.astype(float)
    weights, some = self.weights[k], self.some[k]
    if self.plain[k]:
      weights, some = np.full((n, n), 0.25), np.ones(n, bool)
    if kind in ("put", "accumulate"):
      model.send(x, weights, kind == "accumulate", some)
    elif kind == "get":
      model.get(weights, some)
    elif kind == "update":
      matrix = graphs.dense(self.graph)
      x = model.update(x, matrix.diagonal(), matrix)
    elif kind == "collect":
      x = model.update(x, np.ones(n), np.ones((n, n)), reset=True)
    elif kind == "look":
      model.update(x, np.ones(n), weights, False)
    else:
      reset = kind == "reset"
      x = model.update(
        x, self.own[k], self.weights[k], self.some[k], reset=reset
      )
    return x

  def run(self) -> list[str]:
    """Runs the program; returns how results differ from the model."""
    rank, dtype = self.world.rank, self.dtype
    win = jfog.win_create(
      self.tree(self.x[rank]),
      self.graph,
      zero_init=self.zero_init,
      associated_p=True,
    )
    model = Model(self.graph, self.x, self.zero_init)
    x, truth, problems = self.tree(self.x[rank]), self.x.astype(float), []
    noise = [self.tree(each[rank]) for each in self.noise]
    steps = range(len(self.kinds))

    def whole(win, x, noise):
      found = []
      for k in steps:
        x, win, seen = self.operate(k, win, x, noise[k])
        found.append((x, seen))
      return win, found

    operate = self.operate
    if self.mode == "parts":
      operate = jax.jit(operate, static_argnums=0)
    if self.mode == "jit":
      whole = jax.jit(whole)
    for run in range(RUNS):
      if self.mode == "parts":
        found = []
        for k in steps:
          self.pause()
          x, win, seen = operate(k, win, x, noise[k])
          found.append((x, seen))
      else:
        self.pause()
        win, found = whole(win, x, noise)
        x = found[-1][0]
      scale = 1.0
      for k, (y, (p, versions)) in enumerate(found):
        truth = self.model(k, model, truth, self.noise[k])
        scale = max(scale, np.abs(truth).max(initial=0), model.p.max())
        bound = ROUNDING[dtype] * scale * (k + 1) * (run + 1)
        where = f"run {run}, operation {k} ({self.kinds[k]})"
        wrong = ~(np.abs(self.row(y) - truth[rank]) <= bound)
        if wrong.any():
          at = int(np.argmax(wrong))
          problems.append(
            f"{where}: {wrong.sum()} of {wrong.size} elements are wrong, at {at} "
            f"{self.row(y)[at]} instead of {truth[rank][at]}"
          )
        if not abs(p - model.p[rank]) <= bound:
          problems.append(f"{where}: p is {p} instead of {model.p[rank]}")
        if not np.array_equal(versions, model.versions[rank]):
          problems.append(
            f"{where}: versions {versions} instead of {model.versions[rank]}"
          )
    if self.locks:
      problems += self._count(win)
    jfog.barrier()
    jfog.win_free(win)
    return problems

  def _count(self, win):
    """Increments a count in a file, which the mutex alone protects."""
    path = pathlib.Path(self.folder, "own", f"count-{self.name}")
    if self.world.rank == 0:
      path.write_text("0")
    jfog.barrier()
    jax.effects_barrier()
    for k in range(LOCKS):
      with jfog.win_mutex(win, [0] if k % 2 else None):
        count = int(path.read_text())
        time.sleep(0.001)
        path.write_text(str(count + 1))
    jfog.barrier()
    jax.effects_barrier()
    count, truth = int(path.read_text()), LOCKS * self.world.size
    if count != truth:
      return [f"the mutex let two ranks in: {count} instead of {truth}"]
    return []


def run(
  seed: tuple[int, ...],
  world: Any,
  pause: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Runs the program of a seed; returns its line of the report."""
  start = time.monotonic()
  program = WindowProgram(seed, world, pause)
  with jax.enable_x64(program.dtype == "float64"):
    problems = program.run()
  return {
    "name": str(program),
    "operations": len(program.kinds) * RUNS,
    "problems": problems,
    "seconds": time.monotonic() - start,
  }
