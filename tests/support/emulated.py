"""NCCL and CUDA without a GPU: builds tests/emulation and runs handlers on it."""

import ctypes
import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile

import jax

from jfog.primitives import _lowering
from jfog.runtime import _bootstrap, _extensions

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "tests" / "emulation"
API = _ROOT / "xla_ops" / "nccl" / "api.h"
_libraries: dict[str, ctypes.CDLL] = {}


def build(folder) -> pathlib.Path:
  """Compiles the emulation into a folder, unless a new one lies there.

  Args:
    folder: where the library is to lie.

  Returns:
    The library's path, for `jfog._nccl.open_nccl` and `open_cuda`.

  Raises:
    RuntimeError: with the compiler's output, or if there is no compiler.
  """
  library = pathlib.Path(folder) / "libjfog_emulation.so"
  sources = sorted(_SOURCES.glob("*.cc"))
  read = [*_SOURCES.iterdir(), API]
  newest = max(path.stat().st_mtime for path in read)
  if library.exists() and library.stat().st_mtime > newest:
    return library
  compile_shared(library, sources)
  return library


def compile_shared(library: pathlib.Path, sources, includes=()) -> None:
  """Compiles sources, and links them with the libraries among them."""
  if not compiler():
    raise RuntimeError("there is no C++ compiler; install one or set CXX")
  flags = [
    *("-std=c++17", "-O1", "-fPIC", "-pthread", "-Wall", "-Wextra"),
    *("-I", str(_ROOT / "xla_ops"), "-isystem", jax.ffi.include_dir()),
    *(f"-isystem{folder}" for folder in includes),
  ]
  with tempfile.TemporaryDirectory(dir=library.parent) as folder:
    objects = [
      path if path.suffix == ".so" else pathlib.Path(folder, f"{path.stem}.o")
      for path in sources
    ]
    _finish(
      [*compiler(), *flags, "-c", str(path), "-o", str(made)]
      for path, made in zip(sources, objects, strict=True)
      if path != made
    )
    made = pathlib.Path(folder, library.name)
    links = ["-shared", "-pthread", "-Wl,-Bsymbolic", "-Wl,-z,defs"]
    _finish([[*compiler(), *links, *map(str, objects), "-o", str(made)]])
    made.replace(library)


def _finish(commands) -> None:
  """Runs commands at the same time."""
  running = [
    (
      command,
      subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      ),
    )
    for command in commands
  ]
  outputs = [process.communicate()[0] for _, process in running]
  for (command, process), output in zip(running, outputs, strict=True):
    if process.returncode:
      raise RuntimeError(
        f"the library does not build:\n{shlex.join(command)}\n{output}"
      )


def compiler() -> list[str]:
  """The command of the machine's C++ compiler, empty if there is none."""
  if command := os.environ.get("CXX"):
    return shlex.split(command)
  for name in ("c++", "g++", "clang++"):
    if found := shutil.which(name):
      return [found]
  return []


def load(path) -> ctypes.CDLL:
  """The library at a path, which stays loaded."""
  key = str(pathlib.Path(path).resolve())
  if key not in _libraries:
    library = ctypes.CDLL(key)
    for name, result, *arguments in (
      ("wrap", ctypes.c_void_p, ctypes.c_void_p),
      ("main_stream", ctypes.c_void_p),
      ("calls", ctypes.c_long, ctypes.c_char_p),
      ("live", ctypes.c_long, ctypes.c_char_p),
      ("fail", None, ctypes.c_char_p, ctypes.c_long, ctypes.c_int),
      ("faults", ctypes.c_long),
      ("group_count", ctypes.c_long),
    ):
      function = getattr(library, f"jfog_emulation_{name}")
      function.restype = result
      function.argtypes = arguments
    _libraries[key] = library
  return _libraries[key]


def wrap(library, registrations: dict) -> dict:
  """Makes handlers for XLA:GPU run in XLA:CPU.

  Args:
    library: the result of `load`, or the library's path.
    registrations: targets with their capsule, or with one for each stage.

  Returns:
    The same with another capsule for the stage "execute": it calls the handler
    with the emulated stream, and waits for that before it returns.
  """
  if not isinstance(library, ctypes.CDLL):
    library = load(library)

  def one(handler):
    if not isinstance(handler, dict):
      return _wrap(library, handler)
    return {**handler, "execute": _wrap(library, handler["execute"])}

  return {target: one(handler) for target, handler in registrations.items()}


def carry_jfog(path) -> ctypes.CDLL:
  """Makes this process use the emulation as NCCL, and its CPU as a GPU.

  From then on all operations compiled for CPUs run jfog's NCCL handlers, where the
  world's backend is `"nccl"`.

  Args:
    path: the result of `build`.

  Returns:
    The emulation.
  """
  library = load(path)
  module = _extensions.open_nccl(str(path), str(path))
  _extensions.register_nccl(
    module, "cpu", lambda targets: wrap(library, targets)
  )
  _extensions.nccl = functools.cache(lambda: module)
  _extensions.nccl()
  _bootstrap._take_gpu = lambda backend, context, rank, leaders: 0
  _lowering.use_backend_for_tests("nccl", "cpu")
  return library


def _python(name: str, result, *arguments):
  """A function of Python's C interface."""
  return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_capsule_name = _python("PyCapsule_GetName", ctypes.c_void_p, ctypes.py_object)
_capsule_pointer = _python(
  "PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p
)
_capsule = _python(
  "PyCapsule_New",
  *(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
)


def capsule_pointer(capsule) -> int:
  """The pointer in a capsule of any name."""
  return _capsule_pointer(capsule, _capsule_name(capsule))


def _wrap(library: ctypes.CDLL, capsule):
  """A capsule of the trampoline to the handler in a capsule."""
  handler = library.jfog_emulation_wrap(capsule_pointer(capsule))
  if not handler:
    raise RuntimeError("too many handlers; raise kTrampolines in handlers.cc")
  # The name is a constant of the handler's library.
  return _capsule(handler, _capsule_name(capsule), None)
