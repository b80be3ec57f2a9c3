"""How this installation was built; see cmake/_build.py.in."""

MPI_FAMILY: str
MPI_LIBRARY: str
MPI_LAUNCHER: str
SOURCES: str
