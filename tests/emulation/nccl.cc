// NCCL of the emulation: its exported functions, and the groups of a thread.
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>

#include "communicator.h"
#include "emulation.h"
#include "reduction.h"

namespace jfog::emulation {

using nccl::Comm;
using nccl::Config;
using nccl::CudaStream;
using nccl::ElementType;
using nccl::kInProgress;
using nccl::kInternalError;
using nccl::kInvalidArgument;
using nccl::kInvalidUsage;
using nccl::kRemoteError;
using nccl::kSuccess;
using nccl::kSystemError;
using nccl::kUnhandledCudaError;
using nccl::ReductionKind;
using nccl::Result;
using nccl::UniqueId;

namespace {

constexpr char kIdPrefix[] = "jfog";

std::atomic<long> groups_launched{0};

// The operations of one communicator in one thread's group.
struct Batch {
  std::shared_ptr<Communicator> communicator;
  CudaStream handle;
  std::shared_ptr<Stream> stream;
  std::vector<Operation> operations;
};

struct Group {
  int depth = 0;
  Result error = kSuccess;
  std::vector<Batch> batches;
};

Group& ThisGroup() {
  thread_local Group group;
  return group;
}

Result EndGroup(const char* function) {
  Group group = std::exchange(ThisGroup(), Group());
  Result result = group.error;
  if (result == kSuccess && !group.batches.empty() && !HasContext(function))
    result = Refuse(kUnhandledCudaError, function, "no context is current");
  bool moves = false;
  for (Batch& batch : group.batches) {
    if (result == kSuccess || result == kInProgress) {
      moves = true;
      if (batch.communicator->Launch(std::move(batch.operations),
                                     batch.stream) == kInProgress)
        result = kInProgress;
    }
    batch.communicator->Unclaim();
  }
  groups_launched += moves;
  return result;
}

// Takes one operation into the group, or makes it a group of its own.
Result Add(Comm handle, CudaStream stream_handle, const Operation& operation) {
  Group& group = ThisGroup();
  const char* const function = operation.function;
  const auto refused = [&](Result result) {
    if (group.depth && group.error == kSuccess) group.error = result;
    return result;
  };
  if (!HasContext(function))
    return refused(
        Refuse(kUnhandledCudaError, function, "no context is current"));
  const std::shared_ptr<Communicator> communicator =
      Communicators().Find(handle);
  if (!communicator)
    return refused(Wrong(kInvalidArgument, function,
                         "there is no such communicator (any more)"));
  const std::shared_ptr<Stream> stream = Streams().Find(stream_handle);
  if (!stream)
    return refused(Wrong(kUnhandledCudaError, function,
                         "there is no such stream (any more)"));
  if (const Result ready = communicator->Ready(function); ready != kSuccess)
    return refused(ready);
  const bool reads =
      operation.kind != Kind::kRecv && (operation.kind != Kind::kBroadcast ||
                                        operation.peer == communicator->rank);
  if ((reads && operation.count && !operation.from) ||
      (operation.kind != Kind::kSend && operation.count && !operation.to))
    return refused(Wrong(kInvalidArgument, function, "a null buffer"));
  if (operation.peer < 0 || operation.peer >= communicator->size)
    return refused(Wrong(kInvalidArgument, function,
                         "no rank " + std::to_string(operation.peer)));
  if (!SizeOf(operation.type) || operation.reduction < nccl::kSum ||
      operation.reduction > nccl::kAvg)
    return refused(
        Wrong(kInvalidArgument, function, "no such type or reduction"));
  if (!communicator->Claim())
    return refused(Wrong(kInvalidUsage, function,
                         "the communicator was finalized, or another thread "
                         "uses it in a group"));
  // NCCL forgets collectives of nothing, but not messages of nothing.
  const bool nothing = operation.collective() && !operation.count;
  auto batch = std::find_if(
      group.batches.begin(), group.batches.end(),
      [&](const Batch& one) { return one.communicator == communicator; });
  if (batch == group.batches.end())
    batch =
        group.batches.insert(batch, {communicator, stream_handle, stream, {}});
  if (batch->handle != stream_handle)
    return refused(Wrong(kInvalidUsage, function,
                         "a group uses one stream of a communicator"));
  if (!nothing) batch->operations.push_back(operation);
  return group.depth ? kSuccess : EndGroup(function);
}

}  // namespace

long GroupCount() { return groups_launched; }

std::size_t CommunicatorCount() { return Communicators().size(); }

extern "C" {

Result ncclGetVersion(int* version) {
  JFOG_ENTER(Result);
  if (!version) return Wrong(kInvalidArgument, __func__, "a null pointer");
  *version = static_cast<int>(Setting("JFOG_EMULATION_VERSION", 23203));
  return kSuccess;
}

const char* ncclGetErrorString(Result result) {
  Enter(__func__);
  switch (result) {
    case kSuccess:
      return "no error";
    case kUnhandledCudaError:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case kSystemError:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case kInternalError:
      return "internal error - please report this issue to the NCCL developers";
    case kInvalidArgument:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case kInvalidUsage:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case kRemoteError:
      return "remote process exited or there was a network error";
    case kInProgress:
      return "NCCL operation in progress";
  }
  return "unknown result code";
}

const char* ncclGetLastError(Comm) {
  Enter(__func__);
  return LastError().c_str();
}

Result ncclGetUniqueId(UniqueId* id) {
  JFOG_ENTER(Result);
  if (!id) return Wrong(kInvalidArgument, __func__, "a null pointer");
  unsigned char random[12];
  if (getrandom(random, sizeof(random), 0) != sizeof(random))
    return Refuse(kSystemError, __func__, "getrandom");
  *id = {};
  std::string name = kIdPrefix;
  for (const unsigned char byte : random) {
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  std::memcpy(id->bytes, name.data(), name.size());
  return kSuccess;
}

Result ncclCommInitRankConfig(Comm* comm, int size, UniqueId id, int rank,
                              Config* config) {
  JFOG_ENTER(Result);
  if (!HasContext(__func__))
    return Refuse(kUnhandledCudaError, __func__, "no context is current");
  if (!comm || size < 1 || rank < 0 || rank >= size)
    return Wrong(kInvalidArgument, __func__,
                 "rank " + std::to_string(rank) + " of " +
                     std::to_string(size) + ", or a null pointer");
  if (std::memcmp(id.bytes, kIdPrefix, std::strlen(kIdPrefix)))
    return Wrong(kInvalidArgument, __func__, "not from ncclGetUniqueId");
  if (ThisGroup().depth)
    return Wrong(kInvalidUsage, __func__,
                 "the emulation makes no communicators in groups");
  bool blocking = true;
  if (config) {
    if (config->magic != 0xcafebeef || config->size < sizeof(Config))
      return Wrong(kInvalidArgument, __func__,
                   "not initialized via NCCL_CONFIG_INITIALIZER");
    if (config->version < 21400)
      return Wrong(kInvalidArgument, __func__, "a version without configs");
    const auto fits = [](int value, int low, int high) {
      return value == INT_MIN || (value >= low && value <= high);
    };
    if (!fits(config->blocking, 0, 1) ||
        !fits(config->cga_cluster_size, 0, 8) ||
        !fits(config->min_ctas, 1, 64) || !fits(config->max_ctas, 1, 64) ||
        !fits(config->split_share, 0, 1))
      return Wrong(kInvalidArgument, __func__, "a value of the config");
    blocking = config->blocking != 0;
  }
  auto communicator = std::make_shared<Communicator>(
      std::string(id.bytes, strnlen(id.bytes, sizeof(id.bytes))), rank, size,
      blocking);
  *comm = static_cast<Comm>(Communicators().Add(communicator));
  communicator->Start();
  return blocking ? communicator->Poll() : kInProgress;
}

// Of the benchmarks' raw peers, not of jfog.
Result ncclCommInitRank(Comm* comm, int size, UniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, size, id, rank, nullptr);
}

Result ncclCommGetAsyncError(Comm comm, Result* result) {
  JFOG_ENTER(Result);
  const auto communicator = Communicators().Find(comm);
  if (!communicator || !result)
    return Wrong(kInvalidArgument, __func__,
                 "there is no such communicator (any more), or a null pointer");
  *result = communicator->Poll();
  return kSuccess;
}

Result ncclCommFinalize(Comm comm) {
  JFOG_ENTER(Result);
  const auto communicator = Communicators().Find(comm);
  if (!communicator)
    return Wrong(kInvalidArgument, __func__,
                 "there is no such communicator (any more)");
  if (const Result ready = communicator->Ready(__func__); ready != kSuccess)
    return ready;
  if (!communicator->Claim())
    return Wrong(kInvalidArgument, __func__,
                 "it was finalized, or is in a group of another thread");
  communicator->Unclaim();
  return communicator->Finalize();
}

Result ncclCommDestroy(Comm comm) {
  JFOG_ENTER(Result);
  if (!comm) return kSuccess;
  const auto communicator = Communicators().Find(comm);
  if (!communicator)
    return Wrong(kInvalidArgument, __func__,
                 "there is no such communicator (any more)");
  if (const Result ready = communicator->Ready(__func__); ready != kSuccess)
    return ready;
  communicator->Drain();
  Communicators().Remove(comm);
  return kSuccess;
}

Result ncclCommAbort(Comm comm) {
  JFOG_ENTER(Result);
  if (!comm) return kSuccess;
  const auto communicator = Communicators().Remove(comm);
  if (!communicator)
    return Wrong(kInvalidArgument, __func__,
                 "there is no such communicator (any more)");
  communicator->Abort();
  return kSuccess;
}

Result ncclGroupStart() {
  JFOG_ENTER(Result);
  ++ThisGroup().depth;
  return kSuccess;
}

Result ncclGroupEnd() {
  JFOG_ENTER(Result);
  Group& group = ThisGroup();
  if (!group.depth)
    return Wrong(kInvalidUsage, __func__, "not in a group call");
  return --group.depth ? kSuccess : EndGroup(__func__);
}

Result ncclSend(const void* from, std::size_t count, ElementType type, int peer,
                Comm comm, CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kSend, static_cast<const char*>(from), nullptr,
              count, type, nccl::kSum, peer});
}

