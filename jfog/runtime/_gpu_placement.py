"""GPU placement: the GPUs of a machine and the one that each rank uses.

The CUDA driver lists them, and the placement is done before JAX starts its
backends, which reserve memory on every GPU visible to them.
"""

import ctypes
import dataclasses
import importlib.metadata
import os
import pkgutil
from collections.abc import MutableMapping, Sequence
from typing import Any

import jax

from jfog import _compat

_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_ENTRY_POINTS = "jax_plugins"
# XLA's own share of a GPU's memory where one process uses it, and the variables
# by which users change that. The middle one is the older name of the first; XLA
# rejects an environment with both.
_MEMORY_SHARE = 0.75
_MEMORY_VARIABLES = (
  "XLA_CLIENT_MEM_FRACTION",
  "XLA_PYTHON_CLIENT_MEM_FRACTION",
  "XLA_PYTHON_CLIENT_PREALLOCATE",
)
_config: Any = jax.config  # its options are attributes that no stub declares
_SHARED_GPU_VERSION = 23000  # NCCL 2.30 supports ranks that share a GPU


@dataclasses.dataclass(frozen=True)
class Gpus:
  """The GPUs that this process may use.

  `names` are in the order of the CUDA ordinals; `reason` explains an empty list.
  """

  names: tuple[str, ...] = ()
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class Placement:
  """The placement of a rank: the CUDA ordinal of its GPU, and its sharers.

  `count` is the number of GPUs that the rank could choose from, and `sharing`
  the number of ranks on its GPU, itself included. `str` is a short description.
  """

  index: int
  count: int
  sharing: int

  def __str__(self) -> str:
    place = f"GPU {self.index} of {self.count}"
    return f"{place}, with {self.sharing} ranks" if self.sharing > 1 else place


