"""The checks of the house test: functions of a tree to a list of offenses.

Each function takes the root of a tree laid out as the repository is, so that the
house test can run it on the repository and on a small tree with a planted offense.
"""

import ast
import collections
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

from support import measure

# Imports and includes.


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """The Python modules of the package by their dotted names."""
  found = {}
  for path in sorted((root / "jfog").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    found[".".join(parts)] = path
  return found


def _module_level(tree: ast.Module) -> Iterator[ast.stmt]:
  """Statements that run at import, without `if TYPE_CHECKING:` blocks."""
  waiting: list[ast.stmt] = list(tree.body)
  while waiting:
    node = waiting.pop(0)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
      continue
    yield node
    for field in ("body", "orelse", "finalbody"):
      waiting += [
        n for n in getattr(node, field, []) if isinstance(n, ast.stmt)
      ]
    for handler in getattr(node, "handlers", []):
      waiting += handler.body


def _targets(
  node: ast.stmt, package: list[str], known: Mapping[str, pathlib.Path]
) -> Iterator[str]:
  """The modules that one import statement names."""
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    base = package[: len(package) + 1 - node.level] if node.level else []
    base = [*base, *filter(None, (node.module or "").split("."))]
    names = [".".join([*base, alias.name]) for alias in node.names]
  else:
    return
  for name in names:
    # `from jfog.topology import ring` loads the package jfog.topology.
    while name and name not in known:
      name = name.rpartition(".")[0]
    if name:
      yield name


def import_graph(root: pathlib.Path) -> dict[str, set[str]]:
  """The modules that each module imports at module level."""
  known = modules(root)
  graph = {}
  for name, path in known.items():
    package = name.split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    graph[name] = {
      target
      for node in _module_level(ast.parse(path.read_text()))
      for target in _targets(node, package, known)
    } - {name}
  return graph


def every_import(
  root: pathlib.Path, path: pathlib.Path
) -> Iterator[tuple[int, str]]:
  """Lines and the dotted names they import, inside of functions as well."""
  package = list(path.relative_to(root).parent.parts)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else []
      base = [*base, *filter(None, (node.module or "").split("."))]
      for alias in node.names:
        yield node.lineno, ".".join([*base, alias.name])


def imports_upward(
  root: pathlib.Path,
  layers: Mapping[str, set[str]],
  root_importers: Mapping[str, str],
) -> list[str]:
  """Imports of a part of jfog that its layer does not allow.

  Args:
    root: the tree.
    layers: for each part, a subpackage or module of jfog, those it may import.
    root_importers: modules that may import jfog itself, with the reason.
  """
  found = []
  for path in modules(root).values():
    name = str(path.relative_to(root / "jfog"))
    if name == "__init__.py":
      continue  # the list of everything
    here = path.relative_to(root / "jfog").parts[0].removesuffix(".py")
    if here not in layers:
      found.append(f"jfog/{name} belongs to no layer; add {here!r} to LAYERS")
      continue
    for line, target in every_import(root, path):
      head, _, rest = target.partition(".")
      there = rest.partition(".")[0]
      if head != "jfog" or there == here:
        continue
      if not there and name not in root_importers:
        found.append(f"jfog/{name}:{line} imports jfog, which imports it")
      elif there and there not in layers[here]:
        found.append(f"jfog/{name}:{line} looks up: {here} imports {target}")
  return found


def private_jax(root: pathlib.Path) -> list[str]:
  """Uses of private JAX outside of _compat.py."""
  found = []
  for path in modules(root).values():
    name = path.relative_to(root)
    if name == pathlib.Path("jfog/_compat.py"):
      continue
    found += [
      f"{name}:{line} imports {target}"
      for line, target in every_import(root, path)
      if re.match(r"(jax|jaxlib)(\.\w+)*\._\w", target)
    ]
    found += [
      f"{name}:{number} names jax._src"
      for number, text in enumerate(path.read_text().splitlines(), 1)
      if "jax._src" in text
    ]
  return found


def inits_with_code(root: pathlib.Path) -> list[str]:
  """Statements in an __init__.py other than a docstring, imports and `__names__`."""
  found = []
  for path in sorted((root / "jfog").rglob("__init__.py")):
    name = path.relative_to(root)
    body = ast.parse(path.read_text()).body
    if not body or not isinstance(body[0], ast.Expr):
      found.append(f"{name}:1 has no docstring")
    for node in body[1:]:
      if isinstance(node, ast.Assign) and all(
        name.id.startswith("__")
        for target in node.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
      ):
        continue
      if ast.unparse(node) == "import lazy_loader":
        continue
      if not isinstance(node, ast.ImportFrom):
        found.append(f"{name}:{node.lineno} is not an import")
        continue
      found += [
        f"{name}:{node.lineno}: write `import {a.name} as {a.name}`"
        for a in node.names
        if a.name != a.asname
      ]
  return found


def without_opening_line(root: pathlib.Path) -> list[str]:
  """Files that do not open with a line about their contents."""
  found = []
  python = measure.files(root / "jfog", measure.PYTHON)
  python += measure.files(root / "tests", measure.PYTHON)
  for path in python:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    if not docstring.partition("\n")[0].endswith("."):
      found.append(f"{path.relative_to(root)} opens without a docstring's line")
  for path in measure.files(root / "xla_ops", measure.CPP):
    if not re.match(r"// \S", path.read_text()):
      found.append(f"{path.relative_to(root)} opens without a comment")
  return found


def unequal_builds(root: pathlib.Path) -> list[str]:
  """Folders of xla_ops that one of the two builds leaves out."""
  folders = sorted(p.name for p in (root / "xla_ops").iterdir() if p.is_dir())
  cmake = (root / "CMakeLists.txt").read_text()
  bazel = (root / "BUILD.bazel").read_text()
  pattern = r"xla_ops/(\w+)/(?:\*\*/)?\*\.cc"
  return [
    f"{name} takes {taken}, xla_ops has {folders}"
    for name, text in (("CMakeLists.txt", cmake), ("BUILD.bazel", bazel))
    if (taken := sorted(set(re.findall(pattern, text)))) != folders
  ]


def stub_differences(root: pathlib.Path, backend: str) -> list[str]:
  """Functions that a native module and its stub describe differently."""
  source = root / "xla_ops" / backend / "module.cc"
  stub = ast.parse((root / "jfog" / f"_{backend}.pyi").read_text()).body
  described = {
    node.name: [argument.arg for argument in node.args.args]
    for node in stub
    if isinstance(node, ast.FunctionDef)
  }
  table = {
    entry.split('"')[1]: re.findall(r'py::arg\("(\w+)"\)', entry)
    for entry in source.read_text().split("m.def(")[1:]
  }
  return [
    f"_{backend}.{name}: module {table.get(name)}, stub {described.get(name)}"
    for name in sorted({*table, *described})
    if table.get(name) != described.get(name)
  ]


def machine_paths(
  root: pathlib.Path, paths: Iterable[pathlib.Path]
) -> list[str]:
  """Paths of the machine on which a file was written."""
  homes = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]
  pattern = re.compile(rf"(?<![\w.$}}-])({'|'.join(homes)})")
  found = []
  for path in paths:
    try:
      text = path.read_text()
    except UnicodeDecodeError:
      continue  # a picture
    found += [
      f"{path.relative_to(root)}:{number}: {line.strip()}"
      for number, line in enumerate(text.splitlines(), 1)
      if pattern.search(line)
    ]
  return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
  """The nodes of one circle of a directed graph, or an empty list."""
  done: set[str] = set()
  trail: list[str] = []

  def visit(node: str) -> list[str]:
    if node in trail:
      return [*trail[trail.index(node) :], node]
    if node in done:
      return []
    trail.append(node)
    for target in sorted(graph.get(node, ())):
      if found := visit(target):
        return found
    trail.pop()
    done.add(node)
    return []

  for node in sorted(graph):
    if found := visit(node):
      return found
  return []


