"""The emulation of NCCL and CUDA itself, against NumPy and what NCCL promises."""

import ctypes
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from support import emulated

pytestmark = pytest.mark.skipif(
  sys.platform != "linux" or not emulated.compiler(),
  reason="the emulation needs Linux and a C++ compiler",
)
RANKS = 3
DEADLINE = 60.0  # seconds; it takes a few

# The program of a rank, with the scenario's lines after it.
HEAD = """
import ctypes, os, sys, time
import ml_dtypes, numpy as np

library, rank, size, ids = sys.argv[1:]
rank, size, ids = int(rank), int(size), ids.split(",")
lib = ctypes.CDLL(library)
libc = ctypes.CDLL(None)
pointer, integer, word = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
IN_PROGRESS, REMOTE, INVALID_ARGUMENT, INVALID_USAGE = 7, 6, 4, 5
DTYPES = {
  "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5,
  "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
}
REDUCTIONS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "avg": 4}
lib.jfog_emulation_faults.restype = ctypes.c_long
lib.jfog_emulation_live.restype = ctypes.c_long
lib.jfog_emulation_calls.restype = ctypes.c_long
lib.jfog_emulation_group_count.restype = ctypes.c_long

class Config(ctypes.Structure):
  _fields_ = [
    ("size", word), ("magic", ctypes.c_uint), ("version", ctypes.c_uint),
    *((name, integer) for name in ("blocking", "cga", "least", "most")),
    ("net", pointer), ("split", integer),
  ]

class UniqueId(ctypes.Structure):
  _fields_ = [("bytes", ctypes.c_char * 128)]

def call(name, *arguments, expect=0):
  code = getattr(lib, name)(*arguments)
  assert code == expect, (name, code)

def make(function, *arguments, expect=0):
  made = pointer()
  call(function, ctypes.byref(made), *arguments, expect=expect)
  return made

call("cuCtxPushCurrent_v2", make("cuDevicePrimaryCtxRetain", 0))
stream = make("cuStreamCreate", 1)
event = make("cuEventCreate", 2)

def sync():
  call("cuStreamSynchronize", stream)

def device(array):
  array = np.ascontiguousarray(array)
  made = make("cuMemAlloc_v2", word(array.nbytes))
  call("cuMemcpyHtoDAsync_v2", made, array.ctypes.data_as(pointer),
       word(array.nbytes), stream)
  return made

def host(address, like):
  array = np.empty_like(like)
  call("cuMemcpyDtoHAsync_v2", array.ctypes.data_as(pointer), address,
       word(array.nbytes), stream)
  return array

def poll(comm):
  result = integer()
  call("ncclCommGetAsyncError", comm, ctypes.byref(result))
  return result.value

def settle(comm, seconds=20):
  end = time.monotonic() + seconds
  while (result := poll(comm)) == IN_PROGRESS and time.monotonic() < end:
    time.sleep(0.001)
  return result

def communicator(id, blocking=0):
  comm = pointer()
  config = Config(ctypes.sizeof(Config), 0xcafebeef, 21800, blocking,
                  *[-2**31] * 3, None, -2**31)
  unique = UniqueId(bytes.fromhex(id))
  call("ncclCommInitRankConfig", ctypes.byref(comm), size, unique, rank,
       ctypes.byref(config), expect=0 if blocking else IN_PROGRESS)
  assert settle(comm) == 0
  return comm

class group:
  def __init__(self, comm):
    self.comm = comm
  def __enter__(self):
    call("ncclGroupStart")
  def __exit__(self, kind, value, trace):
    code = lib.ncclGroupEnd()
    assert kind or code in (0, IN_PROGRESS), code
    assert kind or settle(self.comm) == 0

def send(array_or_address, count, dtype, peer, comm):
  call("ncclSend", array_or_address, word(count), DTYPES[dtype], peer, comm,
       stream)

def receive(address, count, dtype, peer, comm):
  call("ncclRecv", address, word(count), DTYPES[dtype], peer, comm, stream)

def values(rank, dtype, count=7):
  drawn = np.random.RandomState(rank).randint(1, 9, count)
  return (drawn / (3 if "float" in dtype else 1)).astype(dtype)

def finish(comm, mistakes=0):
  call("ncclCommFinalize", comm, expect=IN_PROGRESS)
  assert settle(comm) == 0
  call("ncclCommDestroy", comm)
  assert lib.jfog_emulation_faults() == mistakes, lib.jfog_emulation_faults()
"""

