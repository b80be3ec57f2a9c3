// NCCL of the emulation: communicators, groups and what a group moves.
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>

#include "emulation.h"
#include "mesh.h"
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

// How many polls of the launched groups of a communicator say "in progress".
constexpr int kPolls[] = {0, 0, 1, 0, 3};

std::atomic<long> groups_launched{0};

std::string& LastError() {
  thread_local std::string text;
  return text;
}

Result Refuse(Result result, const char* function, const std::string& why) {
  LastError() = std::string(function) + ": " + why;
  return result;
}

// Refuses what production must not even try.
Result Wrong(Result result, const char* function, const std::string& why) {
  Fault(std::string(function) + ": " + why);
  return Refuse(result, function, why);
}

enum class Kind {
  kSend,
  kRecv,
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast
};

struct Operation {
  const char* function;
  Kind kind;
  const char* from;  // null where nothing is read
  char* to;          // null where nothing is written
  std::size_t count;
  ElementType type;
  ReductionKind reduction;
  int peer;  // or the root

  std::size_t bytes() const { return count * SizeOf(type); }
  bool collective() const { return kind > Kind::kRecv; }
  // Fields that must be equal on both sides of a collective's message.
  std::uint32_t signature() const {
    if (!collective()) return 0;
    std::uint32_t value = 17;
    for (const int part : {static_cast<int>(kind), static_cast<int>(type),
                           static_cast<int>(reduction), peer})
      value = value * 31 + static_cast<std::uint32_t>(part);
    return value;
  }
};

struct Range {
  const char* begin;
  std::size_t size;
};

bool Overlap(const Range& a, const Range& b) {
  return a.begin < b.begin + b.size && b.begin < a.begin + a.size;
}

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  Communicator(std::string name, int rank, int size, bool blocking)
      : rank(rank),
        size(size),
        blocking(blocking),
        mesh_(std::move(name), rank, size) {}

  const int rank;
  const int size;
  const bool blocking;

  // Connects in the background.
  void Start();
  // The result of ncclCommGetAsyncError; a poll.
  Result Poll();
  // Whether it can be used now; else a text is left behind.
  Result Ready(const char* function);
  // Enqueues a group's operations as one piece of work, now or by a later poll.
  Result Launch(std::vector<Operation> operations,
                std::shared_ptr<Stream> stream);
  Result Finalize();
  // Waits until nothing runs any more.
  void Drain();
  void Abort();
  // Claims the communicator for a group of this thread; false if it is another
  // thread's.
  bool Claim();
  void Unclaim();

 private:
  void Run(const std::vector<Operation>& operations, std::uint64_t turn,
           std::chrono::milliseconds delay);
  void Execute(const std::vector<Operation>& operations);
  void End(const Operation& operation, const std::vector<char>& parts);
  bool CheckAll(const std::vector<Operation>& operations);
  std::vector<Range> Written(const Operation& operation) const;
  std::vector<Range> ReadBy(const Operation& operation) const;
  void Hang();

  Mesh mesh_;
  std::thread connecting_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> lost_{false};  // a peer has gone

  std::mutex mutex_;
  std::condition_variable changed_;
  Result state_ = kInProgress;
  std::string failure_;
  bool finalized_ = false;
  int polls_ = 0;
  std::function<void()> launch_;
  std::uint64_t groups_ = 0;
  std::uint64_t launched_ = 0;
  std::uint64_t finished_ = 0;
  bool running_ = false;
  std::thread::id owner_;
};

Registry<Communicator>& Communicators() {
  static auto& communicators = *new Registry<Communicator>;
  return communicators;
}

void Communicator::Start() {
  const bool hangs = Setting("JFOG_EMULATION_HANG_INIT", -1) == rank;
  connecting_ = std::thread([this, hangs] {
    std::string failure;
    if (hangs) {
      Hang();
    } else {
      failure = mesh_.Connect(stop_);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    state_ = failure.empty() ? kSuccess : kSystemError;
    failure_ = failure;
    changed_.notify_all();
  });
  if (!blocking) return;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return state_ != kInProgress; });
}

Result Communicator::Poll() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (lost_ && state_ == kSuccess) {
    state_ = kRemoteError;
    failure_ = "a rank has closed its connection";
  }
  if (state_ != kSuccess) {
    if (state_ != kInProgress) LastError() = failure_;
    return state_;
  }
  if (polls_) {
    if (--polls_) return kInProgress;
    if (launch_) std::exchange(launch_, nullptr)();
  }
  return finalized_ && finished_ < launched_ ? kInProgress : kSuccess;
}

