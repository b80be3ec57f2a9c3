// The watchdog: looks after operations while no call does.
#ifndef JFOG_XLA_OPS_NCCL_WATCHDOG_H_
#define JFOG_XLA_OPS_NCCL_WATCHDOG_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace jfog::nccl {

class Communicator;

// One thread for the process, which sleeps while no operation is under way.
class Watchdog {
 public:
  static Watchdog& Get();

  void Watch(const std::shared_ptr<Communicator>& comm);
  // An operation is under way.
  void Wake();
  void Stop();
  // The time between two looks; for measurements.
  void SetInterval(double seconds);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::weak_ptr<Communicator>> watched_;
  std::thread thread_;
  std::atomic<bool> awake_{false};
  std::atomic<std::int64_t> interval_ns_{2'000'000};
  bool stopped_ = false;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_WATCHDOG_H_