Result ncclRecv(void* to, std::size_t count, ElementType type, int peer,
                Comm comm, CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kRecv, nullptr, static_cast<char*>(to), count,
              type, nccl::kSum, peer});
}

Result ncclAllReduce(const void* from, void* to, std::size_t count,
                     ElementType type, ReductionKind reduction, Comm comm,
                     CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kAllReduce, static_cast<const char*>(from),
              static_cast<char*>(to), count, type, reduction, 0});
}

Result ncclReduceScatter(const void* from, void* to, std::size_t count,
                         ElementType type, ReductionKind reduction, Comm comm,
                         CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kReduceScatter, static_cast<const char*>(from),
              static_cast<char*>(to), count, type, reduction, 0});
}

Result ncclAllGather(const void* from, void* to, std::size_t count,
                     ElementType type, Comm comm, CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kAllGather, static_cast<const char*>(from),
              static_cast<char*>(to), count, type, nccl::kSum, 0});
}

Result ncclBroadcast(const void* from, void* to, std::size_t count,
                     ElementType type, int root, Comm comm, CudaStream stream) {
  JFOG_ENTER(Result);
  return Add(comm, stream,
             {__func__, Kind::kBroadcast, static_cast<const char*>(from),
              static_cast<char*>(to), count, type, nccl::kSum, root});
}

}  // extern "C"