MOVES = """
comm = communicator(ids[0])
after, before = (rank + 1) % size, (rank - 1) % size
for turn in range(7):  # some are in progress for a while
  mine = np.full(50_000, 100.0 * turn + rank)
  out, into = device(mine), device(np.zeros_like(mine))
  with group(comm):
    send(out, mine.size, "float64", after, comm)
    receive(into, mine.size, "float64", before, comm)
  np.testing.assert_array_equal(
    host(into, mine), np.full_like(mine, 100.0 * turn + before))

# Several leaves, more than a socket holds, all sends before all receives; one
# message is to oneself, and one is empty.
leaves = [np.arange(n, dtype=np.int32) for n in (1, 0, 400_000, 17)]
pairs = [(p, leaf) for p in range(size) for leaf in leaves]
outs = [device(leaf + 10 * rank + p) if leaf.size else None for p, leaf in pairs]
intos = [device(np.zeros_like(x)) if x.size else None for _, x in pairs]
groups = lib.jfog_emulation_group_count()
with group(comm):
  for out, (peer, leaf) in zip(outs, pairs):
    send(out or pointer(1), leaf.size, "int32", peer, comm)
  for into, (peer, leaf) in zip(intos, pairs):
    receive(into or pointer(1), leaf.size, "int32", peer, comm)
assert lib.jfog_emulation_group_count() == groups + 1
for into, (peer, leaf) in zip(intos, pairs):
  if leaf.size:
    np.testing.assert_array_equal(host(into, leaf), leaf + 10 * peer + rank)

NUMPY = {"sum": np.add, "prod": np.multiply, "max": np.maximum,
         "min": np.minimum}
for dtype in DTYPES:
  for reduction, kind in REDUCTIONS.items():
    all_values = [values(r, dtype) for r in range(size)]
    want = all_values[0]
    if reduction == "avg":
      want = np.stack(all_values).astype(float).mean(0).astype(dtype)
    else:
      for other in all_values[1:]:
        want = NUMPY[reduction](want, other)
    buffer = device(values(rank, dtype))
    apart = device(np.zeros_like(want))
    with group(comm):
      call("ncclAllReduce", buffer, apart, word(7), DTYPES[dtype], kind, comm,
           stream)
    with group(comm):
      call("ncclAllReduce", buffer, buffer, word(7), DTYPES[dtype], kind, comm,
           stream)
    got = host(buffer, want)
    assert got.tobytes() == host(apart, want).tobytes()
    if reduction == "avg" and "float" in dtype:
      np.testing.assert_allclose(
        got.astype(float), want.astype(float), rtol=2.0**-6)
    else:
      assert got.tobytes() == want.tobytes(), (dtype, reduction, got, want)

# In NCCL's in-place forms, and on two streams without events between them.
part = np.arange(5.0) + 10 * rank
whole = device(np.tile(part, size))
slot = pointer(whole.value + rank * part.nbytes)
own, stream = stream, make("cuStreamCreate", 0)
call("ncclReduceScatter", whole, slot, word(5), DTYPES["float64"], 0, comm, own,
     expect=lib.ncclGroupStart())
code = lib.ncclGroupEnd()
assert settle(comm) == 0
with group(comm):
  call("ncclAllGather", slot, whole, word(5), DTYPES["float64"], comm, stream)
want = sum(np.arange(5.0) + 10 * r for r in range(size))
np.testing.assert_array_equal(
  host(whole, np.tile(part, size)), np.tile(want, size))
stream = own

for root in range(size):
  cast = device(np.arange(4, dtype=np.uint8) + rank)
  with group(comm):
    call("ncclBroadcast", cast if rank == root else None, cast, word(4),
         DTYPES["uint8"], root, comm, stream)
  np.testing.assert_array_equal(
    host(cast, np.zeros(4, np.uint8)), np.arange(4) + root)

# Unwritten memory is not zero, and an event is passed when its stream is there.
assert host(make("cuMemAlloc_v2", word(1)), np.zeros(1, np.uint8)) == 0xA5
late = device(np.zeros(3, np.int32))
libc.setenv(b"JFOG_EMULATION_DELAY_MS", b"200", 1)
with group(comm):
  call("ncclAllReduce", late, late, word(3), DTYPES["int32"], 0, comm, stream)
call("cuEventRecord", event, stream)
assert lib.cuEventQuery(event) == 600
other = make("cuStreamCreate", 0)
call("cuStreamWaitEvent", other, event, 0)
call("cuStreamSynchronize", other)
assert lib.cuEventQuery(event) == 0
libc.unsetenv(b"JFOG_EMULATION_DELAY_MS")
finish(comm)
comm = communicator(ids[5], blocking=1)
call("ncclCommDestroy", comm)
assert lib.jfog_emulation_live(b"communicators") == 0
"""