def import_circles(
  root: pathlib.Path, allowed: Iterable[tuple[str, str]] = ()
) -> list[str]:
  """A circle of imports at module level, without the allowed imports."""
  graph = import_graph(root)
  for importer, target in allowed:
    graph.get(importer, set()).discard(target)
  found = circle(graph)
  return [" -> ".join(found)] if found else []


def include_graph(root: pathlib.Path) -> dict[str, set[str]]:
  """The rooms that each room of xla_ops includes; a room is a .h with its .cc."""
  base = root / "xla_ops"
  graph: dict[str, set[str]] = collections.defaultdict(set)
  for path in measure.files(base, measure.CPP):
    room = str(path.relative_to(base).with_suffix(""))
    included = re.findall(
      r'(?m)^#include "((?:common|mpi|nccl)/[\w/]+)\.h"', path.read_text()
    )
    graph[room] |= set(included) - {room}
  return dict(graph)


def include_circles(root: pathlib.Path) -> list[str]:
  """A circle of includes among the rooms of xla_ops."""
  found = circle(include_graph(root))
  return [" -> ".join(found)] if found else []


def level(root: pathlib.Path, room: str, transport: Iterable[str]) -> int:
  """The layer of a room: 0 common, 1 transport, 2 operation, 3 handlers, 4 module.

  Handlers are the rooms that define an FFI handler; the transport is listed.
  """
  if room.startswith("common/"):
    return 0
  if room.endswith("/module"):
    return 4
  if room in transport:
    return 1
  source = root / "xla_ops" / f"{room}.cc"
  if source.exists() and "XLA_FFI_DEFINE_HANDLER" in source.read_text():
    return 3
  return 2


