"""Checks of plain arguments: integers, ranks, scalars, fractions and seeds.

Every check returns the argument as a plain Python value. Its error names the
value and the remedy; an operation passes `label="broadcast: root"` to have its
own name in front.
"""

import operator
import reprlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def integer(value: Any, name: str, least: int, remedy: str) -> int:
  """Returns `value` as an `int` that is at least `least`.

  Args:
    value: the argument. NumPy integers are integers, bools are not.
    name: the argument's name, for the message.
    least: the smallest value allowed.
    remedy: the end of the message: the value to pass instead.

  Returns:
    The same number as an `int`.

  Raises:
    TypeError: if `value` is not an integer.
    ValueError: if `value < least`.

  Example:
    >>> integer(np.int32(4), "size", 1, "pass the number of ranks")
    4
  """
  message = f"{name} must be an integer >= {least}, got {value!r}; {remedy}."
  if not is_integer(value):
    raise TypeError(message)
  if operator.index(value) < least:
    raise ValueError(message)
  return operator.index(value)


def is_integer(value: Any) -> bool:
  """Whether `value` is an integer known to Python: not a bool, not traced.

  Example:
    >>> is_integer(np.int64(3)), is_integer(True), is_integer(3.0)
    (True, False, False)
  """
  if isinstance(value, (bool, np.bool_)):
    return False
  try:
    operator.index(value)
  except TypeError:  # JAX's error for a tracer is a TypeError, too
    return False
  return True


def as_int(value: Any, label: str) -> int:
  """Returns any integer, negative ones included, as an `int`.

  Raises:
    TypeError: if `value` is not a Python or NumPy integer.

  Example:
    >>> as_int(np.int32(-1), "topology: step")
    -1
  """
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{label}={value!r} must be an int.")
  return int(value)


def positive(value: Any, label: str) -> int:
  """Returns a count as an `int` that is at least 1.

  Raises:
    TypeError: if `value` is not a Python or NumPy integer.
    ValueError: if `value < 1`.

  Example:
    >>> positive(3, "periodic_averaging: every")
    3
  """
  number = as_int(value, label)
  if number < 1:
    raise ValueError(f"{label}={number} must be at least 1.")
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
  """Returns a rank of a graph as an `int` in `[0, size)`.

  Example:
    >>> rank(np.int64(3), size=4)
    3
  """
  remedy = f"ranks of this graph are 0 to {size - 1}"
  number = integer(value, "rank", 0, remedy)
  if number >= size:
    raise ValueError(f"rank {number} is out of range; {remedy}.")
  return number


def rank_of_comm(value: Any, size: int, label: str) -> int:
  """Returns a rank of a communicator of `size` ranks as an `int`.

  Raises:
    TypeError: if `value` is not a Python or NumPy integer.
    ValueError: if it is outside of `[0, size)`.

  Example:
    >>> rank_of_comm(3, 4, "broadcast: root")
    3
  """
  number = as_int(value, label)
  if not 0 <= number < size:
    raise ValueError(
      f"{label}={number} is out of range for a communicator of size {size}; "
      f"pass a rank from 0 to {size - 1}."
    )
  return number


def step(value: Any) -> int:
  """Returns the step that indexes a graph: any integer, negative ones too.

  Example:
    >>> step(-1)
    -1
  """
  if not is_integer(value):
    raise TypeError(
      f"a graph is indexed by an integer step, got {value!r}; every integer is "
      "allowed and taken modulo the period."
    )
  return operator.index(value)


def is_scalar(value: Any) -> bool:
  """Whether `value` is a real number: of Python or NumPy, or a 0-d array.

  Traced scalars count, bools and complex numbers do not.

  Example:
    >>> is_scalar(jnp.float32(0.5)), is_scalar(1j), is_scalar(np.ones(2))
    (True, False, False)
  """
  if isinstance(value, (bool, np.bool_)):
    return False
  if isinstance(value, (np.ndarray, jax.Array)):
    real = jnp.issubdtype(value.dtype, jnp.number)
    return value.shape == () and real and not jnp.iscomplexobj(value)
  return isinstance(value, (int, float, np.integer, np.floating))


def fraction(value: Any, label: str) -> Any:
  """Returns a number in (0, 1] as it is; the range of a traced one is open.

  Raises:
    TypeError: if `value` is not a real scalar.
    ValueError: if it is outside of (0, 1].

  Example:
    >>> fraction(0.01, "top_k: fraction")
    0.01
  """
  if not is_scalar(value):
    raise TypeError(f"{label}={value!r} must be a number in (0, 1].")
  if not isinstance(value, jax.core.Tracer) and not 0 < value <= 1:
    raise ValueError(f"{label}={value} must be in (0, 1].")
  return value


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


def unlike_graph(
  value: Any, label: str, kinds: str = "Topology or Schedule"
) -> str:
  """Describes a value that is not a graph, and how to make one of it.

  Example:
    >>> unlike_graph(np.ones(1), "graph")
    'graph=array([1.]) is ndarray; pass a jfog.topology.Topology or Schedule, here jfog.topology.Topology(W)'
  """
  remedy = "made for example by jfog.topology.ring(size)"
  if isinstance(value, (np.ndarray, jax.Array)):
    remedy = "here jfog.topology.Topology(W)"
  elif type(value).__module__.startswith("networkx."):
    remedy = "here jfog.topology.from_networkx(graph)"
  return (
    f"{label}={reprlib.repr(value)} is {type(value).__name__}; pass a "
    f"jfog.topology.{kinds}, {remedy}"
  )


def other_size(graph_size: int, size: int, label: str) -> str:
  """Describes a graph that does not fit a communicator of `size` ranks.

  Example:
    >>> other_size(3, 4, "f")
    'f: the graph has 3 ranks, the communicator has 4; make the graph with size=4.'
  """
  remedy = f"make the graph with size={size}."
  if size == 1:
    remedy = (
      f"run {graph_size} ranks, by jfog.simulate(fun, {graph_size}) or "
      f"`jfog run -np {graph_size}`, or {remedy}"
    )
  return (
    f"{label}: the graph has {graph_size} ranks, the communicator has {size}; "
    f"{remedy}"
  )
