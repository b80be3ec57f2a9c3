"""The checks of the house test report a planted offense, and nothing without one."""

import pytest
from support import house, measure

TREE = {
  "jfog/__init__.py": '"""The package."""\n',
  "jfog/_mpi.pyi": "def init(timeout: float) -> None: ...\n",
  "jfog/runtime/__init__.py": '"""Resources."""\n',
  "jfog/runtime/_world.py": (
    '"""The world."""\n\n\ndef size(rank: int) -> int:\n  return rank\n'
  ),
  "jfog/primitives/__init__.py": (
    '"""Operations."""\n\nfrom ._ring import ring as ring\n'
  ),
  "jfog/primitives/_ring.py": (
    '"""The ring."""\n\nfrom jfog.runtime._world import size as ring\n'
  ),
  "xla_ops/common/hash.h": "// Hashes.\nint a;\n",
  "xla_ops/mpi/payload.h": '// Payload.\n#include "common/hash.h"\n',
  "xla_ops/mpi/ring.h": '// The ring.\n#include "mpi/payload.h"\n',
  "xla_ops/mpi/ring.cc": '// The ring.\n#include "mpi/ring.h"\n',
  "xla_ops/mpi/module.cc": (
    '// The table.\n#include "mpi/ring.h"\n'
    'm.def("init", &Init, py::arg("timeout"));\n'
  ),
  "xla_ops/nccl/group.h": "// Groups.\n",
  "tests/test_ring.py": '"""The ring."""\n',
  "CMakeLists.txt": "xla_ops/common/*.cc xla_ops/mpi/*.cc xla_ops/nccl/*.cc\n",
  "BUILD.bazel": "xla_ops/common/*.cc xla_ops/mpi/*.cc xla_ops/nccl/*.cc\n",
}
LAYERS = {"runtime": {"_compat"}, "primitives": {"runtime", "_compat"}}
SIX_LINES = "// The same.\n" + "".join(f"int line{i};\n" for i in range(6))


def files(root, suffix):
  """The files below a folder whose names end with a suffix."""
  return [path for path in root.rglob("*") if path.suffix == suffix]


CHECKS = {
  "layers": lambda root: house.imports_upward(root, LAYERS, {}),
  "import circle": house.import_circles,
  "private JAX": house.private_jax,
  "list": house.inits_with_code,
  "opening line": house.without_opening_line,
  "builds": house.unequal_builds,
  "stub": lambda root: house.stub_differences(root, "mpi"),
  "include circle": house.include_circles,
  "includes": lambda root: house.includes_upward(root, {"mpi/payload"}),
  "stems": lambda root: house.missing_stems(root, set(), {}, {}),
  "lengths": lambda root: house.lengths(root, "jfog", measure.PYTHON, 400, 600),
  "annotations": lambda root: house.few_annotations(root, "jfog", 0.9),
  "words": lambda root: house.words(
    root, [*files(root, ".py"), *files(root, ".h")], {"centre_of": "a name"}
  ),
  "copies": lambda root: house.equal_runs(root, 6),
  "paths": lambda root: house.machine_paths(root, files(root, ".py")),
}


def runtime(text):
  """A tree of one more module in jfog/runtime."""
  return {"jfog/runtime/_planted.py": f'"""Planted."""\n\n{text}\n'}


