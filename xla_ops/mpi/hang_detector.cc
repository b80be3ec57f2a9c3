// Ranks that are alive and stuck, found by how long the others wait for them.
#include "mpi/hang_detector.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace jfog::mpi {
namespace {

// Times between ends of operations that are kept, and how many tell a pace.
constexpr std::size_t kTimes = 256;
constexpr std::size_t kFewest = 16;
// A pause that comes once in `kTimes` operations makes the deviation a 16th of
// it. This many deviations are longer than the pause.
constexpr double kDeviations = 20;

}  // namespace

HangDetector::~HangDetector() {
  for (const Rank& rank : ranks_) {
    if (rank.process >= 0) close(rank.process);
  }
}

void HangDetector::Begin(double shortest, const std::vector<int>& processes) {
  std::lock_guard<std::mutex> lock(mutex_);
  shortest_ = shortest;
  for (std::size_t i = 0; i < ranks_.size() && i < processes.size(); ++i) {
    if (processes[i] <= 0 || ranks_[i].process >= 0) continue;
#ifdef SYS_pidfd_open
    ranks_[i].process =
        static_cast<int>(syscall(SYS_pidfd_open, processes[i], 0));
#endif
  }
  is_on_.store(true, std::memory_order_release);
}

void HangDetector::CountEnd(Clock::time_point now) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ended_at_) {
    const double time = Seconds(now - *ended_at_);
    if (times_.size() < kTimes) {
      times_.push_back(time);
    } else {
      times_[next_] = time;
      next_ = (next_ + 1) % kTimes;
    }
  }
  ended_at_ = now;
}

void HangDetector::SkipTime() {
  std::lock_guard<std::mutex> lock(mutex_);
  ended_at_.reset();
}

std::optional<HangDetector::Pace> HangDetector::FindPace() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (times_.size() < kFewest) return std::nullopt;
  std::vector<double> times = times_;
  const auto middle = times.begin() + times.size() / 2;
  std::nth_element(times.begin(), middle, times.end());
  Pace pace;
  pace.median = *middle;
  const double count = static_cast<double>(times.size());
  const double mean = std::accumulate(times.begin(), times.end(), 0.0) / count;
  double squares = 0;
  for (double time : times) squares += (time - mean) * (time - mean);
  pace.deviation = std::sqrt(squares / count);
  pace.limit = std::max(shortest_, pace.median + kDeviations * pace.deviation);
  return pace;
}

void HangDetector::CountQuestion(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!ranks_[rank].asked_at) ranks_[rank].asked_at = Clock::now();
}

void HangDetector::CountAnswer(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  ranks_[rank].asked_at.reset();
}

void HangDetector::ForgetQuestions() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Rank& rank : ranks_) rank.asked_at.reset();
}

double HangDetector::Unanswered(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto asked_at = ranks_[rank].asked_at;
  return asked_at ? Seconds(Clock::now() - *asked_at) : 0;
}

bool HangDetector::TakeVerdict(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return !std::exchange(ranks_[rank].is_ended, true);
}

void HangDetector::EndProcess(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
#ifdef SYS_pidfd_send_signal
  if (ranks_[rank].process >= 0) {
    syscall(SYS_pidfd_send_signal, ranks_[rank].process, SIGKILL, nullptr, 0);
  }
#endif
}

}  // namespace jfog::mpi