def includes_upward(
  root: pathlib.Path, transport: Iterable[str], allowed: Iterable[str] = ()
) -> list[str]:
  """Includes of a room of a higher layer, or of the other backend.

  Args:
    root: the tree.
    transport: the rooms of layer 1.
    allowed: pairs "mpi/window -> mpi/collectives" that need no remark.
  """
  found = []
  transport = set(transport)
  for room, targets in include_graph(root).items():
    own = level(root, room, transport)
    for target in sorted(targets):
      edge = f"{room} -> {target}"
      folder, other = room.split("/")[0], target.split("/")[0]
      if other not in ("common", folder):
        found.append(f"{edge}: another backend")
      elif level(root, target, transport) > own and edge not in allowed:
        found.append(f"{edge}: upward")
  return found


# Stems.


def missing_stems(
  root: pathlib.Path,
  infrastructure: Iterable[str],
  without_source: Mapping[str, str],
  tested_by: Mapping[str, str],
) -> list[str]:
  """Features in jfog/primitives without a C++ file or without a test file.

  Args:
    root: the tree.
    infrastructure: modules and folders that hold no feature.
    without_source: features without a C++ file of their name, with the reason.
    tested_by: features with a test file of another name.
  """
  base = root / "jfog" / "primitives"
  stems = {
    path.stem.removeprefix("_")
    for path in base.iterdir()
    if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
  } - {"_init__", *infrastructure}
  native = {p.stem for p in (root / "xla_ops").rglob("*.cc")}
  native |= {p.name for p in (root / "xla_ops").rglob("*") if p.is_dir()}
  found = []
  for stem in sorted(stems):
    if stem not in native and stem not in without_source:
      found.append(f"{stem} has no C++ file; add one or say why it needs none")
    test = tested_by.get(stem, f"test_{stem}")
    if not (root / "tests" / f"{test}.py").exists():
      found.append(f"{stem} has no test file; add tests/test_{stem}.py")
  return found


# Lengths and annotations.


def lengths(
  root: pathlib.Path,
  folder: str,
  suffixes: tuple[str, ...],
  p90: int,
  longest: int,
) -> list[str]:
  """Files that are too long, and a 90th percentile that is too high."""
  lines = measure.lengths(measure.files(root / folder, suffixes))
  found = [
    f"{path.relative_to(root)} has {count} lines, more than {longest}"
    for path, count in lines.items()
    if count > longest
  ]
  if (reached := measure.quantile(lines.values(), 0.9)) > p90:
    found.append(f"{folder}: p90 of the lengths is {reached}, more than {p90}")
  return found


def few_annotations(root: pathlib.Path, folder: str, share: float) -> list[str]:
  """A share of annotated arguments that is too low."""
  reached = measure.annotated(measure.files(root / folder, measure.PYTHON))
  if reached >= share:
    return []
  return [
    f"{folder}: {reached:.1%} of arguments are annotated, goal {share:.0%}"
  ]


# Words.