OFFENSES = [
  ("layers", runtime("import jfog.primitives")),
  ("layers", runtime("def late():\n  from ..primitives import ring")),
  ("layers", runtime("import jfog")),
  ("layers", {"jfog/newcomer.py": '"""A part without a layer."""\n'}),
  (
    "import circle",
    {
      "jfog/runtime/_a.py": '"""A."""\nfrom . import _b\n',
      "jfog/runtime/_b.py": '"""B."""\nfrom jfog.runtime._a import x\n',
    },
  ),
  ("private JAX", runtime("from jax._src import core")),
  ("private JAX", runtime("name = 'jax._src'")),
  ("list", {"jfog/runtime/__init__.py": '"""Code."""\n\nx = 1\n'}),
  (
    "list",
    {"jfog/runtime/__init__.py": '"""Code."""\n\nfrom ._world import size\n'},
  ),
  ("opening line", {"jfog/runtime/_bare.py": "x = 1\n"}),
  ("opening line", {"xla_ops/mpi/bare.h": "int x;\n"}),
  ("builds", {"xla_ops/tpu/ring.cc": "// The ring.\n"}),
  ("stub", {"jfog/_mpi.pyi": "def init(deadline: float) -> None: ...\n"}),
  (
    "include circle",
    {"xla_ops/mpi/payload.h": '// Payload.\n#include "mpi/ring.h"\n'},
  ),
  ("includes", {"xla_ops/mpi/payload.h": '// Up.\n#include "mpi/ring.h"\n'}),
  ("includes", {"xla_ops/common/hash.h": '// Up.\n#include "mpi/ring.h"\n'}),
  ("includes", {"xla_ops/nccl/group.h": '// Over.\n#include "mpi/ring.h"\n'}),
  ("stems", {"jfog/primitives/_star.py": '"""The star."""\n'}),
  ("lengths", {"jfog/runtime/_long.py": '"""Long."""\n' + "x = 1\n" * 600}),
  ("lengths", {"jfog/runtime/_world.py": "x = 1\n" * 450}),
  ("annotations", runtime("def f(x, *, y: int): ...")),
  ("words", runtime("# The colour of an edge.")),
  ("words", runtime("# What comes in.")),
  ("words", runtime('def f():\n  """Who waits."""')),
  ("words", runtime("# Runs of its own accord.")),
  ("words", runtime("text = 'rank 5 is no rank'")),
  ("words", {"xla_ops/mpi/words.h": "// Whose buffer it is.\nint x;\n"}),
  (
    "copies",
    {"xla_ops/mpi/copy.h": SIX_LINES, "xla_ops/nccl/copy.h": SIX_LINES},
  ),
  ("paths", runtime("home = '/" + "home/someone'")),
]


def plant(root, *trees):
  """Writes files below a folder, those of later trees over the earlier ones."""
  for tree in trees:
    for name, text in tree.items():
      path = root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)


def test_a_tree_without_offenses_passes_every_check(tmp_path):
  # "history" holds a banned word, and "centre_of" is an exception.
  plant(tmp_path, TREE, runtime("# The history of centre_of is fine."))
  assert {name: check(tmp_path) for name, check in CHECKS.items()} == {
    name: [] for name in CHECKS
  }


@pytest.mark.parametrize("check, tree", OFFENSES)
def test_a_planted_offense_is_reported(check, tree, tmp_path):
  plant(tmp_path, TREE, tree)
  assert CHECKS[check](tmp_path)


def test_every_check_has_an_offense():
  assert {check for check, _ in OFFENSES} == set(CHECKS)


@pytest.mark.parametrize(
  "text",
  [
    *("the how-manieth", "is told", "bury it", "whom it waits for"),
    *("are no ranks", "nobody waits", "neighbours", "behaviour", "optimise"),
    *("initialised", "synchronisation", "normalise", "recognised", "organise"),
    *("summarise", "serialise", "realise", "favour", "centre", "cancelled"),
    *("labelled", "modelling", "travelling", "a programme", "begin anew"),
    *("gives away", "hears of", "lets the rank know", "by himself", "his own"),
    *("alike", "otherwise than", "whoever", "is buried", "is no rank"),
  ],
)
def test_each_banned_word_is_found(text, tmp_path):
  plant(tmp_path, {"a.md": f"Some text: {text}\n"})
  assert house.words(tmp_path, [tmp_path / "a.md"], {})


def test_figures_of_a_small_tree(tmp_path):
  text = (
    '"""Two functions."""\n\n\n'
    'def f(self, a: int, b):\n  """Doc."""\n  # Why.\n  return a  # Also.\n\n\n'
    "def g(*c: int):\n  return c\n"
  )
  header = "// A header.\nint a;  // b\nint c;\n"
  plant(tmp_path, {"a.py": text, "b.h": header})
  figures = measure.python(tmp_path)
  assert figures and figures.count == 1 and figures.longest_lines == 11
  assert (figures.function_p50, figures.function_p90) == (2, 2)
  assert (figures.comments, figures.annotated) == (0.5, 2 / 3)
  native = measure.cpp(tmp_path)
  assert native and native.comments == 1.0
  assert measure.quantile(range(1, 11), 0.9) == 9