namespace {

struct Exported {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetErrorString) get_error_string;
  decltype(&ncclGetLastError) get_last_error;
  decltype(&ncclGetUniqueId) get_unique_id;
  decltype(&ncclCommInitRankConfig) comm_init_rank_config;
  decltype(&ncclCommGetAsyncError) comm_get_async_error;
  decltype(&ncclCommFinalize) comm_finalize;
  decltype(&ncclCommDestroy) comm_destroy;
  decltype(&ncclCommAbort) comm_abort;
  decltype(&ncclGroupStart) group_start;
  decltype(&ncclGroupEnd) group_end;
  decltype(&ncclSend) send;
  decltype(&ncclRecv) recv;
  decltype(&ncclAllReduce) all_reduce;
  decltype(&ncclReduceScatter) reduce_scatter;
  decltype(&ncclAllGather) all_gather;
  decltype(&ncclBroadcast) broadcast;
};

using namespace nccl;
#define JFOG_CHECK(member, symbol, result, arguments)                  \
  static_assert(                                                       \
      std::is_same_v<decltype(Exported::member), result(*) arguments>, \
      symbol " has another type in nccl/api.h");
JFOG_NCCL_FUNCTIONS(JFOG_CHECK)
#undef JFOG_CHECK

}  // namespace
}  // namespace jfog::emulation
