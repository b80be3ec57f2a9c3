"""Placement of ranks on GPUs, with a stand-in for the CUDA driver."""

import ctypes
import os
import shutil
import subprocess
import sys
import types

import jax
import pytest

from jfog import _compat
from jfog.runtime import _gpu_placement

CUDA = ["jax_plugins.xla_cuda13"]
DRIVER = r"""
#include <stdio.h>
#include <string.h>

static int devices, failure;

void pretend(int count, int code) { devices = count; failure = code; }
int cuInit(unsigned flags) { return flags ? 1 : failure; }
int cuDeviceGetCount(int* count) { *count = devices; return 0; }
int cuDeviceGet(int* device, int index) {
  *device = 10 + index;
  return index < devices ? 0 : 101;
}
int cuDeviceGetName(char* name, int length, int device) {
  snprintf(name, length, "Stand-in %d", device);
  return 0;
}
int cuDeviceGetUuid_v2(void* uuid, int device) {
  memset(uuid, device, 16);
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 101 ? "invalid device ordinal" : "forward compatibility";
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """The path of a CUDA driver that pretends to have GPUs."""
  compiler = shutil.which("cc")
  if compiler is None:
    pytest.skip("needs a C compiler for the stand-in of the CUDA driver")
  folder = tmp_path_factory.mktemp("driver")
  source, library = folder / "cuda.c", folder / "libcuda.so"
  source.write_text(DRIVER)
  words = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
  subprocess.run(words, check=True)
  return str(library)


@pytest.fixture
def driver(library, platforms):
  """A function that says how many GPUs there are, and what cuInit returns."""
  platforms("cuda,cpu")
  return ctypes.CDLL(library).pretend


@pytest.fixture
def platforms():
  """A function that sets JAX's platforms until the end of the test."""
  before = _gpu_placement._config.jax_platforms
  yield lambda names: jax.config.update("jax_platforms", names)
  jax.config.update("jax_platforms", before)


@pytest.fixture
def unstarted(monkeypatch):
  """JAX as it is before its backends start; what is set goes into a dict."""
  option = {"jax_cuda_visible_devices": "all"}
  monkeypatch.setattr(_compat, "backends_are_started", lambda: False)
  monkeypatch.setattr(
    _compat,
    "visible_cuda_devices",
    lambda: option["jax_cuda_visible_devices"],
  )
  monkeypatch.setattr(_gpu_placement.jax.config, "update", option.__setitem__)
  return option


@pytest.fixture
def started(monkeypatch):
  """JAX with two started GPUs, those that CUDA calls 4 and 6."""
  devices = [types.SimpleNamespace(local_hardware_id=i) for i in (4, 6)]
  option = {}
  monkeypatch.setattr(_compat, "backends_are_started", lambda: True)
  monkeypatch.setattr(_gpu_placement, "_started_gpus", lambda: devices)
  monkeypatch.setattr(_gpu_placement.jax.config, "update", option.__setitem__)
  return option


def test_gpus_have_names_and_identities(driver, library):
  driver(2, 0)
  found = _gpu_placement.gpus(library, CUDA)
  assert found == _gpu_placement.Gpus(("Stand-in 10", "Stand-in 11"))
  assert _gpu_placement.gpu_count(library, CUDA) == 2
  assert _gpu_placement.identity(1, library) == bytes([11] * 16)
  with pytest.raises(RuntimeError, match=r"cuDeviceGet: invalid device.*101"):
    _gpu_placement.identity(2, library)


@pytest.mark.parametrize(
  ("count", "code", "reason"),
  [
    (0, 0, "the CUDA driver finds no GPU"),
    (0, 100, "the CUDA driver finds no GPU"),
    (1, 803, "the CUDA driver fails: cuInit: forward compatibility (803)"),
  ],
)
def test_a_driver_without_gpus_says_why(driver, library, count, code, reason):
  driver(count, code)
  assert _gpu_placement.gpus(library, CUDA) == _gpu_placement.Gpus(
    reason=reason
  )
  assert _gpu_placement.gpu_count(library, CUDA) == 0


def test_no_driver(platforms, tmp_path):
  platforms(None)
  found = _gpu_placement.gpus(str(tmp_path / "libcuda.so.1"), CUDA)
  assert found.names == ()
  assert found.reason.startswith("no CUDA driver: ")


def test_what_jax_does_not_use_is_not_counted(driver, library, platforms):
  driver(2, 0)
  assert _gpu_placement.gpu_count(library, []) == 0
  assert (
    "cuda13" in _gpu_placement.gpus(library, ["jax_plugins.xla_tpu"]).reason
  )
  for names in ("cpu", "tpu,cpu"):
    platforms(names)
    assert names in _gpu_placement.gpus(library, CUDA).reason
  for names in (None, "", "gpu", "cpu, cuda"):
    platforms(names)
    assert _gpu_placement.gpu_count(library, CUDA) == 2