Result Communicator::Ready(const char* function) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (lost_ && state_ == kSuccess) {
    state_ = kRemoteError;
    failure_ = "a rank has closed its connection";
  }
  if (state_ == kInProgress || polls_)
    return Wrong(kInvalidArgument, function,
                 "the communicator's previous call is still in progress");
  if (state_ != kSuccess) return Refuse(state_, function, failure_);
  return kSuccess;
}

bool Communicator::Claim() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finalized_) return false;
  const std::thread::id self = std::this_thread::get_id();
  if (owner_ != std::thread::id() && owner_ != self) return false;
  owner_ = self;
  return true;
}

void Communicator::Unclaim() {
  std::lock_guard<std::mutex> lock(mutex_);
  owner_ = {};
}

Result Communicator::Launch(std::vector<Operation> operations,
                            std::shared_ptr<Stream> stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::uint64_t turn = launched_++;
  const std::chrono::milliseconds delay(Setting("JFOG_EMULATION_DELAY_MS", 0));
  auto enqueue = [self = shared_from_this(), stream = std::move(stream),
                  operations = std::move(operations), turn, delay] {
    stream->Enqueue([=] { self->Run(operations, turn, delay); });
  };
  polls_ = blocking ? 0 : kPolls[groups_++ % std::size(kPolls)];
  if (!polls_) {
    enqueue();
    return kSuccess;
  }
  launch_ = std::move(enqueue);
  return kInProgress;
}

Result Communicator::Finalize() {
  std::unique_lock<std::mutex> lock(mutex_);
  finalized_ = true;
  if (!blocking) {
    polls_ = 1;
    return kInProgress;
  }
  changed_.wait(lock, [this] { return finished_ == launched_ || stop_; });
  return kSuccess;
}

void Communicator::Drain() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return finished_ == launched_; });
    stop_ = true;
  }
  if (connecting_.joinable()) connecting_.join();
}

void Communicator::Abort() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stop_ = true;
    launch_ = nullptr;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !running_; });
  }
  if (connecting_.joinable()) connecting_.join();
}

void Communicator::Hang() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return stop_.load(); });
}

