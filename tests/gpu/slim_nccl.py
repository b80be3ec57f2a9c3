"""Makes a copy of NCCL that holds the code of one GPU architecture only.

NVIDIA's library has 340 MB, of which one kind of GPU uses 20. Files keep their
layout: what is left out is zeroed, so that the copy compresses to what is left.

Source: the format of fat binaries, as `cuobjdump` lists them; it is not
documented. Each container has a header of 16 bytes and entries, each with a
header with its kind, its size and the architecture.
"""

import argparse
import collections
import pathlib
import struct

# Magic number, version, bytes of the header and of the entries.
_CONTAINER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")  # kind, attributes, bytes of header, of payload
_MAGIC = 0xBA55ED50
_ARCHITECTURE = 28  # offset in the header of an entry
# Not read at run time: code before its last link, and debug information.
_UNUSED = ("__nv_relfatbin", ".debug_")


def sections(library: bytes) -> dict[str, tuple[int, int]]:
  """The offset and the bytes of each section of a 64-bit ELF file."""
  (table,) = struct.unpack_from("<Q", library, 40)
  size, count, names_at = struct.unpack_from("<HHH", library, 58)
  headers = [
    struct.unpack_from("<IIQQQQ", library, table + i * size)
    for i in range(count)
  ]
  names = headers[names_at][4]
  found = {}
  for name, _, _, _, offset, length in headers:
    end = library.index(b"\0", names + name)
    found[library[names + name : end].decode()] = offset, length
  return found


def slim(library: bytearray, architecture: int) -> collections.Counter:
  """Zeroes what a GPU of this architecture (90 for 9.0) does not use.

  Returns:
    The number of entries that are kept and left out, by kind and architecture.
  """
  all_sections = sections(bytes(library))
  for name, (offset, length) in all_sections.items():
    if name.startswith(_UNUSED):
      library[offset : offset + length] = bytes(length)
  counts: collections.Counter = collections.Counter()
  at, length = all_sections[".nv_fatbin"]
  end = at + length
  while at + _CONTAINER.size <= end:
    magic, _, header, entries = _CONTAINER.unpack_from(library, at)
    if magic != _MAGIC:
      at += 8  # containers are aligned
      continue
    at += header
    last = at + entries
    while at < last:
      kind, _, header, payload = _ENTRY.unpack_from(library, at)
      (of,) = struct.unpack_from("<I", library, at + _ARCHITECTURE)
      kept = of == architecture
      counts["kept" if kept else "left out", kind, of] += 1
      if not kept:
        library[at + header : at + header + payload] = bytes(payload)
      at += header + payload
  return counts


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("library", type=pathlib.Path, help="libnccl.so.2")
  parser.add_argument("copy", type=pathlib.Path)
  parser.add_argument("--architecture", type=int, default=90)
  options = parser.parse_args()
  content = bytearray(options.library.read_bytes())
  for what, count in sorted(slim(content, options.architecture).items()):
    print(*what, count)
  options.copy.write_bytes(content)
