"""The page of troubleshooting quotes texts that the sources have."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"  # in the place of a value that the program fills in


def quoted():
  """The texts of the tables: the cells of the columns `text`, without backticks."""
  found, column = [], None
  for line in PAGE.read_text().splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if not line.startswith("|"):
      column = None
    elif "text" in cells:
      column = cells.index("text")
    elif column is not None and not line.startswith("|---"):
      found.append(cells[column].strip("`"))
  return found


@functools.cache
def literals():
  """The texts of all string literals of the sources, values replaced."""
  found = []
  for folder in ("jfog", "cmake"):
    for path in (ROOT / folder).rglob("*.py"):
      found += _python_literals(ast.parse(path.read_text()))
  for path in (*(ROOT / "xla_ops").rglob("*.*"), ROOT / "CMakeLists.txt"):
    if path.suffix in (".cc", ".h", ".txt"):
      # Literals that follow each other are one.
      text = re.sub(r'"\s*\n\s*"', "", path.read_text())
      found += re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)
  return (
    "\n".join(found).replace('\\"', '"').replace("\\n", "").replace("`", "")
  )


def _python_literals(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      yield "".join(
        part.value if isinstance(part, ast.Constant) else VALUE
        for part in node.values
      )
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def test_the_texts_are_found():
  assert len(quoted()) > 80


@pytest.mark.parametrize("text", quoted())
def test_a_quoted_text_is_in_the_sources(text):
  parts = [part.strip() for part in text.split("...")]
  parts = [part for part in parts if re.search(r"\w{3}", part)]
  assert any(len(part) > 8 for part in parts), "the text is too short to find"
  missing = [part for part in parts if part not in literals()]
  assert not missing
