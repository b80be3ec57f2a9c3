"""The native modules: loading, registration with XLA, and build constants."""

import functools
import importlib.util
import pathlib
import pkgutil
import threading
import types
from collections.abc import Callable
from typing import Any

import jax

import jfog
from jfog import _compat

# Held by the first lowering, since threads of the caller may lower at once.
_registration = threading.Lock()


@functools.cache
def build() -> types.SimpleNamespace:
  """`MPI_FAMILY`, `MPI_LIBRARY` and `MPI_LAUNCHER` of the build."""
  # Python started in jfog's source tree imports the package from there, but the
  # build's outputs are in the installed one.
  jfog.__path__ = pkgutil.extend_path(jfog.__path__, jfog.__name__)
  try:
    from jfog import _build
  except ImportError:  # never installed
    return types.SimpleNamespace(MPI_FAMILY="", MPI_LIBRARY="", MPI_LAUNCHER="")
  return types.SimpleNamespace(**vars(_build))


@functools.cache
def mpi() -> Any:
  """The extension `jfog._mpi`, whose handlers the first lowering registers.

  Loads the MPI library but starts neither MPI nor the backends of JAX, whose
  options `init` and its caller may still set.

  Raises:
    RuntimeError: if jfog was built without MPI, or if the MPI library that was
      loaded is not the one that jfog was built with.
  """
  if not build().MPI_FAMILY:
    raise RuntimeError(
      "this jfog was installed without MPI: the build found no C++ compiler or "
      "no MPI, or JFOG_MPI disabled it. Reinstall it with both, or use "
      "jfog.simulate or jfog.spmd, which need no MPI."
    )
  try:
    from jfog import _mpi
  except ImportError as error:
    raise RuntimeError(
      f"jfog's MPI extension, built with {build().MPI_LIBRARY}, does not load: "
      f"{error}. Reinstall jfog in this environment."
    ) from error
  _check_library(_mpi.BUILT_WITH, _mpi.library_version())
  _compat.register_before_lowering(_register_mpi)
  return _mpi


def _register_mpi() -> None:
  """Registers the handlers of `jfog._mpi` for CPUs, at the first call."""
  with _registration:
    _register_mpi_once()


@functools.cache
def _register_mpi_once() -> None:
  _register(mpi().types(), mpi().registrations(), "cpu")


@functools.cache
def nccl() -> Any:
  """The extension `jfog._nccl`, with its handlers registered with XLA.

  Opens the CUDA driver and a library of NCCL: the one that this process has
  loaded already, else that of NVIDIA's wheel, else the system's.

  Raises:
    RuntimeError: if one of them is missing, too old or incomplete, or jfog was
      built without the extension.
  """
  module = open_nccl(_nccl_path())
  register_nccl(module, "CUDA")
  return module


def nccl_library() -> tuple[str, str]:
  """The version of NCCL that `nccl` opens, and the path of its file.

  Works without a GPU.

  Raises:
    RuntimeError: as `nccl` does, except for the CUDA driver.
  """
  module = _nccl_extension()
  module.open_nccl(_nccl_path())
  major, rest = divmod(module.version(), 10_000)
  return f"{major}.{rest // 100}.{rest % 100}", module.path()


def open_nccl(path: str, driver: str = "") -> Any:
  """The extension `jfog._nccl` with the libraries at these paths open."""
  module = _nccl_extension()
  module.open_cuda(driver)
  module.open_nccl(path)
  return module


def register_nccl(
  module: Any,
  platform: str,
  wrap: Callable[[dict[str, Any]], dict[str, Any]] = lambda targets: targets,
) -> None:
  """Registers the handlers of `jfog._nccl` for an XLA platform.

  Window operations and waits on them use the host fallback: `jfog._mpi`'s
  handlers, called on copies of the operands in host memory.

  Args:
    module: the extension, as `open_nccl` returns it.
    platform: the XLA platform, `"CUDA"`.
    wrap: maps the table of targets to the one that is registered; for tests.
  """
  host = {
    name.removeprefix("jfog_mpi_"): handler
    for name, handler in mpi().registrations().items()
  }
  staged = {name: host[name] for name in host if name.startswith("win_")}
  staged |= {f"staged_{name}": host[name] for name in ("wait", "poll")}
  targets = {**module.registrations(), **module.staged(staged)}
  _register(module.types(), wrap(targets), platform)


def _register(
  types: dict[str, Any], targets: dict[str, Any], platform: str
) -> None:
  """Registers FFI types, then the handlers that use them."""
  # Before its backends start, JAX defers registrations and then replays handlers
  # before the types that they use, which fails: start the backends first.
  jax.local_devices()
  for name, registration in types.items():
    jax.ffi.register_ffi_type(name, registration, platform=platform)
  for name, stages in targets.items():
    jax.ffi.register_ffi_target(name, stages, platform=platform)


def _nccl_extension() -> Any:
  """Imports `jfog._nccl`, which opens no library yet."""
  if not build().MPI_FAMILY:
    raise RuntimeError(
      "this jfog was installed without its native part: the build found no C++ "
      "compiler or no MPI. Reinstall it with both."
    )
  try:
    from jfog import _nccl
  except ImportError as error:
    raise RuntimeError(
      f"jfog's NCCL extension does not load: {error}. Reinstall jfog in this "
      f"environment."
    ) from error
  return _nccl


def _nccl_path() -> str:
  """The path of NCCL; "" for the loaded library, or else the system's."""
  if "libnccl.so" in pathlib.Path("/proc/self/maps").read_text():
    return ""
  try:
    wheel = importlib.util.find_spec("nvidia.nccl")
  except ImportError:
    return ""
  for folder in wheel.submodule_search_locations or () if wheel else ():
    library = pathlib.Path(folder) / "lib" / "libnccl.so.2"
    if library.exists():
      return str(library)
  return ""


def _check_library(built: str, loaded: str) -> None:
  """Requires the same family and major version of two library versions."""
  if _family_and_major(built) != _family_and_major(loaded):
    loaded = loaded.splitlines()[0] if loaded else "an unknown library"
    raise RuntimeError(
      f"jfog was built with {built!r} but this process has loaded {loaded!r}, "
      f"the MPI of another package. Import jfog before it, or rebuild jfog with "
      f"JFOG_MPI=system against that MPI."
    )


def _family_and_major(version: str) -> tuple[str, str]:
  """`("Open MPI", "5")` of `"Open MPI v5.0.11, package: ..."`."""
  words = version.replace(":", " ").replace(",", " ").split()
  for i, word in enumerate(words):
    digits = word.removeprefix("v").split(".")[0]
    if digits.isdigit():
      return " ".join(words[:i]), digits
  return version, ""
