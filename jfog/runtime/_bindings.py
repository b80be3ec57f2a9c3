"""Values that a simulation binds while its program is traced, such as missing ranks."""

import itertools
import threading
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from jfog.runtime._communicator import AXIS_NAME, LOCAL_AXIS_NAME

T = TypeVar("T")
_numbers = itertools.count()


class Bindings(threading.local, Generic[T]):
  """The values that the simulations of this thread bind, the innermost last."""

  def __init__(self) -> None:
    self._values: list[T] = []

  @property
  def current(self) -> T | None:
    """The value of the innermost simulation; None if there is none."""
    return self._values[-1] if self._values else None

  def run(self, fun: Callable[[], Any], value: T, marker: str) -> Any:
    """Runs `fun`, in which the value is bound, inside of an axis `marker`.

    The name of a bound axis is part of the key of JAX's caches: a function that is
    jitted inside of `fun` is traced again, and not taken from another simulation.
    """

    def body(_: Any) -> Any:
      self._values.append(value)
      try:
        return fun()
      finally:
        self._values.pop()

    return jax.vmap(body, out_axes=None, axis_name=marker)(jnp.zeros(1))


def new_marker(kind: str) -> str:
  """A name of an axis that was not used before."""
  return f"jfog_{kind}_{next(_numbers)}"


def is_simulated(axes: Collection[str]) -> bool:
  """Whether the axes may be those of `simulate`."""
  return AXIS_NAME in axes or LOCAL_AXIS_NAME in axes