def gpus(library: str = _DRIVER, plugins: Sequence[str] | None = None) -> Gpus:
  """Returns the GPUs that JAX may use here; does not start JAX's backends.

  The driver reads `CUDA_VISIBLE_DEVICES` when it starts; later changes of that
  variable in this process have no effect.

  Args:
    library: the name or path of the CUDA driver's library.
    plugins: the names of JAX's plugins; by default those that are installed.

  Returns:
    Their names, or the reason of an empty list: JAX is configured for other
    platforms, has no plugin for CUDA, or the driver has no GPU.

  Example:
    >>> gpus(plugins=["xla_tpu"]).names
    ()
  """
  platforms = _config.jax_platforms
  # Decided by the configuration alone, before a library is opened.
  if platforms and not {"cuda", "gpu"} & _words(platforms):
    return Gpus(reason=f"JAX uses other platforms only ({platforms})")
  plugins = _plugins() if plugins is None else plugins
  if not any("cuda" in name for name in plugins):
    return Gpus(
      reason="JAX has no plugin for CUDA here; "
      '`pip install "jax[cuda13]"` brings it'
    )
  try:
    cuda = _driver(library)
    count = ctypes.c_int()
    _check(cuda, "cuDeviceGetCount", cuda.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
      return Gpus(reason="the CUDA driver finds no GPU")
    return Gpus(tuple(_name(cuda, index) for index in range(count.value)))
  except RuntimeError as error:
    return Gpus(reason=str(error))


def gpu_count(
  library: str = _DRIVER, plugins: Sequence[str] | None = None
) -> int:
  """Returns the number of GPUs that JAX may use here, as `gpus` finds them."""
  return len(gpus(library, plugins).names)


def identity(index: int, library: str = _DRIVER) -> bytes:
  """Returns the 16 bytes of the UUID of a GPU, or of a MIG partition.

  Processes with different visible GPUs have different ordinals for one GPU; the
  UUID identifies it across processes.

  Raises:
    RuntimeError: for an ordinal out of range, with the driver's message.
  """
  cuda = _driver(library)
  # Version 2 distinguishes MIG partitions.
  name = "cuDeviceGetUuid_v2"
  if not hasattr(cuda, name):
    name = "cuDeviceGetUuid"
  found = (ctypes.c_ubyte * 16)()
  _check(cuda, name, getattr(cuda, name)(found, _device(cuda, index)))
  return bytes(found)


def chosen(local_rank: int, count: int) -> int:
  """Returns the CUDA ordinal of the GPU that `place` takes for a rank.

  That is `local_rank % count`, unless the process has chosen already: by
  `jax_cuda_visible_devices`, or by starting JAX's backends.

  Args:
    local_rank: this rank's place among the ranks of its machine.
    count: the number of GPUs that this process may use, at least 1.

  Example:
    >>> [chosen(local_rank, 2) for local_rank in range(4)]
    [0, 1, 0, 1]
  """
  if _compat.backends_are_started():
    devices = _started_gpus()
    # JAX's numbering of started devices may leave out some that the driver
    # counts.
    if devices:
      return devices[local_rank % len(devices)].local_hardware_id
  # The option has narrowed the choice already; its first entry is the one that
  # JAX takes.
  elif (visible := _compat.visible_cuda_devices()) != "all":
    return int(visible.split(",")[0])
  return local_rank % count


def place(
  local_rank: int,
  local_size: int,
  count: int,
  *,
  sharing: int | None = None,
  environ: MutableMapping[str, str] = os.environ,
) -> Placement:
  """Configures JAX for one GPU in this process, shared with other ranks if needed.

  Before JAX's backends start, `jax_cuda_visible_devices` is set to the GPU
  `chosen`, unless there is a single one or the user has set the option. If the
  backends run already, that GPU becomes the default device instead, unless the
  user has set one.

  Ranks that share a GPU get two variables, unless the user has set them:
  `NCCL_MULTI_RANK_GPU_ENABLE=1`, without which NCCL rejects them (before 2.30
  they need `separate_hosts`), and `XLA_CLIENT_MEM_FRACTION`, XLA's default of
  0.75 of the memory divided by the number of ranks.

  Args:
    local_rank: this rank's place among the ranks of its machine.
    local_size: the number of ranks on this machine.
    count: the number of GPUs that this process may use, at least 1.
    sharing: the number of ranks on this rank's GPU. By default it is computed
      as if all ranks of the machine see the same GPUs; if each sees its own, as
      under `jfog run`, it is found by comparing `identity` between ranks.
    environ: the environment that is read and changed.

  Returns:
    The placement of this rank.

  Raises:
    ValueError: if `local_rank` is out of range, or `count` is 0.

  Source: the switch is `NCCL_PARAM(MultiRankGpuEnable, ...)` in `src/init.cc`
  of NCCL 2.30.
  """
  if not 0 <= local_rank < local_size or count < 1:
    raise ValueError(
      f"need 0 <= local_rank < local_size and count >= 1, got {local_rank=}, "
      f"{local_size=}, {count=}."
    )
  index = chosen(local_rank, count)
  if _compat.backends_are_started():
    # Too late to hide the other GPUs: arrays go to this one by default instead.
    if _config.jax_default_device is None:
      for device in _started_gpus():
        if device.local_hardware_id == index:
          jax.config.update("jax_default_device", device)
  elif count > 1 and _compat.visible_cuda_devices() == "all":
    jax.config.update("jax_cuda_visible_devices", str(index))
  if sharing is None:
    # Ranks of this machine whose local rank is the same modulo count.
    sharing = len(range(local_rank % count, local_size, count))
  if sharing > 1:
    # setdefault: a value of the user has precedence.
    environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    if not any(name in environ for name in _MEMORY_VARIABLES):
      environ[_MEMORY_VARIABLES[0]] = f"{_MEMORY_SHARE / sharing:.3f}"
  return Placement(index, count, sharing)


def separate_hosts(
  placement: Placement,
  rank: int,
  nccl_version: int,
  environ: MutableMapping[str, str] = os.environ,
) -> bool:
  """Gives ranks that share a GPU a host id each, for NCCL before 2.30.

  Those versions reject two ranks on one GPU of one host. They identify hosts by
  `NCCL_HOSTID` and connect them by sockets, which is slow: good for tests. NCCL
  reads the variable once, so this comes before the first unique id.

  Args:
    placement: the result of `place`.
    rank: this rank in the world, part of the host id.
    nccl_version: as from `ncclGetVersion`, 22803 for 2.28.3.
    environ: the environment that is read and changed.

  Returns:
    Whether this rank has a host id of its own now.

  Source: `getHostHashOnce` in `src/misc/utils.cc` of NCCL, and the check for
  duplicate GPUs in `src/init.cc`.
  """
  if placement.sharing < 2 or nccl_version >= _SHARED_GPU_VERSION:
    return False
  return environ.setdefault("NCCL_HOSTID", f"jfog-{rank}") == f"jfog-{rank}"


def _words(text: str) -> set[str]:
  """The entries of a comma-separated option."""
  return {word.strip() for word in text.split(",")}


def _plugins() -> list[str]:
  """The names of JAX's plugins, found as JAX finds them."""
  names = [
    point.value
    for point in importlib.metadata.entry_points(group=_ENTRY_POINTS)
  ]
  try:
    import jax_plugins  # type: ignore[import-not-found]
  except ImportError:
    return names
  return [*names, *(m.name for m in pkgutil.iter_modules(jax_plugins.__path__))]


def _driver(library: str) -> ctypes.CDLL:
  """The CUDA driver, initialized."""
  try:
    cuda = ctypes.CDLL(library)
  except OSError as error:
    raise RuntimeError(f"no CUDA driver: {error}") from error
  code = cuda.cuInit(0)
  if code == _NO_DEVICE:
    raise RuntimeError("the CUDA driver finds no GPU")
  _check(cuda, "cuInit", code)
  return cuda


def _check(cuda: ctypes.CDLL, call: str, code: int) -> None:
  """Raises a RuntimeError with the driver's message for a failed call."""
  if code == 0:
    return
  text = ctypes.c_char_p()
  cuda.cuGetErrorString(code, ctypes.byref(text))
  words = text.value.decode() if text.value else "an unknown error"
  raise RuntimeError(f"the CUDA driver fails: {call}: {words} ({code})")


def _device(cuda: ctypes.CDLL, index: int) -> int:
  device = ctypes.c_int()
  _check(cuda, "cuDeviceGet", cuda.cuDeviceGet(ctypes.byref(device), index))
  return device.value


def _name(cuda: ctypes.CDLL, index: int) -> str:
  name = ctypes.create_string_buffer(256)
  device = _device(cuda, index)
  _check(cuda, "cuDeviceGetName", cuda.cuDeviceGetName(name, 256, device))
  return name.value.decode(errors="replace")


def _started_gpus() -> list[Any]:
  """The GPUs of this process, if JAX's backends run and have any."""
  if jax.default_backend() not in ("gpu", "cuda"):
    return []
  return jax.local_devices()
