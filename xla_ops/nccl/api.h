// The part of NCCL and of the CUDA driver that jfog uses: types, values, and
// two lists of functions with their prototypes. Nothing of either is needed to
// build.
//
// Sources: NCCL's and the CUDA driver's reference manuals; the values are part
// of their binary interfaces since NCCL 2.18 and CUDA 12.
#ifndef JFOG_XLA_OPS_NCCL_API_H_
#define JFOG_XLA_OPS_NCCL_API_H_

#include <climits>
#include <cstddef>

namespace jfog::nccl {

// NCCL.

// The oldest that is known to have all of this.
constexpr int kOldestVersion = 21800;

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum ElementType : int {
  kNoElementType = -1,
  kInt8 = 0,
  kUint8 = 1,
  kInt32 = 2,
  kUint32 = 3,
  kInt64 = 4,
  kUint64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBfloat16 = 9,
};

enum ReductionKind : int { kSum = 0, kProd = 1, kMax = 2, kMin = 3, kAvg = 4 };

struct UniqueId {
  char bytes[128];
};

// Its beginning, as of NCCL 2.18; later libraries take defaults for what they
// have added, by the size and the version.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kOldestVersion;
  int blocking = INT_MIN;  // INT_MIN: the default
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

using Comm = struct CommOpaque*;

// The CUDA driver.

using CudaStream = struct CUstream_st*;
using CudaEvent = struct CUevent_st*;
using CudaContext = struct CUctx_st*;
using DevicePointer = unsigned long long;

constexpr int kCudaSuccess = 0;
constexpr int kCudaNotReady = 600;
constexpr unsigned int kEventDisableTiming = 2;
constexpr unsigned int kStreamNonBlocking = 1;

// X(member, symbol, result, arguments)
#define JFOG_NCCL_FUNCTIONS(X)                                              \
  X(get_version, "ncclGetVersion", Result, (int*))                          \
  X(get_error_string, "ncclGetErrorString", const char*, (Result))          \
  X(get_last_error, "ncclGetLastError", const char*, (Comm))                \
  X(get_unique_id, "ncclGetUniqueId", Result, (UniqueId*))                  \
  X(comm_init_rank_config, "ncclCommInitRankConfig", Result,                \
    (Comm*, int, UniqueId, int, Config*))                                   \
  X(comm_get_async_error, "ncclCommGetAsyncError", Result, (Comm, Result*)) \
  X(comm_finalize, "ncclCommFinalize", Result, (Comm))                      \
  X(comm_destroy, "ncclCommDestroy", Result, (Comm))                        \
  X(comm_abort, "ncclCommAbort", Result, (Comm))                            \
  X(group_start, "ncclGroupStart", Result, ())                              \
  X(group_end, "ncclGroupEnd", Result, ())                                  \
  X(send, "ncclSend", Result,                                               \
    (const void*, std::size_t, ElementType, int, Comm, CudaStream))         \
  X(recv, "ncclRecv", Result,                                               \
    (void*, std::size_t, ElementType, int, Comm, CudaStream))               \
  X(all_reduce, "ncclAllReduce", Result,                                    \
    (const void*, void*, std::size_t, ElementType, ReductionKind, Comm,     \
     CudaStream))                                                           \
  X(reduce_scatter, "ncclReduceScatter", Result,                            \
    (const void*, void*, std::size_t, ElementType, ReductionKind, Comm,     \
     CudaStream))                                                           \
  X(all_gather, "ncclAllGather", Result,                                    \
    (const void*, void*, std::size_t, ElementType, Comm, CudaStream))       \
  X(broadcast, "ncclBroadcast", Result,                                     \
    (const void*, void*, std::size_t, ElementType, int, Comm, CudaStream))

#define JFOG_CUDA_FUNCTIONS(X)                                             \
  X(get_error_name, "cuGetErrorName", int, (int, const char**))            \
  X(device_get, "cuDeviceGet", int, (int*, int))                           \
  X(retain_primary_context, "cuDevicePrimaryCtxRetain", int,               \
    (CudaContext*, int))                                                   \
  X(release_primary_context, "cuDevicePrimaryCtxRelease_v2", int, (int))   \
  X(stream_get_context, "cuStreamGetCtx", int, (CudaStream, CudaContext*)) \
  X(push_context, "cuCtxPushCurrent_v2", int, (CudaContext))               \
  X(pop_context, "cuCtxPopCurrent_v2", int, (CudaContext*))                \
  X(stream_create, "cuStreamCreate", int, (CudaStream*, unsigned int))     \
  X(stream_destroy, "cuStreamDestroy_v2", int, (CudaStream))               \
  X(stream_synchronize, "cuStreamSynchronize", int, (CudaStream))          \
  X(stream_wait_event, "cuStreamWaitEvent", int,                           \
    (CudaStream, CudaEvent, unsigned int))                                 \
  X(event_create, "cuEventCreate", int, (CudaEvent*, unsigned int))        \
  X(event_destroy, "cuEventDestroy_v2", int, (CudaEvent))                  \
  X(event_record, "cuEventRecord", int, (CudaEvent, CudaStream))           \
  X(event_query, "cuEventQuery", int, (CudaEvent))                         \
  X(memory_allocate, "cuMemAlloc_v2", int, (DevicePointer*, std::size_t))  \
  X(memory_free, "cuMemFree_v2", int, (DevicePointer))                     \
  X(host_allocate, "cuMemAllocHost_v2", int, (void**, std::size_t))        \
  X(host_free, "cuMemFreeHost", int, (void*))                              \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", int,                             \
    (void*, DevicePointer, std::size_t, CudaStream))                       \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2", int,                           \
    (DevicePointer, const void*, std::size_t, CudaStream))                 \
  X(copy_on_device, "cuMemcpyDtoDAsync_v2", int,                           \
    (DevicePointer, DevicePointer, std::size_t, CudaStream))               \
  X(set_words, "cuMemsetD32Async", int,                                    \
    (DevicePointer, unsigned int, std::size_t, CudaStream))                \
  X(set_bytes, "cuMemsetD8Async", int,                                     \
    (DevicePointer, unsigned char, std::size_t, CudaStream))

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_API_H_