// On the stream's thread.
void Communicator::Run(const std::vector<Operation>& operations,
                       std::uint64_t turn, std::chrono::milliseconds delay) {
  bool runs;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stop_ || finished_ == turn; });
    changed_.wait_for(lock, delay, [this] { return stop_.load(); });
    runs = !stop_;
    running_ |= runs;
  }
  if (runs) {
    if (CheckAll(operations)) {
      Execute(operations);
      CheckAll(operations);
    } else {
      Hang();
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (runs) running_ = false;
  finished_ = std::max(finished_, turn + 1);
  changed_.notify_all();
}

std::vector<Range> Communicator::ReadBy(const Operation& operation) const {
  const std::size_t bytes = operation.bytes();
  if (!operation.from || !bytes) return {};
  if (operation.kind == Kind::kBroadcast && operation.peer != rank) return {};
  const bool parts = operation.kind == Kind::kReduceScatter;
  return {
      {operation.from, parts ? bytes * static_cast<std::size_t>(size) : bytes}};
}

std::vector<Range> Communicator::Written(const Operation& operation) const {
  const std::size_t bytes = operation.bytes();
  if (!operation.to || !bytes) return {};
  const bool parts = operation.kind == Kind::kAllGather;
  return {
      {operation.to, parts ? bytes * static_cast<std::size_t>(size) : bytes}};
}

bool Communicator::CheckAll(const std::vector<Operation>& operations) {
  bool right = true;
  for (const Operation& operation : operations) {
    for (const Range& range : ReadBy(operation))
      right &= CheckMemory(operation.function, range.begin, range.size,
                           Memory::kDevice);
    for (const Range& range : Written(operation))
      right &= CheckMemory(operation.function, range.begin, range.size,
                           Memory::kDevice);
  }
  // No other operation may touch the memory that one writes, but for NCCL's
  // in-place forms of one collective.
  for (std::size_t i = 0; i < operations.size(); ++i) {
    for (const Range& written : Written(operations[i])) {
      for (std::size_t j = 0; j < operations.size(); ++j) {
        const Operation& other = operations[j];
        bool meets = false;
        if (i != j)
          for (const Range& range : Written(other))
            meets |= Overlap(written, range);
        const std::size_t shift =
            other.bytes() * static_cast<std::size_t>(rank);
        const bool in_place = i == j && (other.kind == Kind::kAllGather
                                             ? other.from == other.to + shift
                                         : other.kind == Kind::kReduceScatter
                                             ? other.to == other.from + shift
                                             : other.from == other.to);
        if (!in_place)
          for (const Range& range : ReadBy(other))
            meets |= Overlap(written, range);
        if (!meets) continue;
        Fault(std::string(operations[i].function) + " writes what " +
              other.function + " of the same group uses");
        right = false;
      }
    }
  }
  return right;
}

void Communicator::Execute(const std::vector<Operation>& operations) {
  std::vector<Message> sends, receives;
  // Buffers that reductions receive into.
  std::vector<std::vector<char>> parts(operations.size());
  std::vector<const Operation*> to_self, from_self;
  for (std::size_t i = 0; i < operations.size(); ++i) {
    const Operation& operation = operations[i];
    const std::size_t bytes = operation.bytes();
    const Channel channel =
        operation.collective() ? kCollective : kPointToPoint;
    const std::uint32_t kind = operation.signature();
    const auto send = [&](int peer, const char* from) {
      sends.push_back({peer, channel, const_cast<char*>(from), bytes, kind, i});
    };
    const auto receive = [&](int peer, char* to) {
      receives.push_back({peer, channel, to, bytes, kind, i});
    };
    switch (operation.kind) {
      case Kind::kSend:
        if (operation.peer == rank) {
          to_self.push_back(&operation);
        } else {
          send(operation.peer, operation.from);
        }
        break;
      case Kind::kRecv:
        if (operation.peer == rank) {
          from_self.push_back(&operation);
        } else {
          receive(operation.peer, operation.to);
        }
        break;
      case Kind::kBroadcast:
        if (operation.peer != rank) {
          receive(operation.peer, operation.to);
          break;
        }
        for (int peer = 0; peer < size; ++peer)
          if (peer != rank) send(peer, operation.from);
        break;
      default:
        if (operation.kind != Kind::kAllGather)
          parts[i].resize(bytes * static_cast<std::size_t>(size));
        for (int peer = 0; peer < size; ++peer) {
          const std::size_t shift = bytes * static_cast<std::size_t>(peer);
          if (peer == rank) continue;
          send(peer, operation.kind == Kind::kReduceScatter
                         ? operation.from + shift
                         : operation.from);
          receive(peer, operation.kind == Kind::kAllGather
                            ? operation.to + shift
                            : parts[i].data() + shift);
        }
    }
  }
  bool matched = to_self.size() == from_self.size();
  for (std::size_t i = 0; i < std::min(to_self.size(), from_self.size()); ++i) {
    matched &= to_self[i]->bytes() == from_self[i]->bytes();
    std::memcpy(from_self[i]->to, to_self[i]->from,
                std::min(to_self[i]->bytes(), from_self[i]->bytes()));
  }
  // One operation may end while others of its group hang.
  const auto end = [&](std::size_t i) { End(operations[i], parts[i]); };
  if (size == 1)
    for (std::size_t i = 0; i < operations.size(); ++i) end(i);
  if (mesh_.Move(sends, receives, end, stop_, lost_) && !matched) Hang();
}

// Runs after all sends and receives, when in-place buffers may be written.
void Communicator::End(const Operation& operation,
                       const std::vector<char>& parts) {
  const std::size_t bytes = operation.bytes();
  const std::size_t own = bytes * static_cast<std::size_t>(rank);
  switch (operation.kind) {
    case Kind::kSend:
    case Kind::kRecv:
      return;
    case Kind::kBroadcast:
      if (operation.peer == rank)
        std::memmove(operation.to, operation.from, bytes);
      return;
    case Kind::kAllGather:
      std::memmove(operation.to + own, operation.from, bytes);
      return;
    default:
      break;
  }
  std::vector<const char*> inputs;
  for (int peer = 0; peer < size; ++peer)
    inputs.push_back(parts.data() + bytes * static_cast<std::size_t>(peer));
  inputs[static_cast<std::size_t>(rank)] =
      operation.from + (operation.kind == Kind::kReduceScatter ? own : 0);
  Reduce(operation.type, operation.reduction, operation.count, inputs,
         operation.to);
}

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
