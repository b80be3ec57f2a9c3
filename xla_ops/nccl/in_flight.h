// Operations in flight of a communicator: their queue, and their interface.
#ifndef JFOG_XLA_OPS_NCCL_IN_FLIGHT_H_
#define JFOG_XLA_OPS_NCCL_IN_FLIGHT_H_

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "common/format.h"
#include "common/status.h"

namespace jfog::nccl {

// An operation, in what its communicator uses of it.
class InFlightOperation {
 public:
  virtual ~InFlightOperation() = default;

  // Ends it, or fails the communicator if there is a reason; returns whether it
  // has ended. One thread at a time.
  virtual bool Poll(Clock::time_point now) = 0;
  // Checks the headers that have arrived while it is in flight.
  virtual void Peek() = 0;
  // Starts the clock of the deadline now.
  virtual void Await() = 0;
  // Whether the device has ended it, successfully or not.
  virtual bool HasEnded() const = 0;
  // Warns of a long wait, and fails a longer one.
  virtual ffi::Error CheckDeadline(Clock::duration waited) = 0;
  // Fails the communicator.
  virtual ffi::Error Fail(ffi::ErrorCode code, const std::string& text) = 0;
  // Fails the communicator where no call can return the error: prints it, too.
  virtual void Report(ffi::ErrorCode code, const std::string& text) = 0;
  // "ranks 1, 2"
  virtual std::string Peers() const = 0;

  // Turns a code of the driver into a failure.
  ffi::Error Check(int code, const char* function);
};

// In the order in which NCCL runs them. The launch adds at the end; polls, from
// the next call and from the watchdog, remove operations that have ended.
class InFlight {
 public:
  using Operations = std::deque<std::shared_ptr<InFlightOperation>>;

  void Enter(std::shared_ptr<InFlightOperation> operation);
  Operations All();
  // These poll operations, which ends or fails them, and return whether any is
  // left. Where another thread polls, they return true at once.
  bool PollOldest(Clock::time_point now);
  // Calls `check` while some operation has not ended.
  bool PollAll(Clock::time_point now, const std::function<void()>& check);

 private:
  std::mutex polling_;  // held by the thread that polls
  std::mutex mutex_;    // guards the operations
  Operations operations_;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_IN_FLIGHT_H_
