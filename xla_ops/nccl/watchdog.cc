// The watchdog: polls operations in flight between calls.
#include "nccl/watchdog.h"

#include <chrono>
#include <stdexcept>
#include <string>

#include "common/process_wide.h"

namespace jfog::nccl {

void Watchdog::SetInterval(double seconds) {
  if (!(seconds > 0 && seconds < 3600)) {
    throw std::invalid_argument("jfog: the watchdog's interval is " +
                                std::to_string(seconds) +
                                " s; take a positive one below an hour");
  }
  interval_ns_ = static_cast<std::int64_t>(seconds * 1e9);
}

Watchdog& Watchdog::Get() { return ProcessWide<Watchdog>(); }

void Watchdog::Watch(const std::shared_ptr<Watched>& comm) {
  std::lock_guard<std::mutex> lock(mutex_);
  watched_.push_back(comm);
  if (thread_.joinable()) return;
  stopped_ = false;
  thread_ = std::thread([this] { Run(); });
}

void Watchdog::Wake() {
  if (awake_.exchange(true)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

void Watchdog::Stop() {
  std::thread thread;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
    thread.swap(thread_);
  }
  if (thread.joinable()) thread.join();
}

void Watchdog::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopped_) {
    // Cleared before the poll: a Wake during the poll then starts another one.
    awake_.store(false);
    std::vector<std::shared_ptr<Watched>> comms;
    std::vector<std::weak_ptr<Watched>> left;
    for (const auto& watched : watched_) {
      if (std::shared_ptr<Watched> comm = watched.lock()) {
        comms.push_back(std::move(comm));
        left.push_back(watched);
      }
    }
    watched_ = std::move(left);
    lock.unlock();
    bool is_busy = false;
    for (const auto& comm : comms) {
      is_busy |= comm->PollAll(Clock::now());
    }
    comms.clear();
    lock.lock();
    if (is_busy) {
      changed_.wait_for(lock, std::chrono::nanoseconds(interval_ns_.load()),
                        [this] { return stopped_; });
    } else {
      changed_.wait(lock, [this] { return stopped_ || awake_.load(); });
    }
  }
}

}  // namespace jfog::nccl
