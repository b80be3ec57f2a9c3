"""Upper bounds of a GPU: NCCL and the CUDA driver alone, called by ctypes.

The peers of `_peers.py` that average, and of here that only move: a send to and
a receive from each neighbor, and a copy on the device.
"""

import ctypes
import time

import _measure
import _peers
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_UINT8 = 1  # ncclUint8
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class UniqueId(ctypes.Structure):
  """`ncclUniqueId`, which is passed by value."""

  _fields_ = (("internal", ctypes.c_ubyte * 128),)


class Gpu:
  """A stream and an NCCL communicator of this process, for raw peers.

  Made on all ranks together; `close` ends it, on all ranks.
  """

  def __init__(self, comm, device, nccl, cuda):
    """Takes an mpi4py communicator, CUDA's device, and the two libraries."""
    self.comm = comm
    self._nccl, self._cuda = ctypes.CDLL(nccl), ctypes.CDLL(cuda)
    self._device, context = ctypes.c_int(), ctypes.c_void_p()
    self._stream, self._communicator = ctypes.c_void_p(), ctypes.c_void_p()
    self._driver("cuInit", ctypes.c_uint(0))
    self._driver("cuDeviceGet", ctypes.byref(self._device), device)
    # The context that XLA uses, too.
    self._driver(
      "cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device
    )
    self._driver("cuCtxSetCurrent", context)
    self._driver("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
    unique = UniqueId()
    if comm.rank == 0:
      self._call("ncclGetUniqueId", ctypes.byref(unique))
    unique = UniqueId.from_buffer_copy(comm.bcast(bytes(unique)))
    self._call(
      "ncclCommInitRank",
      ctypes.byref(self._communicator),
      comm.size,
      unique,
      comm.rank,
    )

  def exchange(self, sends, receives, size):
    """Enqueues sends and receives: pairs of a rank and an address."""
    self._call("ncclGroupStart")
    for call, pairs in (("ncclSend", sends), ("ncclRecv", receives)):
      for rank, address in pairs:
        self._call(
          call,
          ctypes.c_void_p(address),
          ctypes.c_size_t(size),
          _UINT8,
          rank,
          self._communicator,
          self._stream,
        )
    self._call("ncclGroupEnd")

  def copy(self, target, source, size):
    """Enqueues a copy from one address of the device to another."""
    self._driver(
      "cuMemcpyDtoDAsync_v2",
      ctypes.c_uint64(target),
      ctypes.c_uint64(source),
      ctypes.c_size_t(size),
      self._stream,
    )

  def synchronize(self):
    """Waits for what was enqueued."""
    self._driver("cuStreamSynchronize", self._stream)

  def versions(self):
    """The versions of CUDA that the driver knows and of NCCL, as text."""
    cuda, nccl = ctypes.c_int(), ctypes.c_int()
    self._driver("cuDriverGetVersion", ctypes.byref(cuda))
    self._call("ncclGetVersion", ctypes.byref(nccl))
    major, rest = divmod(nccl.value, 10000)
    return (
      f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
      f"{major}.{rest // 100}.{rest % 100}",
    )

  def close(self):
    """Ends the communicator and the stream."""
    self.synchronize()
    self._call("ncclCommDestroy", self._communicator)
    self._driver("cuStreamDestroy_v2", self._stream)
    self._driver("cuDevicePrimaryCtxRelease_v2", self._device)

  def _call(self, name, *arguments):
    code = getattr(self._nccl, name)(*arguments)
    assert code == 0, f"{name} fails with code {code}"

  def _driver(self, name, *arguments):
    code = getattr(self._cuda, name)(*arguments)
    assert code == 0, f"{name} fails with code {code}"


class RawNccl:
  """Grouped `ncclSend` and `ncclRecv` of whole arrays, and no arithmetic."""

  def __init__(self, graph, chunk, x, gpu):
    self.chunk, self._gpu = chunk, gpu
    rank, n = gpu.comm.rank, gpu.comm.size
    plan = [[d for d, _ in offsets] for offsets in _peers.rounds(graph)]
    # Writes into XLA's memory directly: no other reference to these arrays exists.
    self._x = jnp.asarray(x)
    self._received = [jnp.zeros_like(self._x) for _ in max(plan, key=len)]
    jax.block_until_ready((self._x, self._received))
    mine = self._x.unsafe_buffer_pointer()
    into = [each.unsafe_buffer_pointer() for each in self._received]
    self._rounds = [
      (
        [((rank + d) % n, mine) for d in offsets],
        [
          ((rank - d) % n, address)
          for d, address in zip(offsets, into, strict=False)
        ],
      )
      for offsets in plan
    ]

  def seconds(self, calls):
    """As in `_peers.Scanned`."""
    gpu, size = self._gpu, self._x.nbytes
    gpu.comm.Barrier()
    begin = time.perf_counter()
    for i in range(calls * self.chunk):
      sends, receives = self._rounds[i % len(self._rounds)]
      gpu.exchange(sends, receives, size)
    gpu.synchronize()
    return time.perf_counter() - begin

  def value(self):
    """The messages received last, in the order of the neighbors."""
    return [np.asarray(each) for each in self._received]


class DeviceCopy:
  """The copy of an array on the device: the memory's limit."""

  def __init__(self, chunk, x, gpu):
    self.chunk, self._gpu = chunk, gpu
    self._x = jnp.asarray(x)
    self._copy = jnp.zeros_like(self._x)
    jax.block_until_ready((self._x, self._copy))

  def seconds(self, calls):
    """As in `_peers.Scanned`."""
    gpu, size = self._gpu, self._x.nbytes
    target = self._copy.unsafe_buffer_pointer()
    source = self._x.unsafe_buffer_pointer()
    gpu.comm.Barrier()
    begin = time.perf_counter()
    for _ in range(calls * self.chunk):
      gpu.copy(target, source, size)
    gpu.synchronize()
    return time.perf_counter() - begin

  def value(self):
    """The copy."""
    return np.asarray(self._copy)


class XlaMean(_peers.Scanned):
  """`lax.psum` over all devices, the mean of all ranks instead of neighbors."""

  def __init__(self, ranks, chunk, x, barrier):
    mesh = jax.make_mesh((ranks,), ("rank",))
    spec = jax.P("rank")
    sharding = jax.NamedSharding(mesh, spec)

    def step(x, i):
      del i
      # Varies again along the axis, as the carry of a scan has to.
      return lax.pcast(lax.psum(x, "rank") / ranks, "rank", to="varying")

    whole = jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
    super().__init__(
      jax.shard_map(step, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec),
      chunk,
      1,
      whole,
      barrier,
    )

  def value(self):
    """The values of the ranks of this process: pairs of rank and array."""
    return [
      (shard.index[0].start or 0, np.asarray(shard.data)[0])
      for shard in self.x.addressable_shards
    ]


class Training:
  """Steps of a training on one batch; one call is one step."""

  chunk = 1

  def __init__(self, step, params, state, batch, barrier):
    self._step, self._batch, self._barrier = step, batch, barrier
    self._state, self.loss = (params, state), jnp.inf

  def seconds(self, calls):
    """As in `_peers.Scanned`."""

    def run(state):
      *state, self.loss = self._step(*state, self._batch)
      return state

    self._state, seconds = _measure.timed(
      run, self._state, calls, self._barrier
    )
    return seconds
