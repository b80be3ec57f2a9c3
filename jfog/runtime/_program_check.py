"""The check that all ranks compile the same programs, on request."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jfog import _compat
from jfog.runtime import _extensions
from jfog.runtime._process_communicator import ProcessCommunicator

# Operations that other ranks need not call.
_OF_ONE_RANK = ("win_put", "win_accumulate", "win_get", "win_update")
_OF_ONE_RANK += ("win_missing", "win_version", "win_associated_p")
_OF_ONE_RANK += ("wait", "poll")
# Parameters that have to be equal on all ranks, where an operation has them.
_COMPARED = ("graph", "weighting", "op", "static_root", "axis_sizes")
_MOST_OPERATIONS = 8  # that a text lists


class ProgramCheck:
  """Compares each program with those of the other ranks before it is compiled.

  Collective: all ranks compile the programs that have operations of all ranks in
  one order, each of which waits for the others. It ends with the first world in
  which a rank fails.
  """

  def __init__(self, world: ProcessCommunicator) -> None:
    self._world = world
    self._context: int | None = None
    self._count = 0
    if world.size > 1:
      # Not the world's own: its messages are those of programs that run.
      self._context = _extensions.mpi().split(
        world.context, 0, world.rank, world.timeout
      )
      _compat.report_programs(self._check)

  def close(self) -> None:
    """Ends the check."""
    if self._context is not None:
      _compat.report_programs(None)
      _extensions.mpi().close(self._context)
      self._context = None

  def _check(self, program: Any) -> None:
    """Raises on all ranks if one of them has another program here."""
    operations = list(_operations(program.jaxpr))
    if not operations or self._context is None:
      return
    self._count += 1
    title = _title(program.jaxpr)
    text = "\n".join([title, *operations])
    # The title is left out: line numbers may differ.
    digest = hashlib.blake2b("\n".join(operations).encode(), digest_size=8)
    try:
      digests = _extensions.mpi().gather(self._context, digest.digest())
    except RuntimeError:
      if _extensions.mpi().missing(self._context):
        return  # the program's own operations go on without that rank, or fail
      raise RuntimeError(
        f"check_programs: rank {self._world.rank} compiles {title} as program "
        f"{self._count} with operations, and not all other ranks have come to "
        f"theirs in {self._world.timeout:g} s. Without check_programs ranks need "
        f"not compile together; {_listed(operations)}."
      ) from None
    if len(set(digests)) == 1:
      return
    lengths = _extensions.mpi().gather(
      self._context, b"%16d" % len(text.encode())
    )
    longest = max(map(int, lengths))
    padded = text.encode().ljust(longest)
    texts = [
      each.decode().rstrip()
      for each in _extensions.mpi().gather(self._context, padded)
    ]
    raise RuntimeError(_difference(texts, self._count))


def _difference(texts: list[str], ordinal: int) -> str:
  """The text about ranks whose programs differ."""
  groups: dict[tuple[str, ...], list[int]] = {}
  titles = {}
  for rank, text in enumerate(texts):
    title, *operations = text.split("\n")
    groups.setdefault(tuple(operations), []).append(rank)
    titles.setdefault(tuple(operations), title)
  # The largest group first, and then that of the lowest rank.
  sides = sorted(groups, key=lambda side: (-len(groups[side]), groups[side][0]))
  first = sides[0]
  lines = [
    f"check_programs: the ranks differ in program {ordinal} with operations."
  ]
  for side in sides[:3]:
    ranks = groups[side]
    word = "rank" if len(ranks) == 1 else "ranks"
    lines.append(
      f"{word} {', '.join(map(str, ranks))}: {titles[side]}, {_listed(side)}"
    )
  other = sides[1]
  at = next(
    (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b),
    min(len(first), len(other)),
  )
  lines.append(f"They differ from operation {at} on.")
  return "\n".join(lines)


def _listed(operations: Any) -> str:
  """Operations in words, the first ones of many."""
  shown = list(operations[:_MOST_OPERATIONS])
  if len(operations) > len(shown):
    shown.append(f"{len(operations) - len(shown)} more")
  noun = "operation" if len(operations) == 1 else "operations"
  return f"with {len(operations)} {noun}: " + "; ".join(shown)


def _title(jaxpr: Any) -> str:
  """The name and place of the function that is compiled."""
  name = getattr(jaxpr.debug_info, "func_src_info", None)
  return str(name or "a function")


def _operations(jaxpr: Any) -> Iterator[str]:
  """The operations of a program that all ranks take part in, in order."""
  effect = _compat.communication_effect()
  for eqn in jaxpr.eqns:
    if effect not in eqn.effects:
      continue
    inner = [
      getattr(each, "jaxpr", each)
      for value in eqn.params.values()
      for each in (value if isinstance(value, (tuple, list)) else (value,))
      if hasattr(getattr(each, "jaxpr", each), "eqns")
    ]
    if inner:
      for each in inner:
        yield from _operations(each)
      continue
    name = eqn.primitive.name
    # jfog's own test of JAX has a primitive of that prefix.
    is_internal = name.startswith("jfog_")
    if not is_internal and name.removesuffix("_start") not in _OF_ONE_RANK:
      yield _described(name, eqn)


def _described(name: str, eqn: Any) -> str:
  """`neighbor_allreduce of float32[10], graph=..., over 4 ranks`."""
  params = dict(eqn.params)
  if spec := params.get("spec"):  # of a window
    params |= {"graph": spec.topology, "comm": spec.comm}
  leaves = [x.aval for x in eqn.invars[params.get("fixed", 0) :]]
  parts = [
    f"{name} of {', '.join(leaf.str_short(short_dtypes=True) for leaf in leaves)}"
    # Lengths of axis 0 are the ranks' own where they are passed.
    if params.get("axis_sizes") is None
    else name
  ]
  for key in _COMPARED:
    if params.get(key) is not None:
      parts.append(f"{key}={_value(params[key])}")
  if comm := params.get("comm"):
    parts.append(f"over {comm.size} ranks")
  return ", ".join(parts)


def _value(value: Any) -> str:
  """A parameter, of a graph with a hash of its weights."""
  if not hasattr(value, "rounds"):
    return str(value)
  if hasattr(value, "__array__"):
    content = np.asarray(value).tobytes()
  else:
    content = repr(value).encode()
  digest = hashlib.blake2b(content, digest_size=4).hexdigest()
  return f"{value!r} {digest}"
