"""The digest of the C++ sources, by which a build is compared with the tree.

Usage: python cmake/sources.py TEMPLATE OUTPUT. Writes the template with its
`@SOURCES@` replaced by the digest.
"""

import hashlib
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "xla_ops"


def digest() -> str:
  """SHA-256 of the names and contents of all files of xla_ops, in hex."""
  found = hashlib.sha256()
  for path in sorted(FOLDER.rglob("*")):
    if path.suffix in (".cc", ".h"):
      found.update(path.relative_to(FOLDER).as_posix().encode() + b"\0")
      found.update(path.read_bytes() + b"\0")
  return found.hexdigest()


if __name__ == "__main__":
  template, output = map(pathlib.Path, sys.argv[1:])
  output.write_text(template.read_text().replace("@SOURCES@", digest()))
