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
constexpr double kConfirm = 0.25;

}  // namespace

HangDetector::~HangDetector() {
  for (const Rank& rank : ranks_) {
    if (rank.descriptor >= 0) close(rank.descriptor);
  }
}

void HangDetector::Begin(double shortest, const std::vector<int>& processes) {
  std::lock_guard<std::mutex> lock(mutex_);
  shortest_ = shortest;
  for (std::size_t i = 0; i < ranks_.size() && i < processes.size(); ++i) {
    if (processes[i] <= 0 || ranks_[i].process > 0) continue;
    ranks_[i].process = processes[i];
#ifdef SYS_pidfd_open
    ranks_[i].descriptor =
        static_cast<int>(syscall(SYS_pidfd_open, processes[i], 0));
#endif
  }
  is_on_.store(true, std::memory_order_release);
}

void HangDetector::CountEnd(Clock::time_point now) {
  ends_.fetch_add(1, std::memory_order_relaxed);
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
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ranks_[rank].asked_at.reset();
    ranks_[rank].is_ended = false;
  }
  Suspect(rank, false);
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

void HangDetector::Suspect(int rank, bool is_suspect) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ranks_[rank].is_suspect == is_suspect) return;
  ranks_[rank].is_suspect = is_suspect;
  suspects_ += is_suspect ? 1 : -1;
  ranks_[rank].asked_at.reset();
}

std::vector<int> HangDetector::Suspects() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int> suspects;
  for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (ranks_[rank].is_suspect) suspects.push_back(static_cast<int>(rank));
  }
  return suspects;
}

bool HangDetector::Reaches(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return ranks_[rank].process > 0;
}

double HangDetector::ConfirmAfter() {
  std::lock_guard<std::mutex> lock(mutex_);
  return shortest_ * kConfirm;
}

void HangDetector::EndProcess(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Rank& ended = ranks_[rank];
#ifdef SYS_pidfd_send_signal
  if (ended.descriptor >= 0) {
    syscall(SYS_pidfd_send_signal, ended.descriptor, SIGKILL, nullptr, 0);
    return;
  }
#endif
  if (ended.process > 0) kill(ended.process, SIGKILL);
}

}  // namespace jfog::mpi