# The words that must not come back, as regular expressions in lower case.
WORDS = {
  r"how-?manieth|manieth": "ordinal",
  r"(?<=\s)told\b": "name the noun: attributes, reports",
  r"\bbur(y|ied)\b": "leak deliberately",
  r"\bwho(m|ever)\b": "name the rank or the caller",
  # "there is no GPU" is plain English; "rank 5 is no rank" is not.
  r"(?<!there )\b(is|are) no\b": "does not, is not a",
  r"\bnobody\b": "no rank, no thread",
  r"neighbour|colour|behaviour|favour|centre\b": "American spelling",
  r"(optim|initial|synchron|serial|normal|recogn|organ|summar)is(e|ing|ation)": (
    "American spelling"
  ),
  r"\brealis(e|ing|ation)": "American spelling",
  r"cancell(ed|ing)|labell(ed|ing)|modell(ed|ing)|travell(ed|ing)": (
    "American spelling"
  ),
  r"\bprogrammes?\b": "program",
  r"begin anew|of its own accord|gives? away|hears? of": "plain verbs",
  r"\blets? .{1,30} know\b": "reports, notifies",
  r"\bby himself\b|\bhis\b": "its",
  r"\balike\b": "equal, the same",
  r"otherwise than": "differently from",
}
# The opening of a comment or docstring by a relative clause.
_CLAUSE = re.compile(r'^\s*(//|#|[rf]?""")\s*(What|Who|Whose|Whoever|Whom)\b')
_WORDS = [(re.compile(pattern), say) for pattern, say in WORDS.items()]


def words(
  root: pathlib.Path,
  paths: Iterable[pathlib.Path],
  exceptions: Mapping[str, str],
) -> list[str]:
  """Banned words, and comments that open with a relative clause.

  Args:
    root: the tree.
    paths: the files to read; those that are not text are left out.
    exceptions: texts that may hold a banned word, with the reason.
  """
  found = []
  for path in sorted(paths):
    try:
      text = path.read_text()
    except UnicodeDecodeError:
      continue  # a picture
    previous_is_comment = False
    for number, line in enumerate(text.splitlines(), 1):
      where = f"{path.relative_to(root)}:{number}"
      kept = line
      for exception in exceptions:
        kept = kept.replace(exception, "")
      for pattern, say in _WORDS:
        if match := pattern.search(kept.lower()):
          found.append(f"{where}: {match[0].strip()!r} ({say})")
      is_comment = kept.lstrip().startswith(("//", "#"))
      code = path.suffix in (".py", ".cc", ".h") or not path.suffix
      # A line that goes on from the comment line above opens nothing.
      if code and not previous_is_comment and (opening := _CLAUSE.match(kept)):
        found.append(f"{where}: opens with {opening[2]!r} (the noun first)")
      previous_is_comment = is_comment
  return found


# The same lines twice.


def _significant(path: pathlib.Path) -> list[tuple[int, str]]:
  """Lines with their numbers, without blank ones, includes and lone brackets."""
  return [
    (number, line.strip())
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\w", line)
    and not line.startswith(("#include", "namespace", "}  // namespace"))
  ]


def equal_runs(
  root: pathlib.Path, length: int, exceptions: Mapping[str, str] | None = None
) -> list[str]:
  """Runs of equal lines in xla_ops/mpi and xla_ops/nccl.

  Args:
    root: the tree.
    length: the length of a run that counts.
    exceptions: first lines of runs that may stand twice, with the reason.
  """
  seen: dict[tuple[str, ...], str] = {}
  for path in measure.files(root / "xla_ops" / "mpi", measure.CPP):
    lines = _significant(path)
    for i in range(len(lines) - length + 1):
      run = tuple(line for _, line in lines[i : i + length])
      seen.setdefault(run, f"{path.relative_to(root)}:{lines[i][0]}")
  found = []
  for path in measure.files(root / "xla_ops" / "nccl", measure.CPP):
    lines = _significant(path)
    last = -length
    for i in range(len(lines) - length + 1):
      run = tuple(line for _, line in lines[i : i + length])
      if run in seen and i >= last + length:
        last = i
        if run[0] not in (exceptions or {}):
          here = f"{path.relative_to(root)}:{lines[i][0]}"
          found.append(f"{here} repeats {seen[run]}: {run[0]}")
  return found
