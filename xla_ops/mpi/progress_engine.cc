// The progress engine: advances all operations in flight, beside computation.
#include "mpi/progress_engine.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <thread>

#include "common/process_wide.h"

namespace jfog::mpi {
namespace {

// While messages arrive, the leader polls again at once, then yields between
// polls. After kYieldFor without progress it sleeps between two polls for a
// fraction of the quiet time: the longer a wait has lasted, the less a late
// wake-up matters, and the less of a core the wait takes.
constexpr std::chrono::microseconds kYieldFor{100};
constexpr int kNapPart = 32;
constexpr std::chrono::microseconds kShortestNap{20};
constexpr std::chrono::microseconds kLongestNap{1000};
// Interval at which control messages and requests are read between operations.
// While requests are served, and shortly after, there is no pause.
constexpr std::chrono::milliseconds kReadEvery{1};
constexpr std::chrono::microseconds kServeFor{300};
// Interval of the checks for stalls.
constexpr std::chrono::milliseconds kStallCheck{10};

}  // namespace

Engine& Engine::Get() { return ProcessWide<Engine>(); }

void Engine::Submit(std::shared_ptr<Operation> operation, Waiter waiter) {
  bool spawn = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_back({std::move(operation), std::move(waiter)});
    ++version_;
    spawn = !leading_ && idle_ == 0;
  }
  if (spawn) {
    std::thread([this] { Run(); }).detach();
  } else {
    work_.notify_one();
    changed_.notify_all();
  }
}

bool Engine::Attach(const std::shared_ptr<Operation>& operation,
                    Waiter& waiter) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto entry =
        std::find_if(entries_.begin(), entries_.end(),
                     [&](const Entry& e) { return e.operation == operation; });
    if (entry == entries_.end()) return false;
    entry->waiter = std::move(waiter);
    ++version_;
  }
  changed_.notify_all();
  return true;
}

void Engine::Watch(const std::shared_ptr<Communicator>& comm) {
  LookAfter(Watched{comm, nullptr});
}

void Engine::Serve(const std::shared_ptr<Communicator>& comm,
                   std::function<bool()> serve) {
  LookAfter(Watched{comm, std::move(serve)});
}

void Engine::LookAfter(Watched watched) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Watched& other : watched_) {
    if (other.comm == watched.comm && !other.serve == !watched.serve) return;
  }
  watched_.push_back(std::move(watched));
  if (watching_ || stopped_) return;
  watching_ = true;
  std::thread([this] { LookAfter(); }).detach();
}

void Engine::LookAfter() {
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  Clock::time_point busy_at;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopped_ && !watched_.empty()) {
    const std::vector<Watched> watched = watched_;
    lock.unlock();
    bool busy = false;
    for (const auto& [comm, serve] : watched) {
      if (serve == nullptr) {
        comm->ReadControlMessages();
      } else {
        busy = serve() || busy;
      }
    }
    const Clock::time_point now = Clock::now();
    if (busy) busy_at = now;
    const bool pauses = now - busy_at > kServeFor;
    if (!pauses) sched_yield();
    lock.lock();
    watched_.erase(std::remove_if(watched_.begin(), watched_.end(),
                                  [](const Watched& watched) {
                                    return watched.comm->closed();
                                  }),
                   watched_.end());
    if (!stopped_ && pauses) stop_.wait_for(lock, kReadEvery);
  }
  watching_ = false;
  changed_.notify_all();
}

void Engine::Drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (const Entry& entry : entries_) entry.operation->Await();
  changed_.notify_all();
  changed_.wait(lock, [this] { return entries_.empty() && !leading_; });
}

void Engine::Stop() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopped_ = true;
  ++version_;
  changed_.notify_all();
  stop_.notify_all();
  changed_.wait(lock, [this] { return !leading_ && !watching_; });
}

void Engine::Run() {
  // The default timer slack of the kernel is longer than the naps.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    ++idle_;
    work_.wait(lock,
               [this] { return !leading_ && !stopped_ && !entries_.empty(); });
    --idle_;
    Entry ended = Lead(lock);
    if (ended.operation == nullptr || ended.waiter == nullptr) continue;
    // Another thread leads while the waiter runs.
    const bool more = !entries_.empty() && !stopped_;
    const bool spawn = more && idle_ == 0;
    lock.unlock();
    if (spawn) {
      std::thread([this] { Run(); }).detach();
    } else if (more) {
      work_.notify_one();
    }
    ended.waiter(ended.operation->error());
    ended = {};
    lock.lock();
  }
}

Engine::Entry Engine::Lead(std::unique_lock<std::mutex>& lock) {
  leading_ = true;
  std::vector<std::shared_ptr<Operation>> operations;
  std::uint64_t version = version_ - 1;
  Clock::time_point moved_at = Clock::now();
  Clock::time_point checked_at = moved_at;
  std::vector<Entry>::iterator ended;
  while (!stopped_) {
    ended = std::find_if(
        entries_.begin(), entries_.end(),
        [](const Entry& entry) { return entry.operation->finished(); });
    if (ended != entries_.end() || entries_.empty()) break;
    if (version != version_) {
      version = version_;
      operations.clear();
      for (const Entry& entry : entries_) {
        operations.push_back(entry.operation);
      }
      moved_at = Clock::now();
    }
    lock.unlock();
    bool moved = false;
    for (const auto& operation : operations) moved |= operation->Advance();
    const Clock::time_point now = Clock::now();
    if (moved) {
      moved_at = now;
    } else if (now - checked_at > kStallCheck) {
      checked_at = now;
      for (const auto& operation : operations) operation->CheckStall(now);
    }
    const Clock::duration quiet = now - moved_at;
    if (!moved && quiet < kYieldFor) sched_yield();
    lock.lock();
    if (!moved && quiet >= kYieldFor && version == version_) {
      const Clock::duration nap = std::clamp<Clock::duration>(
          quiet / kNapPart, kShortestNap, kLongestNap);
      changed_.wait_for(lock, nap);
    }
  }
  leading_ = false;
  changed_.notify_all();
  if (stopped_ || entries_.empty()) return {};
  Entry result = std::move(*ended);
  entries_.erase(ended);
  ++version_;
  return result;
}

}  // namespace jfog::mpi