FAILS = """
# Two ranks wait for a third that does not come.
libc.setenv(b"JFOG_EMULATION_HANG_INIT", b"1", 1)
config = Config(ctypes.sizeof(Config), 0xcafebeef, 21800, 0,
                *[-2**31] * 3, None, -2**31)
alone = make("ncclCommInitRankConfig", size, UniqueId(bytes.fromhex(ids[4])),
             rank, ctypes.byref(config), expect=IN_PROGRESS)
libc.unsetenv(b"JFOG_EMULATION_HANG_INIT")
assert settle(alone, 0.2) == IN_PROGRESS
begin = time.monotonic()
call("ncclCommAbort", alone)
assert time.monotonic() - begin < 1

# Sizes that differ: with garbage, and then all is well again.
libc.setenv(b"JFOG_EMULATION_MISMATCH", b"garbage", 1)
comm = communicator(ids[1])
for sizes in ((4, 6), (6, 4), (5, 5)):
  of_mine, of_theirs = sizes[rank % 2], sizes[1 - rank % 2]
  out = device(np.full(of_mine, rank, np.uint8))
  into = device(np.full(of_mine, 99, np.uint8))
  with group(comm):
    if rank < 2:
      send(out, of_mine, "uint8", 1 - rank, comm)
      receive(into, of_mine, "uint8", 1 - rank, comm)
  if rank < 2:
    want = [1 - rank] * min(sizes) + [99] * (of_mine - min(sizes))
    assert host(into, np.zeros(of_mine, np.uint8)).tolist() == want
finish(comm)
libc.unsetenv(b"JFOG_EMULATION_MISMATCH")

# A receive of more than was sent, or without a send, hangs until abort.
comm = communicator(ids[2])
small, large = device(np.zeros(4)), device(np.zeros(8))
count = device(np.ones(1, np.int32))
sync()
with group(comm):
  # The finished part of a group that hangs is visible to another stream.
  call("ncclAllReduce", count, count, word(1), DTYPES["int32"], 0, comm, stream)
  if rank == 0:
    send(small, 4, "float64", 1, comm)
  if rank == 1:
    receive(large, 8, "float64", 0, comm)
  if rank == 2:
    receive(large, 8, "float64", 0, comm)
call("cuEventRecord", event, stream)
time.sleep(0.3)
assert lib.cuEventQuery(event) == (600 if rank else 0)
own, stream = stream, make("cuStreamCreate", 1)
assert host(count, np.zeros(1, np.int32)) == 3
stream = own
begin = time.monotonic()
call("ncclCommAbort", comm)
sync()
assert time.monotonic() - begin < 1
assert lib.jfog_emulation_faults() == 0
if rank == 1:
  np.testing.assert_array_equal(host(large, np.zeros(8))[:4], np.zeros(4))

# A rank dies: the others hang, see the asynchronous error, and abort.
comm = communicator(ids[3])
if rank == 2:
  os.kill(os.getpid(), 9)
total = device(np.ones(3, np.float32))
with group(comm):
  call("ncclAllReduce", total, total, word(3), DTYPES["float32"], 0, comm,
       stream)
call("cuEventRecord", event, stream)
end = time.monotonic() + 10
while (said := poll(comm)) == 0 and time.monotonic() < end:
  time.sleep(0.01)
assert said == REMOTE, said
assert lib.cuEventQuery(event) == 600
call("ncclAllReduce", total, total, word(3), DTYPES["float32"], 0, comm, stream,
     expect=REMOTE)
lib.ncclGetLastError.restype = ctypes.c_char_p
assert b"ncclAllReduce" in lib.ncclGetLastError(comm)
call("ncclCommDestroy", comm, expect=REMOTE)
call("ncclCommAbort", comm)
sync()
"""

