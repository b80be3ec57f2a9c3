"""The package as a program: `jfog run`, or with `--rank-main` one rank's wrapper.

`python -I -S .../jfog/launch` needs the standard library only. The import of
`jfog` would load jax in every wrapper, so that the folder started in this way is
a package of its own, named `launch`; `python -m jfog.launch` keeps its name.
"""

import os
import sys

_name = __package__
if not _name:
  sys.path.pop(0)  # the folder itself, whose modules would be top-level ones
  _name = "launch"
  _folder = type(sys)(_name)
  _folder.__path__ = [os.path.dirname(os.path.abspath(__file__))]
  sys.modules[_name] = _folder


def _call(module: str, function: str, *arguments: list[str]) -> int:
  """Calls a function of a sibling module, which is imported only now."""
  loaded = __import__(f"{_name}.{module}", fromlist=[function])
  return getattr(loaded, function)(*arguments)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--rank-main"]:
    sys.stdout.flush()
    # Skips the interpreter's cleanup: it is slow, and a copying thread may live.
    os._exit(_call("rank", "rank_main", sys.argv[2:]))
  sys.exit(_call("launcher", "main"))
