"""Eager calls between processes, as calls of jitted functions that are kept."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jfog import _compat
from jfog.primitives import _places
from jfog.runtime import Communicator, ProcessCommunicator, world
from jfog.topology import ExactAverage, Schedule, Topology

# From the type of an argument to the function that turns it into arrays.
Pack = dict[type, Callable[[Any, Communicator], Any]]

# Types of arguments that `with_eager_form` makes static: they are hashable, and
# few values of them occur in one program.
_STATIC = {Topology, Schedule, ExactAverage, str, bool, type(None)}
# Weights that are numbers are static where their values choose the form of the
# sum, and so are the ranks in a dict of weights. A program usually has few of
# them; one that computes them anew for each call would compile each of these calls.
_NUMBERS = {int, float}
_MOST_STATIC_WEIGHTS = 16
_EDGE_WEIGHTS = ("weights", "dst_weights", "src_weights")


def with_eager_form(
  prepare: Callable[..., Any],
  run: Callable[..., Any],
  pack: Pack,
) -> Callable[..., Any]:
  """`run`, whose eager calls between processes are calls of a jitted function.

  Called eagerly, `run` costs some 0.3 ms of Python: it checks its arguments and
  looks up what they mean. The jitted form does so once for each structure,
  shapes and dtypes of `x` and each graph, and then costs what JAX costs. Its
  traced arguments are `x`, a window, a step, a root, a peer, weights that are
  arrays, all weights of windows and what `pack` makes; where another argument is
  not static, `run` itself is called.
  """
  names = tuple(inspect.signature(prepare).parameters)[1:]
  run.__name__ = prepare.__name__  # of the programs in profiles
  of_window = "comm" not in names
  static_weights: set[tuple[Any, ...]] = set()  # of earlier calls

  def has_few_weights(given: dict[str, Any], traced: dict[str, Any]) -> bool:
    found = (
      *(x for x in given.values() if type(x) in _NUMBERS),
      *(tuple(x) for x in traced.values() if type(x) is dict),
    )
    if found and found not in static_weights:
      if len(static_weights) == _MOST_STATIC_WEIGHTS:
        return False
      static_weights.add(found)
    return True

  @functools.wraps(prepare)
  def call(*args: Any, **kwargs: Any) -> Any:
    if args and len(args) <= 1 + len(names) and _compat.at_top_level():
      given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
      if not of_window:
        comm = given.pop("comm", None) or world()
        call_comm = {"comm": comm}
      else:  # that of the window, unless it was freed: the flag is not traced
        is_freed = getattr(args[0], "_freed", True)
        comm, call_comm = None if is_freed else args[0].comm, {}
      if (
        isinstance(comm, ProcessCommunicator)
        and (traced := _take_traced(given, comm, pack, of_window)) is not None
        and _are_static(given)
        and has_few_weights(given, traced)
      ):
        # With types, for 1, 1.0 and True are equal.
        static = {**call_comm, **given}
        _places.record_eager(prepare.__name__, args[0])
        try:
          jitted = _jitted(run, *((k, v, type(v)) for k, v in static.items()))
          return jitted(args[0], traced)
        except (TypeError, ValueError, OverflowError):
          # Raised while it is traced, so nothing is sent. Called eagerly, `run`
          # knows the values, and so the better text of the same error.
          pass
    return run(*args, **kwargs)

  call.pack = pack  # type: ignore[attr-defined]
  return call


def _take_traced(
  given: dict[str, Any],
  comm: ProcessCommunicator,
  pack: Pack,
  of_window: bool,
) -> dict[str, Any] | None:
  """Takes the traced arguments out of the given ones; None if one is refused."""
  traced = {}
  for name, value in list(given.items()):
    if type(value) in pack:
      traced[name] = pack[type(value)](given.pop(name), comm)
    elif "weight" in name and _is_traceable(value, name, of_window):
      traced[name] = given.pop(name)
  if (step := given.pop("step", None)) is not None:
    if type(step) is int:
      graph = given.get("graph", given.get("machine_graph"))
      if not isinstance(graph, (Topology, Schedule)):
        return None
      step = np.int32(step % len(graph))
    elif not isinstance(step, jax.Array):
      return None
    traced["step"] = step
  # A known rank is checked here: a traced one is refused when the operation runs.
  for name in ("root", "peer") if comm.backend == "mpi" else ():
    if name in given:
      rank = given.pop(name)
      if type(rank) is not int or not 0 <= rank < comm.size:
        return None
      traced[name] = np.int32(rank)
  if "x" in given:  # of a window, which is the first argument
    traced["x"] = given.pop("x")
  return traced


def _is_traceable(value: Any, name: str, of_window: bool) -> bool:
  """Whether the value of a weight is but an operand of the program."""
  if isinstance(value, jax.Array):
    return True
  if isinstance(value, np.ndarray):
    return name in _EDGE_WEIGHTS
  if not of_window:
    return False
  if type(value) is dict:
    return {int}.issuperset(map(type, value)) and all(
      type(x) in _NUMBERS or isinstance(x, (jax.Array, np.number))
      for x in value.values()
    )
  return type(value) in _NUMBERS or isinstance(value, np.number)


def _are_static(given: dict[str, Any]) -> bool:
  """Whether the other arguments can be static; a list of sizes is made a tuple."""
  sizes = given.get("axis_sizes")
  if isinstance(sizes, (list, tuple)):
    given["axis_sizes"] = sizes = tuple(sizes)
    if not {int}.issuperset(map(type, sizes)):
      return False
  elif sizes is not None:
    return False
  return all(
    type(value) in _STATIC or type(value) in _NUMBERS or name == "axis_sizes"
    for name, value in given.items()
  )


@functools.lru_cache(maxsize=1024)
def _jitted(
  run: Callable[..., Any], *given: tuple[str, Any, type]
) -> Callable[..., Any]:
  """The jitted form of `run` for these static arguments."""
  static = {name: value for name, value, _ in given}

  def eager(x: Any, traced: dict[str, Any]) -> Any:
    return run(x, **static, **traced)

  eager.__name__ = run.__name__
  return jax.jit(eager)


os.register_at_fork(after_in_child=_jitted.cache_clear)  # as in _lowering.py