WRONG = """
os.dup2(1, 2)
call("cuCtxPopCurrent_v2", None)
call("cuStreamCreate", ctypes.byref(pointer()), 0, expect=201)
call("cuMemAlloc_v2", ctypes.byref(pointer()), word(8), expect=201)
call("cuCtxPushCurrent_v2", pointer(0xc0de0))
block = make("cuMemAlloc_v2", word(8))
call("cuMemsetD32Async", block, 1, word(3), stream, expect=1)
call("cuMemsetD32Async", block, 7, word(2), stream)
assert (host(block, np.zeros(2, np.int32)) == 7).all()
ctypes.memset(block.value + 8, 0, 1)
call("cuMemFree_v2", block, expect=1)
call("cuMemFree_v2", block, expect=1)
call("cuMemsetD8Async", block, 1, word(3), stream, expect=1)
pinned = make("cuMemAllocHost_v2", word(8))
call("cuMemsetD32Async", pinned, 1, word(1), stream, expect=1)
call("cuMemFreeHost", pinned)
call("cuEventDestroy_v2", event)
call("cuEventDestroy_v2", event, expect=400)
call("cuStreamDestroy_v2", stream)
call("cuStreamSynchronize", stream, expect=400)
stream = make("cuStreamCreate", 0)
comm = communicator(ids[0])
lib.jfog_emulation_fail(b"cuMemAlloc_v2", ctypes.c_long(2), 2)
one = make("cuMemAlloc_v2", word(8))
call("cuMemAlloc_v2", ctypes.byref(pointer()), word(8), expect=2)
call("ncclGroupEnd", expect=INVALID_USAGE)
call("ncclSend", one, word(1), 1, 5, comm, stream, expect=INVALID_ARGUMENT)
call("ncclGroupStart")
call("ncclSend", None, word(1), 1, 0, comm, stream, expect=INVALID_ARGUMENT)
call("ncclGroupEnd", expect=INVALID_ARGUMENT)
call("ncclGroupStart")
send(one, 1, "uint8", 0, comm)
receive(one, 1, "uint8", 0, comm)
call("ncclGroupEnd")
time.sleep(0.2)
call("ncclCommAbort", comm)
sync()
call("ncclCommAbort", comm, expect=INVALID_ARGUMENT)
print(lib.jfog_emulation_faults(), "faults")
"""

