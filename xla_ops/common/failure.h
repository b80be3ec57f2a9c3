// The first failure of a communicator, which all later work is refused with.
#ifndef JFOG_XLA_OPS_COMMON_FAILURE_H_
#define JFOG_XLA_OPS_COMMON_FAILURE_H_

#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/fork.h"
#include "common/status.h"

namespace jfog {

class FirstFailure {
 public:
  // Records a failure; returns false, and keeps the first, if there is one.
  bool Set(ffi::ErrorCode code, const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_) return false;
    failure_.emplace(code, text);
    failed_.store(true, std::memory_order_release);
    return true;
  }
  // The first failure's error, or success.
  ffi::Error Refusal() {
    if (!failed()) return ffi::Error::Success();
    if (IsForked()) return ForkedError("an operation");
    std::lock_guard<std::mutex> lock(mutex_);
    return MakeError(failure_->first, failure_->second);
  }
  bool failed() const {
    return failed_.load(std::memory_order_acquire) || IsForked();
  }

 private:
  std::atomic<bool> failed_{false};
  std::mutex mutex_;  // guards the failure
  std::optional<std::pair<ffi::ErrorCode, std::string>> failure_;
};

// The errors with which the failed ones among communicators refuse operations.
template <typename Comms>
std::vector<std::string> FailuresOf(const Comms& comms) {
  std::vector<std::string> texts;
  for (const auto& comm : comms) {
    ffi::Error error = comm->Refusal();
    if (error.failure()) texts.push_back(StatusText(error));
  }
  return texts;
}

// The error of work on a communicator that has been closed.
inline ffi::Error ShutDownError(const std::string& name) {
  return MakeError(ffi::ErrorCode::kFailedPrecondition,
                   name + " on a communicator that was shut down");
}

// An error, if the communicator (null: it is gone) is not ready for work.
template <typename Comm>
ffi::Error CheckReady(Comm* comm, const char* name) {
  if (IsForked()) return ForkedError(name);
  if (comm == nullptr || comm->closed()) return ShutDownError(name);
  return comm->Refusal();
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_FAILURE_H_
