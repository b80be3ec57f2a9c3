"""Checks of plain arguments, shared by every file of this package."""

import operator
from typing import Any

import numpy as np


def integer(value: Any, name: str, least: int, remedy: str) -> int:
  """Returns `value` as a python int, or says what is wrong with it.

  Args:
    value: what the user passed. NumPy integers are integers, bools are not.
    name: the argument's name, for the message.
    least: the smallest value allowed.
    remedy: the end of the message, what to pass instead.

  Returns:
    The same number as an `int`.

  Raises:
    TypeError: if `value` is no integer.
    ValueError: if `value < least`.

  Example:
    >>> integer(np.int32(4), "size", 1, "pass the number of ranks")
    4
  """
  message = f"{name} must be an integer >= {least}, got {value!r}; {remedy}."
  if isinstance(value, (bool, np.bool_)):
    raise TypeError(message)
  try:
    number = operator.index(value)
  except TypeError:
    raise TypeError(message) from None
  if number < least:
    raise ValueError(message)
  return number


def size(value: Any) -> int:
  """Returns a number of ranks as an `int` that is at least 1.

  Example:
    >>> size(4)
    4
  """
  return integer(value, "size", 1, "pass the number of ranks")


def period(value: Any) -> int:
  """Returns a number of rounds as an `int` that is at least 1.

  Example:
    >>> period(10)
    10
  """
  return integer(value, "period", 1, "pass the number of rounds to draw")


def rank(value: Any, size: int) -> int:
  """Returns a rank as an `int` in `[0, size)`.

  Example:
    >>> rank(np.int64(3), size=4)
    3
  """
  remedy = f"ranks of this graph are 0 to {size - 1}"
  number = integer(value, "rank", 0, remedy)
  if number >= size:
    raise ValueError(f"rank {number} is out of range; {remedy}.")
  return number


def step(value: Any) -> int:
  """Returns the step that indexes a graph: any integer, negative ones too.

  Example:
    >>> step(-1)
    -1
  """
  if not isinstance(value, (bool, np.bool_)):
    try:
      return operator.index(value)
    except TypeError:
      pass
  raise TypeError(
    f"a graph is indexed by an integer step, got {value!r}; every integer is "
    "allowed and taken modulo the period."
  )


def random_state(seed: Any) -> np.random.RandomState:
  """Returns the stream of a seed, equal in every process.

  Example:
    >>> int(random_state(0).randint(10))
    5
  """
  remedy = "pass the same integer below 2**32 on every rank"
  seed = integer(seed, "seed", 0, remedy)
  if seed >= 2**32:
    raise ValueError(f"seed is too large, got {seed}; {remedy}.")
  return np.random.RandomState(seed)