# A handler for XLA:GPU: y = x, by a copy on the stream.
HANDLER = """
#include "nccl/api.h"
#include "xla/ffi/api/c_api.h"
using namespace jfog::nccl;
extern "C" {
int cuStreamGetCtx(CudaStream, CudaContext*);
int cuCtxPushCurrent_v2(CudaContext);
int cuCtxPopCurrent_v2(CudaContext*);
int cuMemcpyDtoDAsync_v2(DevicePointer, DevicePointer, std::size_t, CudaStream);

XLA_FFI_Error* Copy(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start) {
    auto* metadata =
        reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)
            ->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return nullptr;
  }
  XLA_FFI_Stream_Get_Args get{};
  get.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
  get.ctx = frame->ctx;
  if (XLA_FFI_Error* error = frame->api->XLA_FFI_Stream_Get(&get)) return error;
  auto* const stream = static_cast<CudaStream>(get.stream);
  const auto at = [](void* buffer) {
    return reinterpret_cast<DevicePointer>(
        static_cast<XLA_FFI_Buffer*>(buffer)->data);
  };
  CudaContext context;
  bool fails = cuStreamGetCtx(stream, &context) != 0;
  fails |= cuMemcpyDtoDAsync_v2(0, 0, 0, stream) != 201;
  fails |= cuCtxPushCurrent_v2(context) != 0;
  fails |= cuMemcpyDtoDAsync_v2(at(frame->rets.rets[0]), at(frame->args.args[0]),
                                12, stream) != 0;
  fails |= cuCtxPopCurrent_v2(nullptr) != 0;
  if (!fails) return nullptr;
  XLA_FFI_Error_Create_Args create{};
  create.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  create.message = "the copy failed";
  create.errc = XLA_FFI_Error_Code_INTERNAL;
  return frame->api->XLA_FFI_Error_Create(&create);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """The path of the emulation."""
  return emulated.build(tmp_path_factory.mktemp("emulation"))


def unique_id(library):
  """A name for a communicator, in hexadecimal."""
  name = ctypes.create_string_buffer(128)
  assert emulated.load(library).ncclGetUniqueId(name) == 0
  return name.raw.hex()


def run(library, program, size):
  """Runs a program on ranks; returns their codes and their output."""
  ids = ",".join(unique_id(library) for _ in range(6))
  command = [sys.executable, "-c", HEAD + textwrap.dedent(program)]
  ranks = [
    subprocess.Popen(
      [*command, str(library), str(rank), str(size), ids],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(size)
  ]
  try:
    outputs = [rank.communicate(timeout=DEADLINE)[0] for rank in ranks]
  finally:
    for rank in ranks:
      rank.kill()
      rank.wait()
  return [rank.returncode for rank in ranks], "\n".join(outputs)


def test_it_has_what_production_calls(library):
  text = (emulated.API).read_text()
  names = re.findall(r'"((?:nccl|cu)[A-Z]\w+)"', text)
  assert len(names) > 40
  lib = emulated.load(library)
  assert [name for name in names if not hasattr(lib, name)] == []


def test_three_ranks_move_and_fail_as_with_nccl(library):
  codes, output = run(library, MOVES + FAILS, RANKS)
  assert codes == [0, 0, -9], output


def test_wrong_calls_are_refused_and_told(library):
  codes, output = run(library, WRONG, 1)
  assert codes == [0], output
  for text in (
    "cuStreamCreate: no context is current on this thread",
    "cuMemsetD32Async: memory of 12 bytes cannot be used: it ends beyond an "
    "allocation of 8 bytes",
    "cuMemFree_v2: bytes just outside of it were written",
    "cuMemFree_v2: it was freed before",
    "cuMemsetD8Async: memory of 3 bytes cannot be used: it was freed",
    "cuMemsetD32Async: memory of 4 bytes cannot be used: it is pinned memory",
    "cuEventDestroy_v2: the event was destroyed or never made",
    "cuStreamSynchronize: the stream was destroyed or never made",
    "ncclSend: no rank 5",
    "ncclSend: a null buffer",
    "ncclRecv writes what ncclSend of the same group uses",
    "ncclCommAbort: there is no such communicator (any more)",
  ):
    assert f"emulation: {text}" in output, (text, output)


def test_xla_runs_a_handler_on_the_emulated_stream(library, tmp_path):
  source = tmp_path / "copy.cc"
  source.write_text(HANDLER)
  built = tmp_path / "libcopy.so"
  emulated.compile_shared(built, [source, library])
  capsule = jax.ffi.pycapsule(ctypes.CDLL(str(built)).Copy)
  lib = emulated.load(library)
  wrapped = emulated.wrap(library, {"jfog_test_copy": {"execute": capsule}})
  again = emulated.wrap(lib, {"jfog_test_copy": capsule})
  pointers = [
    emulated.capsule_pointer(c)
    for c in (capsule, wrapped["jfog_test_copy"]["execute"])
  ]
  assert pointers[0] != pointers[1]
  assert pointers[1] == emulated.capsule_pointer(again["jfog_test_copy"])
  for target, handler in wrapped.items():
    jax.ffi.register_ffi_target(target, handler, platform="cpu")
  x = np.arange(3, dtype=np.float32)
  faults = lib.jfog_emulation_faults()
  copy = jax.jit(
    jax.ffi.ffi_call("jfog_test_copy", jax.ShapeDtypeStruct((3,), x.dtype))
  )
  for k in range(3):
    np.testing.assert_array_equal(copy(x + k), x + k)
  assert lib.jfog_emulation_faults() == faults + 3  # those without a context
