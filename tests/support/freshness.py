"""Refuses to test a jfog that differs from the source tree beside the tests.

`pip install .` leaves a copy, which an edit of the tree does not reach. Tests of
that copy would pass or fail for the wrong code.
"""

import pathlib
import runpy

import jfog
from jfog.runtime import _extensions

ROOT = pathlib.Path(__file__).resolve().parents[2]
REMEDY = (
  "install it again with `pip install .`, or once with `pip install "
  "--no-build-isolation -Ceditable.rebuild=true -e .`, which follows the tree"
)


def difference() -> str:
  """How the jfog that is imported differs from the tree; "" if it does not."""
  folder = pathlib.Path(jfog.__file__).resolve().parent
  if folder != ROOT / "jfog":
    installed, tree = _modules(folder), _modules(ROOT / "jfog")
    names = sorted(
      name
      for name in installed.keys() | tree.keys()
      if installed.get(name) != tree.get(name)
    )
    if names:
      return (
        f"{len(names)} modules of {folder} differ from the source tree "
        f"({', '.join(names[:3])}, ...)"
      )
  build = _extensions.build()
  sources = getattr(build, "SOURCES", "")
  digest = runpy.run_path(str(ROOT / "cmake" / "sources.py"))["digest"]()
  if sources and sources != digest:
    return "the native modules were built from other sources than xla_ops holds"
  return ""


def _modules(folder: pathlib.Path) -> dict[str, bytes]:
  """The contents of a package's modules by name, without what the build makes."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*.py")
    if path.name != "_build.py"
  }
