"""Docstrings and pages: public names have docstrings, and all examples run."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import pathlib
import pkgutil
import re
import types

import numpy as np
import pytest
from support import suite

import jfog

PUBLIC = (
  "jfog",
  "jfog.attacks",
  "jfog.topology",
  "jfog.optimizers",
  "jfog.diagnostics",
  "jfog.lab",
)
NATIVE = {"_build", "_mpi", "_nccl"}  # made by the build

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
  [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    ROOT / "benchmarks" / "README.md",
  ]
)
# Pages whose file names, and names inside of these files, are checked.
MAPS = [
  page
  for page in PAGES
  if page.name in ("architecture.md", "CONTRIBUTING.md")
  or page.parent.name == "decisions"
]
# The operation that CONTRIBUTING.md adds as its example.
SKETCH = "neighbor_max"


def public_names():
  """Pairs of a dotted name and what it stands for, each object once."""
  seen = {}
  for module in PUBLIC:
    listing = importlib.import_module(module)
    is_package = hasattr(listing, "__path__")
    # `jfog` imports its names at their first use: `vars` has only some of them.
    for name in dir(listing):
      value = getattr(listing, name)
      own = getattr(value, "__module__", module) == module
      if name.startswith("_") or not (is_package or own):
        continue  # what a module imports is its own affair
      if isinstance(value, types.ModuleType):
        if value.__name__ in PUBLIC:
          seen[id(value)] = value.__name__, value
      elif getattr(value, "__module__", "jfog").startswith("jfog"):
        seen.setdefault(id(value), (f"{module}.{name}", value))
  return sorted(seen.values(), key=lambda pair: pair[0])


def test_reference_has_all_public_names():
  text = "\n".join(
    page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")
  )
  listed = re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)$", text, re.M)
  assert len(set(listed)) == len(listed)
  modules = [importlib.import_module(name) for name in PUBLIC]
  wanted = {
    f"{module.__name__}.{name}"
    for module in modules
    for name in module.__all__
    if not isinstance(getattr(module, name), (types.ModuleType, str))
  }
  assert set(listed) == wanted


def public_members():
  """The same of the methods and properties that a public class adds."""
  members = {}
  for name, value in public_names():
    if not inspect.isclass(value):
      continue
    for owner in value.__mro__:
      if not owner.__module__.startswith("jfog"):
        continue
      for member, found in vars(owner).items():
        if member.startswith("_") or not (
          callable(found)
          or isinstance(found, (classmethod, staticmethod))
          or hasattr(found, "__get__")
        ):
          continue
        members.setdefault(f"{name}.{member}", found)
  return sorted(members.items())


def examples():
  """The docstrings with examples of all modules of the installed package."""
  finder = doctest.DocTestFinder(exclude_empty=True)
  found = {}
  for module in pkgutil.walk_packages(jfog.__path__, "jfog."):
    if module.name.rpartition(".")[2] in NATIVE:
      continue
    for test in finder.find(importlib.import_module(module.name), module.name):
      if test.examples:
        found[test.name] = test
  return [found[name] for name in sorted(found)]


@pytest.fixture
def no_world():
  """Leaves no world behind, whatever an example starts."""
  yield
  jfog.shutdown()


def named(pairs):
  """Parameters with their names as ids."""
  return [pytest.param(value, id=name) for name, value in pairs]


@pytest.mark.parametrize("value", named(public_names()))
def test_a_public_name_is_documented(value):
  if isinstance(value, (str, int, float)):
    return  # a constant; a comment or the module's text says what it is
  text = inspect.getdoc(value) or ""
  assert text.split("\n")[0].endswith((".", ":", "?")), (
    f"the docstring opens with {text[:80]!r}, which is not a sentence"
  )
  if inspect.isfunction(value):
    assert "Example:" in text and ">>> " in text, "the docstring has no Example"


@pytest.mark.parametrize("value", named(public_members()))
def test_a_public_method_or_property_is_documented(value):
  assert inspect.getdoc(value), "the docstring is missing"


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_examples_run(test, no_world):
  report = io.StringIO()
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(test, out=report.write, clear_globs=False)
  if runner.failures:
    pytest.fail(report.getvalue(), pytrace=False)


def test_the_examples_are_found():
  """A finder that finds nothing would pass everything."""
  names = {test.name for test in examples()}
  assert "jfog.topology._static.ring" in names
  assert "jfog.optimizers._combine.adapt_then_combine" in names
  assert "jfog.runtime._communicator.Axis" in names


def page_name(page):
  """A page's path as the tests' names show it."""
  return page.relative_to(ROOT).as_posix()


def blocks(page):
  """The python blocks of a page, with their lines in it and the output below."""
  text = page.read_text()
  fenced = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
  for match in re.finditer(fenced, text, re.M | re.S):
    yield text[: match.start(1)].count("\n"), match[1], match[2]


@pytest.mark.parametrize(
  "page", [page for page in PAGES if any(blocks(page))], ids=page_name
)
def test_python_blocks_run(page, no_world):
  """The blocks of one page are one program; a text block below is its output."""
  if page.name == "frameworks.md":
    suite.require("flax", "equinox", "haiku", "grain")
  if page.name == "training_loops.md":
    suite.require("grain", "tensorboardX", "wandb")
  namespace = {}
  for line, code, output in blocks(page):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile("\n" * line + code, str(page), "exec"), namespace)
    if output is not None:
      assert printed.getvalue() == output


@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_diff_fit_the_line(side, no_world):
  (diff,) = re.findall(
    r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
  )
  lines = diff.splitlines()
  assert {line[:1] for line in lines} == {"-", "+", " ", ""}
  program = "\n".join(line[1:] for line in lines if line[:1] in (side, " "))
  namespace = {}
  exec(program, namespace)
  params = namespace["params"]
  assert params.shape == ((3,) if side == "-" else (8, 3))
  np.testing.assert_allclose(
    params, np.broadcast_to([1, 2, 3], params.shape), atol=1e-3
  )


def test_the_blocks_are_found():
  assert len(list(blocks(ROOT / "README.md"))) >= 1
  assert len(list(blocks(ROOT / "docs" / "your_loop.md"))) >= 2


def test_drawings_are_those_that_the_build_writes():
  folder = ROOT / "docs"
  spec = importlib.util.spec_from_file_location(
    "jfog_drawings", folder / "jfog_drawings.py"
  )
  drawings = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(drawings)
  for name, text in drawings.drawings().items():
    assert (folder / "images" / name).read_text() == text, (
      f"{name} is another one; run python docs/jfog_drawings.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files(page):
  for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
    assert (page.parent / target).exists(), f"{page_name(page)}: {target}"


@pytest.mark.parametrize("page", MAPS, ids=page_name)
def test_named_files_and_functions_exist(page):
  """Paths, and in `path: name` the name in that file."""
  text = page.read_text()
  path = r"(?:jfog|xla_ops|tests|docs|examples|benchmarks|cmake)/[\w./-]*\w"
  for found in sorted(set(re.findall(rf"(?<![\w./]){path}", text))):
    if SKETCH not in found:
      assert (ROOT / found).exists(), f"{page_name(page)} names {found}"
  for found, names in re.findall(rf"`({path}): ([\w, ~]+)`", text):
    source = (ROOT / found).read_text()
    for name in names.split(", "):
      assert re.search(rf"\b{name}\b", source), (
        f"{page_name(page)} names {name} in {found}"
      )
