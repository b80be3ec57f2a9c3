"""The figures of a run: a table by kind, and the findings."""

import collections
import json
import pathlib
from typing import Any

_PROGRAMS = ("programs", "windows", "late", "suspended")
_FAULTS = ("fault", "mismatches", "suspension", "limit")
_LONGEST = 4000  # characters of a finding's output


class Report:
  """Counts cases, operations and problems."""

  def __init__(self):
    self.lines: list[dict[str, Any]] = []

  def add(self, lines: list[dict[str, Any]]) -> None:
    """Adds the lines of a job."""
    self.lines += lines

  @property
  def findings(self) -> list[dict[str, Any]]:
    """The lines with a problem."""
    return [line for line in self.lines if line["problems"]]

  def table(self) -> str:
    """Cases, operations, problems and seconds by kind, in Markdown."""
    sums: dict[str, list[float]] = collections.defaultdict(
      lambda: [0, 0, 0, 0.0]
    )
    for line in self.lines:
      row = sums[line["kind"]]
      row[0] += "left_out" not in line
      row[1] += line.get("operations", 0)
      row[2] += bool(line["problems"])
      row[3] += line.get("seconds", 0.0)
    rows = [
      "| kind | cases | operations | with findings | seconds |",
      "|---|---|---|---|---|",
    ]
    rows += [
      f"| {kind} | {n:.0f} | {k:.0f} | {bad:.0f} | {seconds:.0f} |"
      for kind, (n, k, bad, seconds) in sorted(sums.items())
    ]
    faults = sum(sums[kind][0] for kind in _FAULTS if kind in sums)
    programs = sum(sums[kind][0] for kind in _PROGRAMS if kind in sums)
    rows += ["", f"{programs:.0f} programs, {faults:.0f} faults"]
    return "\n".join(rows)

  def left_out(self) -> list[str]:
    """The cases that could not run here, with reasons."""
    return sorted(
      {
        f"{line['name']} was left out: {line['left_out']}"
        for line in self.lines
        if "left_out" in line
      }
    )

  def write(self, path: pathlib.Path, **run: Any) -> None:
    """Writes all lines as JSON and the table as Markdown beside it.

    Args:
      path: of the JSON file.
      run: what is noted of the run: its seed, seconds, machine.
    """
    path.write_text(json.dumps({**run, "lines": self.lines}, indent=1))
    text = [f"{name}: {value}" for name, value in run.items()]
    text += ["", self.table(), "", *self.left_out()]
    text += [describe(line) for line in self.findings]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def describe(line: dict[str, Any]) -> str:
  """A finding with its command and the end of its output."""
  problems = "\n  ".join(line["problems"])
  output = line.get("output", "")[-_LONGEST:]
  return (
    f"FINDING {line['kind']}: {line['name']}\n  {problems}\n"
    f"  again by: {line['command']}\n{output}"
  )
