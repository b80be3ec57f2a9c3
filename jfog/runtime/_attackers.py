"""Ranks of a simulation that send something other than what they hold."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfog import _validation
from jfog.runtime import _presence
from jfog.runtime._bindings import Bindings, new_marker


class Message(NamedTuple):
  """Knowledge of an attack when it chooses one leaf of one message.

  Attributes:
    values: what all ranks hold, along axis 0; floats of at most 16 bits are
      widened to float32.
    honest: bools of shape `(size,)`, the ranks that take part and do not attack.
    sender: the attacking rank, a traced integer.
    receiver: the rank that the message goes to, a traced integer.
    weights: of shape `(size,)`, the receiver's weights of what arrives from each
      rank: its row of the mixing matrix without its own entry; 0 where there is
      no edge.
    attackers: the number of attacking ranks.
    leaf: the number of the leaf in the message.
  """

  values: jax.Array
  honest: jax.Array
  sender: jax.Array
  receiver: jax.Array
  weights: jax.Array
  attackers: int
  leaf: int


@dataclasses.dataclass(frozen=True)
class Attack:
  """A rule for what an attacking rank sends, for `jfog.simulate(attackers=...)`.

  Attributes:
    name: for its repr, and so for the labels of a table.
    send: from a `Message` to the array that is sent, of the shape of one rank's
      value. It is traced, and may close over traced numbers.

  Raises:
    TypeError: if `send` is not callable.

  Example:
    >>> import jax.numpy as jnp, jfog
    >>> zero = jfog.attacks.Attack("zero", lambda m: jnp.zeros(m.values.shape[1:]))
    >>> graph = jfog.topology.fully_connected(2)
    >>> average = lambda x: jfog.neighbor_allreduce(x, graph)
    >>> jfog.simulate(average, 2, attackers={1: zero})(jnp.array([2.0, 6.0]))
    Array([1., 4.], dtype=float32)
  """

  name: str
  send: Callable[[Message], Any]

  def __post_init__(self) -> None:
    if not callable(self.send):
      raise TypeError(
        f"Attack: send={self.send!r} is {type(self.send).__name__}; pass a function "
        f"from a jfog.attacks.Message to the array that is sent."
      )

  def __repr__(self) -> str:
    return self.name


class Attackers:
  """The attacking ranks of one simulation.

  Attributes:
    size: the number of ranks.
    ranks: from each attack to its ranks.
    marker: the name of an axis, different for each simulation.
  """

  def __init__(self, given: Mapping[int, Attack], size: int):
    self.size = size
    self.marker = new_marker("attackers")
    self.ranks: dict[Attack, list[int]] = {}
    for rank, attack in sorted(given.items()):
      self.ranks.setdefault(attack, []).append(rank)

  @property
  def count(self) -> int:
    """The number of attacking ranks."""
    return sum(map(len, self.ranks.values()))

  def honest(self) -> jax.Array:
    """The ranks that take part and do not attack."""
    honest = np.ones(self.size, np.bool_)
    for ranks in self.ranks.values():
      honest[ranks] = False
    present = _presence.current()
    return jnp.asarray(honest) if present is None else present.ranks & honest


_bindings = Bindings[Attackers]()


def checked(attackers: Any, size: int) -> Attackers | None:
  """The argument of `simulate`; None without attackers.

  Raises:
    TypeError: if it is not a dict from ints to attacks.
    ValueError: if a rank is out of range, or all ranks attack.
  """
  if attackers is None:
    return None
  if not isinstance(attackers, Mapping):
    raise TypeError(
      f"simulate: attackers={attackers!r} is {type(attackers).__name__}; pass a "
      f"dict from ranks to attacks, such as {{3: jfog.attacks.sign_flip()}}."
    )
  given = {}
  for rank, attack in attackers.items():
    rank = _validation.rank_of_comm(rank, size, "simulate: attackers: rank")
    if not isinstance(attack, Attack):
      raise TypeError(
        f"simulate: attackers[{rank}]={attack!r} is {type(attack).__name__}, not "
        f"an attack; pass the result of a function of jfog.attacks, such as "
        f"jfog.attacks.sign_flip()."
      )
    given[rank] = attack
  if len(given) == size:
    raise ValueError(
      f"simulate: attackers names all {size} ranks; leave at least one honest rank."
    )
  return Attackers(given, size) if given else None


def run(fun: Callable[[], Any], attackers: Attackers) -> Any:
  """Runs `fun` with attackers."""
  return _bindings.run(fun, attackers, attackers.marker)


def has_attackers() -> bool:
  """Whether this thread traces a simulation with attackers."""
  return _bindings.current is not None


def refuse_with_attackers(name: str) -> None:
  """Refuses an operation in a simulation with attackers.

  Raises:
    ValueError: naming the operation.
  """
  if _bindings.current is not None:
    raise ValueError(
      f"{name}: simulate has attackers=, and what they send is defined in "
      f"neighbor_allreduce and neighbor_allgather only; call {name} outside, or "
      f"without them."
    )


def sent(
  gathered: jax.Array,
  receiver: Any,
  weights: Callable[[], Any],
  leaf: int,
  name: str,
) -> jax.Array:
  """The values that all ranks send of one leaf, from those that they hold.

  Args:
    gathered: what they hold, along axis 0.
    receiver: the rank that receives.
    weights: computes its weights of all ranks.
    leaf: the number of the leaf.
    name: of the operation, for error texts.

  Raises:
    TypeError: for integer and bool leaves.
    ValueError: if the ranks are not those of the simulation, or an attack returns
      an array of another shape.
  """
  attackers = _bindings.current
  if attackers is None:
    return gathered
  if len(gathered) != attackers.size:
    raise ValueError(
      f"{name}: simulate has attackers= among {attackers.size} ranks, and this "
      f"communicator has {len(gathered)}; use the default one."
    )
  if not jnp.issubdtype(gathered.dtype, jnp.inexact):
    raise TypeError(
      f"{name}: simulate has attackers=, and leaf {leaf} has dtype "
      f"{gathered.dtype}; attacks are defined for floating-point and complex "
      f"leaves."
    )
  wide = jnp.promote_types(gathered.dtype, jnp.float32)
  row = jnp.asarray(weights()).at[receiver].set(0)
  present = _presence.current()
  if present is not None:
    row = jnp.where(present.edges[receiver], row, 0)
  message = Message(
    values=gathered.astype(wide),
    honest=attackers.honest(),
    sender=jnp.asarray(0),
    receiver=jnp.asarray(receiver),
    weights=row,
    attackers=attackers.count,
    leaf=leaf,
  )
  for attack, ranks in attackers.ranks.items():
    senders = jnp.asarray(ranks)
    chosen = jax.vmap(functools.partial(_chosen, attack, message, name))(
      senders
    )
    gathered = gathered.at[senders].set(chosen.astype(gathered.dtype))
  return gathered


def _chosen(
  attack: Attack, message: Message, name: str, sender: jax.Array
) -> jax.Array:
  """The value that an attack chooses, with its shape checked."""
  value = jnp.asarray(attack.send(message._replace(sender=sender)))
  shape = message.values.shape[1:]
  if value.shape != shape:
    raise ValueError(
      f"{name}: the attack {attack} sends an array of shape {value.shape} for leaf "
      f"{message.leaf} of shape {shape}; return one of that shape."
    )
  return value
