"""Timing of peers in turns, statistics, and tables."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def calls_for(seconds: float, target: float) -> int:
  """How often to call what takes `seconds`, to take about `target`."""
  return max(1, min(1000, round(target / max(seconds, 1e-6))))


def timed(
  run: Callable[[Any], Any], x: Any, calls: int, barrier: Callable[[], Any]
) -> tuple[Any, float]:
  """Calls the jitted `x = run(x)`; returns x and the seconds of all calls."""
  import jax

  jax.block_until_ready(x)
  barrier()
  start = time.perf_counter()
  for _ in range(calls):
    x = run(x)
  jax.block_until_ready(x)
  return x, time.perf_counter() - start


def alternate(
  peers: Mapping[str, Any], rounds: int, measure: Callable[[Any], Any]
) -> dict[str, list[Any]]:
  """Measures all peers in every round, each round beginning at another one.

  Returns a dict from the name of a peer to its measurements, one a round.
  """
  names = list(peers)
  times: dict[str, list[Any]] = {name: [] for name in names}
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      times[name].append(measure(peers[name]))
  return times


def ratios(
  numerators: Iterable[float], denominators: Iterable[float]
) -> list[float]:
  """The ratios of what was measured in the same round."""
  return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
  """`median [first quartile, third quartile]` as text."""
  if not len(values):
    return "-"
  low, median, high = np.percentile(values, [25, 50, 75])
  return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def duration(seconds: float) -> str:
  """Seconds in the unit that suits them."""
  for factor, unit in ((1e6, "us"), (1e3, "ms")):
    if seconds * factor < 1000:
      return f"{seconds * factor:.3g} {unit}"
  return f"{seconds:.3g} s"


def size_name(size: int) -> str:
  """A number of bytes in words."""
  for factor, unit in ((2**20, "MB"), (2**10, "kB")):
    if size >= factor:
      return f"{size / factor:g} {unit}"
  return f"{size} B"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
  """The lines of a Markdown table."""
  lines: list[Any] = [columns, ["---"] * len(columns), *rows]
  return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]
