// The progress engine: advances all operations in flight, beside computation.
#include "mpi/progress_engine.h"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <system_error>
#include <thread>

#include "common/process_wide.h"

namespace jfog::mpi {
namespace {

// While messages arrive, the leader polls again at once, then yields between
// polls. After kEngineYieldFor without progress it sleeps between two polls for
// a fraction of the quiet time: the longer a wait has lasted, the less a late
// wake-up matters, and the less of a core the wait takes.
constexpr std::chrono::microseconds kEngineYieldFor{100};
constexpr int kNapPart = 32;
constexpr std::chrono::microseconds kShortestNap{20};
constexpr std::chrono::microseconds kLongestNap{1000};
// Interval at which control messages and requests are read between operations.
// While requests are served, and shortly after, there is no pause.
constexpr std::chrono::milliseconds kReadEvery{1};
constexpr std::chrono::microseconds kServeFor{300};
// A round polls so many of the first operations, which are those that callers
// wait for and then the oldest, and others in turn: as many, and as many again
// for each kWiden without progress, so that a round stays short beside the wait
// before it: the peer waits for it, and its next round must not be longer. A
// round of all, with each of which one ends, would be quadratic.
constexpr std::size_t kFirst = 64;
// Of so many of the first operations waits are counted.
constexpr std::size_t kCounted = 16;
constexpr std::chrono::microseconds kWiden{200};
// Operations of which the state is printed.
constexpr std::size_t kMostLines = 50;
// Interval of the checks for stalls.
constexpr std::chrono::milliseconds kStallCheck{10};

}  // namespace

Engine& Engine::Get() { return ProcessWide<Engine>(); }

void Engine::Submit(std::shared_ptr<Operation> operation, Waiter waiter) {
  Entries entry;
  entry.push_back({std::move(operation), std::move(waiter)});
  const Operation* const submitted = entry.front().operation.get();
  bool spawn = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (entry.front().waiter) {
      attached_.push_back(entry.front().operation.get());
    }
    open_.emplace(entry.front().operation.get(), entry.begin());
    added_.splice(added_.end(), entry);
    spawn = !leading_ && idle_ == 0;
  }
  if (spawn) {
    // Without a new thread one that calls a waiter takes it up later.
    if (!Spawn()) GiveUp(submitted);
  } else {
    work_.notify_one();
    changed_.notify_all();
  }
}

bool Engine::Spawn() {
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    std::thread([this] { Run(); }).detach();
  } catch (const std::system_error&) {
    return false;
  }
  ++threads_;
  return true;
}

void Engine::GiveUp(const Operation* operation) {
  Entries given_up;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto open = open_.find(operation);
    if (threads_ > 0 || open == open_.end()) return;
    given_up.splice(given_up.end(), added_, open->second);
    open_.erase(open);
  }
  Entry& entry = given_up.front();
  try {
    throw std::system_error(EAGAIN, std::generic_category(),
                            "the progress engine");
  } catch (...) {
    entry.operation->EndByException();
  }
  if (entry.waiter) entry.waiter(entry.operation->error());
}

bool Engine::Attach(const std::shared_ptr<Operation>& operation,
                    Waiter& waiter) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto open = open_.find(operation.get());
    if (open == open_.end()) return false;
    attached_.push_back(operation.get());
    open->second->waiter = std::move(waiter);
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
      try {
        if (serve == nullptr) {
          comm->ReadControlMessages();
          if (comm->HasQuestions()) comm->AnswerQuestions(IsWaiting());
          if (comm->hangs().has_suspects()) comm->CheckSuspects();
        } else {
          busy = serve() || busy;
        }
      } catch (...) {
        FailByException(comm.get(), "the service of other ranks");
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

bool Engine::IsWaiting() {
  if (WaitTime::Any() || Operation::AnyBlocked()) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(open_.begin(), open_.end(), [](const auto& entry) {
    return entry.first->is_awaited();
  });
}

std::string Engine::State() {
  std::vector<std::shared_ptr<Operation>> open;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [operation, entry] : open_) {
      open.push_back(entry->operation);
    }
  }
  std::sort(open.begin(), open.end(), [](const auto& a, const auto& b) {
    return a->sequence() < b->sequence();
  });
  const Clock::time_point now = Clock::now();
  std::vector<std::string> lines = Operation::StatesOfBlocked(now);
  for (const auto& operation : open) {
    if (lines.size() == kMostLines) break;
    lines.push_back(operation->State(now));
  }
  std::string text;
  for (const auto& comm : Communicators().All()) {
    // Its parts are named once they are used.
    const std::string position = comm->Position();
    if (position.empty()) continue;
    text += "jfog: rank " + std::to_string(comm->rank()) + " of " +
            std::to_string(comm->size()) + ": " + position + "\n";
  }
  for (const std::string& line : lines) text += "jfog: " + line + "\n";
  if (lines.empty()) text += "jfog: no operation is in flight\n";
  return text;
}

