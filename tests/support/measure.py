"""Figures of source trees: lengths, comments and annotations, for the house test."""

import ast
import dataclasses
import io
import math
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator

PYTHON = (".py",)
CPP = (".cc", ".h")


def files(root: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
  """The sources below a folder, Python scripts without a suffix included."""
  if root.is_file():
    return [root]
  return sorted(
    path
    for path in root.rglob("*")
    if path.is_file()
    and "__pycache__" not in path.parts
    and (path.suffix in suffixes or (suffixes == PYTHON and _is_script(path)))
  )


def _is_script(path: pathlib.Path) -> bool:
  if path.suffix:
    return False
  with path.open("rb") as file:
    return re.match(rb"#!.*python", file.readline()) is not None


def quantile(values: Iterable[int], share: float) -> int:
  """The smallest value that `share` of the values do not exceed."""
  ordered = sorted(values)
  if not ordered:
    return 0
  return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def lengths(paths: Iterable[pathlib.Path]) -> dict[pathlib.Path, int]:
  """Lines of each file."""
  return {path: len(path.read_text().splitlines()) for path in paths}


def arguments(tree: ast.AST) -> Iterator[ast.arg]:
  """The arguments of all functions, without `self` and `cls`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      given = node.args
      every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
      every += [arg for arg in (given.vararg, given.kwarg) if arg]
      yield from (arg for arg in every if arg.arg not in ("self", "cls"))


def annotated(paths: Iterable[pathlib.Path]) -> float:
  """The share of arguments that have an annotation, 1.0 without arguments."""
  every = [
    arg
    for path in paths
    for arg in arguments(ast.parse(path.read_text(), str(path)))
  ]
  have = sum(arg.annotation is not None for arg in every)
  return have / len(every) if every else 1.0


def _docstrings(tree: ast.AST) -> set[int]:
  """The lines of all docstrings."""
  found: set[int] = set()
  for node in ast.walk(tree):
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
      found.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
  return found


_NO_CODE = {
  tokenize.COMMENT,
  tokenize.NL,
  tokenize.NEWLINE,
  tokenize.INDENT,
  tokenize.DEDENT,
  tokenize.ENCODING,
  tokenize.ENDMARKER,
}


def python_lines(text: str) -> tuple[set[int], set[int]]:
  """Lines of code and lines with a comment.

  Docstrings are neither, nor is a license at the head of the file.
  """
  code: set[int] = set()
  comments: set[int] = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      comments.add(token.start[0])
    elif token.type not in _NO_CODE:
      code.update(range(token.start[0], token.end[0] + 1))
  head = min(code, default=0)
  body = {number for number in comments if number > head}
  return code - _docstrings(ast.parse(text)), body


def cpp_lines(text: str) -> tuple[set[int], set[int]]:
  """Lines of code and lines with a `//` comment."""
  code: set[int] = set()
  comments: set[int] = set()
  for number, line in enumerate(text.splitlines(), 1):
    bare = re.sub(r'"(?:\\.|[^"\\])*"', '""', line)
    before, slashes, _ = bare.partition("//")
    if slashes:
      comments.add(number)
    if before.strip():
      code.add(number)
  return code, comments


@dataclasses.dataclass(frozen=True)
class Figures:
  """The figures of one language below one folder."""

  count: int
  file_p50: int
  file_p90: int
  longest: pathlib.Path
  longest_lines: int
  function_p50: int | None  # lines of code; Python only
  function_p90: int | None
  comments: float  # lines with a comment for each line of code
  annotated: float | None  # share of arguments


def python(root: pathlib.Path) -> Figures | None:
  """The figures of the Python files, or None if there are none."""
  paths = files(root, PYTHON)
  functions: list[int] = []
  code = comments = 0
  for path in paths:
    text = path.read_text()
    lines, remarks = python_lines(text)
    code, comments = code + len(lines), comments + len(remarks)
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        body = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        functions.append(len(lines.intersection(body)))
  return _figures(
    paths,
    code,
    comments,
    quantile(functions, 0.5),
    quantile(functions, 0.9),
    annotated(paths),
  )


def cpp(root: pathlib.Path) -> Figures | None:
  """The figures of the C++ files, or None if there are none."""
  paths = files(root, CPP)
  counted = [cpp_lines(path.read_text()) for path in paths]
  code = sum(len(lines) for lines, _ in counted)
  comments = sum(len(remarks) for _, remarks in counted)
  return _figures(paths, code, comments, None, None, None)


def _figures(paths, code, comments, median, ninth, share) -> Figures | None:
  if not paths:
    return None
  long = lengths(paths)
  longest = max(long, key=lambda path: long[path])
  return Figures(
    len(paths),
    quantile(long.values(), 0.5),
    quantile(long.values(), 0.9),
    longest,
    long[longest],
    median,
    ninth,
    comments / max(code, 1),
    share,
  )
