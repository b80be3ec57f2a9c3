"""The native module and what this installation was built with."""

import functools
import pkgutil
import types

import jax

import jfog


@functools.cache
def build() -> types.SimpleNamespace:
  """`MPI_FAMILY`, `MPI_LIBRARY` and `MPI_LAUNCHER` of the build."""
  # Python started in jfog's source tree takes the package from there; what the
  # build made lies in the installed one.
  jfog.__path__ = pkgutil.extend_path(jfog.__path__, jfog.__name__)
  try:
    from jfog import _build
  except ImportError:  # never installed
    return types.SimpleNamespace(MPI_FAMILY="", MPI_LIBRARY="", MPI_LAUNCHER="")
  return types.SimpleNamespace(**vars(_build))


@functools.cache
def mpi():
  """The extension `jfog._mpi`, with its handlers registered with XLA.

  Loads the MPI library but does not start MPI.

  Raises:
    RuntimeError: if jfog was built without MPI, or if the MPI library that was
      loaded is not the one that jfog was built with.
  """
  if not build().MPI_FAMILY:
    raise RuntimeError(
      "this jfog was installed without MPI, because the build found no C++ "
      "compiler or no MPI, or was told to; reinstall it where both are there, "
      "or use jfog.simulate or jfog.spmd, which need no MPI."
    )
  try:
    from jfog import _mpi
  except ImportError as error:
    raise RuntimeError(
      f"jfog's MPI extension, built with {build().MPI_LIBRARY}, does not load: "
      f"{error}. Reinstall jfog in this environment."
    ) from error
  _check_library(_mpi.BUILT_WITH, _mpi.library_version())
  for name, handler in _mpi.registrations().items():
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
  return _mpi


def _check_library(built: str, loaded: str) -> None:
  """Compares family and major version of two library version texts."""
  if _family_and_major(built) != _family_and_major(loaded):
    loaded = loaded.splitlines()[0] if loaded else "an unknown library"
    raise RuntimeError(
      f"jfog was built with {built!r} but this process has loaded {loaded!r}; "
      f"another package has brought its own MPI. Import jfog before it, or "
      f"rebuild jfog with JFOG_MPI=system against that MPI."
    )


def _family_and_major(version: str) -> tuple[str, str]:
  """`("Open MPI", "5")` of `"Open MPI v5.0.11, package: ..."`."""
  words = version.replace(":", " ").replace(",", " ").split()
  for i, word in enumerate(words):
    digits = word.removeprefix("v").split(".")[0]
    if digits.isdigit():
      return " ".join(words[:i]), digits
  return version, ""
