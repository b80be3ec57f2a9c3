// Operations in flight of a communicator: their queue, and their interface.
#include "nccl/in_flight.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "nccl/device.h"

namespace jfog::nccl {

ffi::Error InFlightOperation::Check(int code, const char* function) {
  if (code == kCudaSuccess) return ffi::Error::Success();
  return Fail(ffi::ErrorCode::kInternal, std::string("failed in ") + function +
                                             ": " + CudaErrorText(code));
}

void InFlight::Enter(std::shared_ptr<InFlightOperation> operation) {
  std::lock_guard<std::mutex> lock(mutex_);
  operations_.push_back(std::move(operation));
}

InFlight::Operations InFlight::All() {
  std::lock_guard<std::mutex> lock(mutex_);
  return operations_;
}

bool InFlight::PollOldest(Clock::time_point now) {
  std::unique_lock<std::mutex> polling(polling_, std::try_to_lock);
  if (!polling.owns_lock()) return true;
  for (;;) {
    std::shared_ptr<InFlightOperation> oldest;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (operations_.empty()) return false;
      oldest = operations_.front();
    }
    if (!oldest->Poll(now)) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    operations_.pop_front();
  }
}

// The lock of the queue is dropped while operations are polled: a launch enters
// another one meanwhile, and a failing operation reads the queue.
bool InFlight::PollAll(Clock::time_point now,
                       const std::function<void()>& check) {
  std::unique_lock<std::mutex> polling(polling_, std::try_to_lock);
  if (!polling.owns_lock()) return true;
  const Operations operations = All();
  std::vector<const InFlightOperation*> over;
  for (const auto& operation : operations) {
    if (operation->Poll(now)) over.push_back(operation.get());
  }
  if (over.size() < operations.size()) check();
  std::lock_guard<std::mutex> lock(mutex_);
  operations_.erase(
      std::remove_if(operations_.begin(), operations_.end(),
                     [&](const std::shared_ptr<InFlightOperation>& operation) {
                       return std::find(over.begin(), over.end(),
                                        operation.get()) != over.end();
                     }),
      operations_.end());
  return !operations_.empty();
}

}  // namespace jfog::nccl