void Engine::Drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (const auto& [operation, entry] : open_) entry->operation->Await();
  changed_.notify_all();
  changed_.wait(lock, [this] { return !has_work() && !leading_; });
}

void Engine::Stop() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopped_ = true;
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
    work_.wait(lock, [this] { return !leading_ && !stopped_ && has_work(); });
    --idle_;
    Entries ended = Lead(lock);
    if (ended.empty()) continue;
    // Another thread leads while the waiter runs.
    const bool more = has_work() && !stopped_;
    const bool spawn = more && idle_ == 0;
    lock.unlock();
    if (spawn) {
      Spawn();
    } else if (more) {
      work_.notify_one();
    }
    ended.front().waiter(ended.front().operation->error());
    ended.clear();
    lock.lock();
  }
}

bool Engine::TakeUp() {
  bool any = !added_.empty() || !attached_.empty();
  polled_.splice(polled_.end(), added_);
  // A caller waits for these, so they come first.
  for (const Operation* operation : attached_) {
    const auto open = open_.find(operation);
    if (open == open_.end()) continue;
    if (next_ == open->second) ++next_;
    polled_.splice(polled_.begin(), polled_, open->second);
  }
  attached_.clear();
  return any;
}

bool Engine::Poll(std::size_t others, Entries* ended) {
  bool moved = false;
  const auto poll = [&](Entries::iterator entry) {
    moved |= entry->operation->Advance();
    const auto after = std::next(entry);
    if (entry->operation->finished()) {
      if (next_ == entry) next_ = after;
      ended->splice(ended->end(), polled_, entry);
    }
    return after;
  };
  auto entry = polled_.begin();
  for (std::size_t i = 0; i < kFirst && entry != polled_.end(); ++i) {
    entry = poll(entry);
  }
  if (entry == polled_.end()) return moved;
  others = std::min(others, polled_.size());
  for (std::size_t i = 0; i < others && !polled_.empty(); ++i) {
    if (next_ == polled_.end()) next_ = polled_.begin();
    next_ = poll(next_);
  }
  return moved;
}

Engine::Entries Engine::Lead(std::unique_lock<std::mutex>& lock) {
  leading_ = true;
  Clock::time_point moved_at = Clock::now();
  Clock::time_point checked_at = moved_at;
  Clock::duration quiet{0};
  Entries unawaited;  // ended ones, destroyed without the lock
  while (!stopped_ && ended_.empty()) {
    if (TakeUp()) moved_at = Clock::now();
    if (polled_.empty()) break;
    lock.unlock();
    unawaited.clear();
    Entries ended;
    const bool moved = Poll(kFirst * (1 + quiet / kWiden), &ended);
    const Clock::time_point now = Clock::now();
    if (moved) {
      moved_at = now;
    } else if (now - checked_at > kStallCheck) {
      checked_at = now;
      for (const Entry& entry : polled_) entry.operation->CheckStall(now);
    }
    quiet = now - moved_at;
    if (!moved && quiet < kEngineYieldFor) sched_yield();
    if (!moved && quiet >= kEngineYieldFor) {
      std::size_t counted = 0;
      for (const Entry& entry : polled_) {
        if (++counted > kCounted) break;
        entry.operation->CountWaitUntil(now);
      }
    }
    lock.lock();
    for (auto entry = ended.begin(); entry != ended.end();) {
      const auto end = entry++;
      open_.erase(end->operation.get());
      Entries& to = end->waiter == nullptr ? unawaited : ended_;
      to.splice(to.end(), ended, end);
    }
    if (!moved && quiet >= kEngineYieldFor && ended_.empty() &&
        added_.empty() && attached_.empty() && !stopped_) {
      const Clock::duration nap = std::clamp<Clock::duration>(
          quiet / kNapPart, kShortestNap, kLongestNap);
      changed_.wait_for(lock, nap);
    }
  }
  leading_ = false;
  changed_.notify_all();
  Entries result;
  if (!stopped_ && !ended_.empty()) {
    result.splice(result.begin(), ended_, ended_.begin());
  }
  return result;
}

}  // namespace jfog::mpi
