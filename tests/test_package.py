"""The package as a whole: what its import costs, its names and their reprs."""

import importlib.metadata
import pydoc
import re
import subprocess
import sys

import pytest

import jfog
from jfog.optimizers import compressors, contrib


def python(*arguments):
  done = subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("statement", ["import jfog", "import jfog.cli"])
def test_import_alone_does_not_import_jax(statement):
  loaded = python("-c", f"{statement}, sys; print(*sys.modules)").split()
  assert "jfog" in loaded
  assert not {"jax", "numpy", "networkx", "optax"}.intersection(loaded)


def test_version_is_that_of_the_distribution():
  assert jfog.__version__ == importlib.metadata.version("jfog")
  assert python("-m", "jfog", "--version") == f"jfog {jfog.__version__}\n"
  assert "topology" in python("-m", "jfog", "--help")


def test_all_names_exist_and_are_listed():
  modules = [jfog, jfog.topology, jfog.optimizers, jfog.diagnostics]
  modules += [compressors, contrib]
  plain = getattr(pydoc, "plaintext")  # noqa: B009, not in its stub
  for module in modules:
    assert len(set(module.__all__)) == len(module.__all__) > 0
    assert set(module.__all__) <= set(dir(module))
    text = pydoc.render_doc(module, renderer=plain)
    for name in module.__all__:
      assert getattr(module, name) is not None
      assert re.search(rf"\b{name}\b", text), f"{name} in {module.__name__}"
  with pytest.raises(AttributeError, match="neighbor_alreduce"):
    getattr(jfog, "neighbor_" + "alreduce")


def test_reprs_are_the_calls_that_made_them():
  optimizers = jfog.optimizers
  assert repr(optimizers.top_k(k=3)) == "top_k(k=3)"
  assert repr(optimizers.random_k(fraction=0.5)) == "random_k(fraction=0.5)"
  assert repr(optimizers.quantize(4)) == "quantize(bits=4)"
  assert repr(optimizers.low_rank(2)) == "low_rank(rank=2)"
  assert repr(optimizers.sign()) == "sign()"

  def encode(key, tree, state):
    return tree, state

  mine = optimizers.Compressor(lambda tree: (), encode, lambda x, like: x)
  assert repr(mine).startswith("Compressor(test_reprs")


@pytest.mark.places("single", "mpi-2")
def test_repr_of_a_communicator(place):
  if place.size == 1:
    assert repr(jfog.init()) == "<jfog communicator: rank 0 of 1, single>"
    return
  text = f"<jfog communicator: rank {jfog.rank()} of 2, mpi, 1 machine>"
  assert repr(jfog.init()) == text
