"""Compiled programs that all processes of a test session share.

Compiling takes most of the tests' time, though most programs are the same on all
ranks, and small operations outside of `jit` the same in all jobs. JAX's own cache
writes files that another process may read half written, and lets ranks that come
to a program together all compile it; here they wait for the first.
"""

import os
import pathlib
import time
from typing import Any

import jax

_PATIENCE = 10.0  # seconds; then a process compiles for itself


class _Whole:
  """For JAX's cache: whole files, and one process to compile each program."""

  path: Any

  def _file(self, key, suffix=""):
    return pathlib.Path(str(self.path), key + suffix)

  def get(self, key):
    """The program, or None for the one process that is to compile it."""
    end = time.monotonic() + _PATIENCE
    while not self._file(key).exists():
      try:
        self._file(key, ".begun").touch(exist_ok=False)
        return None
      except FileExistsError:
        if time.monotonic() > end:
          return None
      time.sleep(0.002)
    return self._file(key).read_bytes()

  def put(self, key, value):
    """Keeps the program for the others."""
    part = self._file(key, f".{os.getpid()}")
    part.write_bytes(value)
    part.replace(self._file(key))


def share(folder):
  """Makes this process keep compiled programs in a folder, and find them there."""
  try:
    from jax._src import compilation_cache, lru_cache
  except ImportError:  # another JAX: every process compiles for itself
    return
  shared = type("Shared", (_Whole, lru_cache.LRUCache), {})
  compilation_cache.LRUCache = shared  # type: ignore[reportPrivateImportUsage]
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def end():
  """Lets programs that are compiled from here on stay in this process."""
  if jax.config.jax_compilation_cache_dir:
    from jax._src import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