def test_plugins_are_found_as_jax_finds_them(tmp_path, library):
  for name in ("one", "two"):
    (tmp_path / name / "jax_plugins" / f"xla_{name}").mkdir(parents=True)
  folders = [str(tmp_path / name) for name in ("one", "two")]
  metadata = tmp_path / "one" / "other-1.dist-info"
  metadata.mkdir()
  (metadata / "METADATA").write_text("Name: other\nVersion: 1\n")
  text = "[jax_plugins]\nother = elsewhere.xla_cuda99\n"
  (metadata / "entry_points.txt").write_text(text)
  for name in ("one", "two"):
    folder = tmp_path / name / "jax_plugins" / f"xla_{name}"
    (folder / "__init__.py").write_text("raise ImportError('not to be run')\n")
  program = f"""
import sys
sys.path[:0] = {folders}
from jfog.runtime import _gpu_placement
found = _gpu_placement._plugins()
assert {{"xla_one", "xla_two", "elsewhere.xla_cuda99"}} <= set(found), found
"""
  python(program)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_go_round_the_gpus(unstarted, count):
  for local in range(4):
    unstarted["jax_cuda_visible_devices"] = "all"
    placement = _gpu_placement.place(local, 4, count, environ={})
    sharing = sum(other % count == local % count for other in range(4))
    assert placement == _gpu_placement.Placement(local % count, count, sharing)
    chosen = (
      str(local % count) if count > 1 else "all"
    )  # one: nothing to choose
    assert unstarted == {"jax_cuda_visible_devices": chosen}


def test_what_the_user_has_chosen_is_kept(unstarted):
  unstarted["jax_cuda_visible_devices"] = "3,2"
  assert _gpu_placement.place(1, 2, 4, environ={}).index == 3
  assert unstarted == {"jax_cuda_visible_devices": "3,2"}


def test_started_backends_get_a_default_device(started):
  environ = {}
  assert _gpu_placement.place(1, 2, 2, environ=environ).index == 6
  assert started["jax_default_device"].local_hardware_id == 6
  assert environ == {}


def test_the_default_device_of_the_user_is_kept(started):
  with jax.default_device(jax.devices("cpu")[0]):
    _gpu_placement.place(1, 2, 2, environ={})
  assert started == {}


def test_ranks_that_share_a_gpu_share_its_memory(unstarted):
  environ = {}
  _gpu_placement.place(2, 5, 2, environ=environ)
  assert environ == {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "XLA_CLIENT_MEM_FRACTION": "0.250",
  }
  environ = {}
  assert _gpu_placement.place(3, 4, 1, sharing=1, environ=environ).sharing == 1
  assert environ == {}


@pytest.mark.parametrize(
  "name",
  [
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
  ],
)
def test_what_the_user_says_of_sharing_is_kept(unstarted, name):
  users = {"NCCL_MULTI_RANK_GPU_ENABLE": "0", name: "0.1"}
  environ = dict(users)
  _gpu_placement.place(0, 2, 1, environ=environ)
  assert environ == users


def test_old_nccls_see_a_host_for_each_rank_of_a_shared_gpu():
  shared, alone = (
    _gpu_placement.Placement(0, 1, 2),
    _gpu_placement.Placement(0, 1, 1),
  )
  environ = {}
  assert _gpu_placement.separate_hosts(shared, 3, 22907, environ)
  assert environ == {"NCCL_HOSTID": "jfog-3"}
  for placement, version in ((alone, 22907), (shared, 23000)):
    environ = {}
    assert not _gpu_placement.separate_hosts(placement, 3, version, environ)
    assert environ == {}
  environ = {"NCCL_HOSTID": "mine"}
  assert not _gpu_placement.separate_hosts(shared, 3, 21800, environ)
  assert environ == {"NCCL_HOSTID": "mine"}


@pytest.mark.parametrize("arguments", [(2, 2, 1), (-1, 2, 1), (0, 1, 0)])
def test_impossible_places(arguments):
  with pytest.raises(ValueError, match="0 <= local_rank < local_size"):
    _gpu_placement.place(*arguments)


def test_placement_in_words():
  assert str(_gpu_placement.Placement(1, 4, 1)) == "GPU 1 of 4"
  assert str(_gpu_placement.Placement(0, 1, 3)) == "GPU 0 of 1, with 3 ranks"


def test_jax_takes_the_option_and_is_not_started(library):
  program = f"""
import ctypes, os, jax
from jfog import _compat
from jfog.runtime import _gpu_placement
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
jax.config.update("jax_platforms", "cuda,cpu")
ctypes.CDLL({library!r}).pretend(4, 0)
count = _gpu_placement.gpu_count({library!r}, {CUDA})
assert count == 4, count
placement = _gpu_placement.place(2, 4, count)
assert (placement.index, placement.sharing) == (2, 1), placement
assert _compat.visible_cuda_devices() == "2"
assert not _compat.backends_are_started()
jax.config.update("jax_platforms", "cpu")
jax.devices()
assert _compat.backends_are_started()
assert _gpu_placement.chosen(3, 4) == 3  # started, but not on GPUs
"""
  python(program)


def python(program):
  """Runs a program in a process of its own, which must end well."""
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
