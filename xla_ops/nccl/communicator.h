// Communicators of this process: NCCL's, what failed, what was counted.
#ifndef JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_
#define JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/failure.h"
#include "common/format.h"
#include "common/registry.h"
#include "common/status.h"
#include "common/traffic_counters.h"
#include "nccl/device.h"
#include "nccl/group.h"
#include "nccl/in_flight.h"
#include "nccl/operation_spec.h"
#include "nccl/watchdog.h"

namespace jfog::nccl {

// An NCCL communicator with jfog's state: sequence numbers, operations in
// flight, failure, counters. After its first failure it refuses all further
// work with the text of that failure, and its NCCL communicators are aborted.
//
// The NCCL communicator is in non-blocking mode, so that the host waits for
// peers within the deadline. In recent versions each group of operations then
// starts a thread. The second form has two NCCL communicators. The one in
// blocking mode carries the operations; its calls wait on the host where ranks
// connect. Collectives connect at the start (NCCL_RUNTIME_CONNECT=0). Edges
// connect at their first use, after a rendezvous: an exchange of one byte by
// the other one, which is in non-blocking mode and has one channel. After it
// the peers are at the same call, so the blocking one does not wait long.
//
// Of its locks, `order` is held while an operation is launched, which may take
// as long as its peers take to come; `handle_` while a thread is inside NCCL.
class Communicator : public Watched,
                     public std::enable_shared_from_this<Communicator> {
 public:
  // Collective over all ranks of an id. Throws what Python raises.
  static std::shared_ptr<Communicator> Make(const std::vector<UniqueId>& ids,
                                            int rank, int size, int device,
                                            double timeout);
  ~Communicator() override;
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

  bool closed() const { return closed_.load(std::memory_order_acquire); }
  ffi::Error Refusal() { return failure_.Refusal(); }
  // Records a failure and aborts NCCL; returns whether it is the first one.
  bool Fail(ffi::ErrorCode code, const std::string& text);
  bool failed() const { return failure_.failed(); }

  // Posts a group for an operation, and waits until NCCL has launched it; under
  // `order`.
  ffi::Error Run(InFlightOperation& operation, const OperationSpec& spec,
                 CudaStream stream, const Post& post);
  // Polls a launched operation from now on.
  void Enter(std::shared_ptr<InFlightOperation> operation);
  // These poll operations in flight, and return whether any is left.
  bool PollOldest(Clock::time_point now);
  bool PollAll(Clock::time_point now) override;
  InFlight::Operations OperationsInFlight() { return in_flight_.All(); }

  // Waits for operations in flight, each within its deadline.
  void Drain();
  // Refuses work from now on, drains, and ends the NCCL communicators, within a
  // deadline.
  void Close();
  // Waits for an abort to end.
  void AwaitAbort(Clock::time_point until);

  TrafficCounters& traffic() { return traffic_; }

 private:
  Communicator(std::shared_ptr<Device> device, int rank, int size,
               double timeout, bool blocking);

  // The outcome of an NCCL call.
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

  // The NCCL communicator in non-blocking mode.
  Comm& non_blocking() { return blocking_ ? rendezvous_ : comm_; }
  // Its state; the text of an error. kInternalError where it is gone.
  Result State(std::string* text);
  // Waits, with pauses, while it is in progress and `keeps_waiting`.
  Result AwaitReady(const KeepsWaiting& keeps_waiting, std::string* text);
  // Makes an NCCL call that may block on a thread of its own, with `handle_`
  // held, and waits for it while `keeps_waiting`: kInProgress if it does not
  // end.
  std::shared_ptr<NcclCall> RunOnThread(std::function<void(NcclCall&)> call,
                                        const KeepsWaiting& keeps_waiting);
  // Posts a group on an NCCL communicator, with `handle_` held.
  void PostGroup(Comm comm, CudaStream stream, const Post& post,
                 NcclCall& called);
  // Waits until a group is launched, and turns its outcome into an error.
  ffi::Error EndLaunch(InFlightOperation& operation, NcclCall& called,
                       const KeepsWaiting& keeps_waiting);
  // The connections that an operation is the first to use.
  std::set<Connection> NewConnections(const OperationSpec& spec) const;
  // Waits for the ranks at the other ends of new connections, within the
  // deadline.
  ffi::Error Rendezvous(InFlightOperation& operation,
                        const std::set<Connection>& connections);
  ffi::Error FailIn(InFlightOperation& operation, const char* function,
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
  std::atomic<bool> closed_{false};
  std::timed_mutex handle_;
  // Null after they are aborted or destroyed.
  Comm comm_ = nullptr;
  Comm rendezvous_ = nullptr;  // in the blocking form
  InFlight in_flight_;
  FirstFailure failure_;
  TrafficCounters traffic_;

  std::mutex mutex_;  // guards all below
  std::condition_variable aborted_;
  enum { kNotAborted, kAborting, kAborted } abort_ = kNotAborted;
};

// The communicators of this process, by the context number of operations.
Registry<Communicator>& Communicators();

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_COMMUNICATOR_H_
