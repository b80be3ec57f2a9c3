"""The rules of the house: layers, lists, sources and what files may say."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jfog"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part of jfog may import of the others. A part is a subpackage or a
# module beside them.
LAYERS = {
  "_validation": set(),
  "_dtypes": set(),
  "topology": {"_validation"},
  "timeline": set(),
  "_compat": set(),
  "_build": set(),
  "runtime": {
    *("topology", "_compat", "_validation", "_mpi", "_nccl", "_build"),
  },
  "primitives": {
    *("runtime", "topology", "_compat", "_dtypes", "_validation", "timeline"),
  },
  "optimizers": {
    *("primitives", "runtime", "topology", "_compat", "_dtypes"),
    "_validation",
  },
  "launch": {"optimizers", "primitives", "runtime", "topology", "timeline"},
  "diagnostics": {
    *("optimizers", "primitives", "runtime", "topology", "timeline"),
    *("_dtypes", "_validation"),
  },
}
LAYERS["cli"] = set(LAYERS)

# The root package itself is looked at in one place only.
ROOT_IMPORTERS = {
  "runtime/_extensions.py": "extends the package's path to the installed build",
}


def name(path):
  """A module's path as the tests' names show it."""
  return str(path.relative_to(PACKAGE))


def part(path):
  """The part of jfog that a module belongs to."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tracked():
  """The files of the project, as git or else the source archive lists them."""
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if listed.returncode == 0 and listed.stdout:
    return [
      p for line in listed.stdout.splitlines() if (p := ROOT / line).is_file()
    ]
  return [
    p
    for p in ROOT.rglob("*")
    if p.is_file()
    and not any(s.startswith(".") for s in p.relative_to(ROOT).parts)
  ]


def imports(path):
  """Pairs of a line and the dotted names it imports, relative ones resolved."""
  package = ["jfog", *path.relative_to(PACKAGE).parent.parts]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else []
      base = [*base, *(node.module or "").split(".")]
      for alias in node.names:
        yield node.lineno, ".".join([*filter(None, base), alias.name])


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_downward_only(path):
  if path == PACKAGE / "__init__.py":
    return  # the list of everything
  here = part(path)
  assert here in LAYERS, f"say in LAYERS where jfog/{name(path)} stands"
  for line, target in imports(path):
    head, _, rest = target.partition(".")
    if head != "jfog":
      continue
    there = rest.partition(".")[0]
    if not there:
      assert name(path) in ROOT_IMPORTERS, (
        f"jfog/{name(path)}:{line} imports jfog itself, which imports it"
      )
    elif there != here:
      assert there in LAYERS[here], (
        f"jfog/{name(path)}:{line} looks up: {here} imports {target}"
      )


def test_layers_have_no_cycle():
  done = {"_mpi", "_nccl"}
  while rest := {p for p in LAYERS if p not in done}:
    ready = {p for p in rest if LAYERS[p] <= done}
    assert ready, f"these import each other: {sorted(rest)}"
    done |= ready


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_private_jax_is_imported_in_compat_only(path):
  if path == PACKAGE / "_compat.py":
    return
  for line, target in imports(path):
    assert not re.match(r"(jax|jaxlib)(\.\w+)*\._\w", target), (
      f"jfog/{name(path)}:{line} imports {target}; only _compat.py may"
    )
  for number, text in enumerate(path.read_text().splitlines(), 1):
    assert "jax._src" not in text, f"jfog/{name(path)}:{number} says jax._src"


@pytest.mark.parametrize(
  "path", [p for p in MODULES if p.name == "__init__.py"], ids=name
)
def test_init_is_a_list(path):
  docstring, *rest = ast.parse(path.read_text()).body
  assert isinstance(docstring, ast.Expr), (
    f"jfog/{name(path)}:1 has no docstring"
  )
  for node in rest:
    where = f"jfog/{name(path)}:{node.lineno}"
    assert isinstance(node, ast.ImportFrom), f"{where} is no import"
    for alias in node.names:
      assert alias.name == alias.asname, (
        f"{where}: write `import {alias.name} as {alias.name}`"
      )


@pytest.mark.parametrize(
  "path",
  [*MODULES, *sorted(ROOT.glob("tests/**/*.py"))],
  ids=lambda p: str(p.relative_to(ROOT)),
)
def test_a_file_opens_with_a_line_that_says_what_it_holds(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert docstring, f"{path.relative_to(ROOT)} has no docstring"
  first = docstring.splitlines()[0]
  assert first.endswith("."), f"{path.relative_to(ROOT)}: {first!r}"


def test_a_header_or_source_opens_with_a_comment():
  for path in sorted((ROOT / "xla_ops").rglob("*.*")):
    if path.suffix in (".cc", ".h"):
      first = path.read_text().splitlines()[0]
      assert re.match(r"// \S", first), f"{path.relative_to(ROOT)}: {first!r}"


def test_both_builds_take_the_same_folders():
  cmake = (ROOT / "CMakeLists.txt").read_text()
  bazel = (ROOT / "BUILD.bazel").read_text()
  folders = sorted(path.name for path in (ROOT / "xla_ops").iterdir())
  assert sorted(set(re.findall(r"xla_ops/(\w+)/\*\.cc", cmake))) == folders
  taken = re.findall(r"xla_ops/(\w+)/(?:\*\*/)?\*\.cc", bazel)
  assert sorted(set(taken)) == folders


@pytest.mark.parametrize("backend", ["mpi", "nccl"])
def test_the_stub_describes_the_native_module(backend):
  module = (ROOT / "xla_ops" / backend / "module.cc").read_text()
  stub = ast.parse((PACKAGE / f"_{backend}.pyi").read_text()).body
  described = {n.name: n for n in stub if isinstance(n, ast.FunctionDef)}
  table = {
    entry.split('"')[1]: re.findall(r'py::arg\("(\w+)"\)', entry)
    for entry in module.split("m.def(")[1:]
  }
  assert table == {
    name: [argument.arg for argument in node.args.args]
    for name, node in described.items()
  }


def test_mpi_and_nccl_share_nothing_but_common():
  for path in sorted((ROOT / "xla_ops").rglob("*.*")):
    folder = path.relative_to(ROOT / "xla_ops").parts[0]
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if match := re.match(r'#include "(common|mpi|nccl)/', line):
        assert match[1] in ("common", folder), (
          f"{path.relative_to(ROOT)}:{number} includes another folder's header"
        )


def test_no_file_speaks_of_the_machine_it_was_written_on():
  homes = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]
  pattern = re.compile(rf"(?<![\w.$}}-])({'|'.join(homes)})")
  for path in tracked():
    try:
      text = path.read_text()
    except UnicodeDecodeError:
      continue  # a picture
    for number, line in enumerate(text.splitlines(), 1):
      assert not pattern.search(line), (
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
      )
