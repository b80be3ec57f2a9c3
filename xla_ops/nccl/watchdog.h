// The watchdog: polls operations in flight between calls.
#ifndef JFOG_XLA_OPS_NCCL_WATCHDOG_H_
#define JFOG_XLA_OPS_NCCL_WATCHDOG_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "common/format.h"

namespace jfog::nccl {

// A communicator, in what the watchdog uses of it.
class Watched {
 public:
  virtual ~Watched() = default;
  // Polls operations in flight; returns whether any is left.
  virtual bool PollAll(Clock::time_point now) = 0;
};

// One thread per process. It sleeps while no operation is in flight.
class Watchdog {
 public:
  static Watchdog& Get();

  void Watch(const std::shared_ptr<Watched>& comm);
  // Resumes polling: an operation is in flight.
  void Wake();
  void Stop();
  // Sets the time between two polls; for measurements.
  void SetInterval(double seconds);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::weak_ptr<Watched>> watched_;
  std::thread thread_;
  std::atomic<bool> awake_{false};
  std::atomic<std::int64_t> interval_ns_{2'000'000};
  bool stopped_ = false;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_WATCHDOG_H_
