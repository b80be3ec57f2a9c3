// Communicators of this process: NCCL's, what failed, what was counted.
#ifndef JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_
#define JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/status.h"
#include "common/text.h"
#include "nccl/device.h"

namespace jfog::nccl {

class Operation;
struct OperationSpec;

// What is posted as one, on one stream. After a call that fails it does
// nothing more.
class Group {
 public:
  Group(Comm comm, CudaStream stream) : comm_(comm), stream_(stream) {}

  void Send(DevicePointer from, std::size_t bytes, int peer);
  void Receive(DevicePointer to, std::size_t bytes, int peer);
  void AllReduce(DevicePointer from, DevicePointer to, std::size_t count,
                 ElementType type, ReductionKind kind);
  // `count` elements are those of one rank.
  void ReduceScatter(DevicePointer from, DevicePointer to, std::size_t count,
                     ElementType type, ReductionKind kind);
  void AllGather(DevicePointer from, DevicePointer to, std::size_t bytes);
  void Broadcast(DevicePointer from, DevicePointer to, std::size_t bytes,
                 int root);

  Result code() const { return code_; }
  const char* function() const { return function_; }

 private:
  template <typename Call>
  void Do(const char* function, Call call);

  const Comm comm_;
  const CudaStream stream_;
  Result code_ = kSuccess;
  const char* function_ = "";
};

using Post = std::function<void(Group&)>;

struct Counters {
  std::vector<std::int64_t> bytes_sent, bytes_received, messages_sent;
  std::int64_t operations = 0;
};

// One of NCCL's communicators with what jfog knows about it. After its first
// failure it refuses all further work with that failure's text, and NCCL's part
// of it is aborted.
//
// NCCL's is in non-blocking mode, so that the host waits for peers within the
// deadline. In recent versions each group of operations then starts a thread.
// The second form has two of NCCL's. The one in blocking mode carries the
// operations; its calls wait on the host where ranks connect. Collectives
// connect at the start (NCCL_RUNTIME_CONNECT=0). Edges connect at their first
// use, after a rendezvous: an exchange of one byte by the other one, which is
// in non-blocking mode and has one channel. After it the peers are at the same
// call, so the blocking one does not wait long.
//
// Of its locks, `order` is held while an operation is launched, which may take
// as long as its peers take to come; `handle_` while a thread is inside NCCL.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Collective over all ranks of an id. Throws what Python raises.
  static std::shared_ptr<Communicator> Make(const std::vector<UniqueId>& ids,
                                            int rank, int size, int device,
                                            double timeout);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }
  Device& device() const { return *device_; }
  // All ranks but this one.
  std::vector<int> Others() const;

  std::mutex& order() { return order_; }
  std::uint64_t NextSequence() { return sequence_++; }  // under `order`
  // The stream of what was started; the driver's code.
  int SecondStream(CudaStream* stream);

  // An error, if it is closed or has failed.
  ffi::Error CheckReady(const std::string& name);
  ffi::Error Refusal();
  // Spoils it; returns whether this is its first failure.
  bool Fail(ffi::ErrorCode code, const std::string& text);
  bool failed() const { return failed_.load(std::memory_order_acquire); }

  // Posts a group for an operation, and waits until NCCL has launched it; under
  // `order`.
  ffi::Error Run(Operation& operation, const OperationSpec& spec,
                 CudaStream stream, const Post& post);
  // From now on looks after a launched operation.
  void Enter(std::shared_ptr<Operation> operation);
  // Looks at operations under way, which it ends or fails; only at the oldest
  // ones unless `all`. Returns whether any is left.
  bool Poll(Clock::time_point now, bool all);
  // Those under way, in the order in which NCCL lets them run.
  std::deque<std::shared_ptr<Operation>> UnderWay();

  // Waits for operations under way, each within its deadline.
  void Drain();
  // Refuses work from now on, drains, and ends NCCL's part, within a deadline.
  void Close();
  // Waits a while for an abort to end.
  void AwaitAbort(Clock::time_point until);

  void CountOperation() { operations_.fetch_add(1, kRelaxed); }
  void CountSent(int peer, std::size_t bytes);
  void CountReceived(int peer, std::size_t bytes);
  Counters counters() const;
  void ResetCounters();

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
  using Counts = std::vector<std::atomic<std::int64_t>>;

  Communicator(std::shared_ptr<Device> device, int rank, int size,
               double timeout, bool blocking);

  // The outcome of a call of NCCL.
  struct NcclCall {
    std::atomic<bool> ended{false};
    Result code = kInProgress;
    const char* function = "";
    std::string text;
  };
  using KeepsWaiting = std::function<bool()>;
  // One direction between this rank and another.
  struct Connection {
    int peer;
    bool receives;
    bool operator<(const Connection& other) const {
      return std::tie(peer, receives) < std::tie(other.peer, other.receives);
    }
  };

  // The one of NCCL's that is in non-blocking mode.
  Comm& non_blocking() { return blocking_ ? rendezvous_ : comm_; }
  // Its state; the text of an error. kInternalError where it is gone.
  Result State(std::string* text);
  // Waits, with pauses, while it is in progress and `keeps_waiting`.
  Result AwaitReady(const KeepsWaiting& keeps_waiting, std::string* text);
  // Makes a call of NCCL that may block, with `handle_` held, on a thread of
  // its own, and waits for it while `keeps_waiting`: kInProgress if it does not
  // end.
  std::shared_ptr<NcclCall> RunOnThread(std::function<void(NcclCall&)> call,
                                        const KeepsWaiting& keeps_waiting);
  // Posts a group on one of NCCL's communicators, with `handle_` held.
  void PostGroup(Comm comm, CudaStream stream, const Post& post,
                 NcclCall& called);
  // Waits until a group is launched, and turns its outcome into an error.
  ffi::Error EndLaunch(Operation& operation, NcclCall& called,
                       const KeepsWaiting& keeps_waiting);
  // Those that an operation is the first to use.
  std::set<Connection> NewConnections(const OperationSpec& spec) const;
  // Waits for the ranks at the other ends, within the deadline.
  ffi::Error Rendezvous(Operation& operation,
                        const std::set<Connection>& connections);
  ffi::Error FailIn(Operation& operation, const char* function,
                    const std::string& text);
  void Abort();
  void Finalize();
  void CheckAsyncError();
  static std::string Explain(Comm comm, Result code);

  const std::shared_ptr<Device> device_;
  const int rank_;
  const int size_;
  const double timeout_;
  const bool blocking_;
  std::mutex order_;
  std::uint64_t sequence_ = 0;
  CudaStream second_ = nullptr;
  CudaStream rendezvous_stream_ = nullptr;
  std::set<Connection> connected_;  // in the blocking form; under `order`
  std::atomic<bool> failed_{false};
  std::atomic<bool> closed_{false};
  std::timed_mutex handle_;
  // Null once they are aborted or destroyed.
  Comm comm_ = nullptr;
  Comm rendezvous_ = nullptr;  // in the blocking form
  std::mutex looking_;
  Counts bytes_sent_, bytes_received_, messages_sent_;
  std::atomic<std::int64_t> operations_{0};

  std::mutex mutex_;  // guards all below
  std::condition_variable aborted_;
  enum { kNotAborted, kAborting, kAborted } abort_ = kNotAborted;
  std::optional<std::pair<ffi::ErrorCode, std::string>> failure_;
  std::deque<std::shared_ptr<Operation>> under_way_;
};

// The communicators of this process, by the number that operations carry.
void Register(std::int64_t context, std::shared_ptr<Communicator> comm);
std::shared_ptr<Communicator> Lookup(std::int64_t context);
void Unregister(std::int64_t context);
std::vector<std::shared_ptr<Communicator>> AllCommunicators();

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_
