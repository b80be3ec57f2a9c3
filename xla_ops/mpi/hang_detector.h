// Ranks that are alive and stuck, found by how long the others wait for them.
#ifndef JFOG_XLA_OPS_MPI_HANG_DETECTOR_H_
#define JFOG_XLA_OPS_MPI_HANG_DETECTOR_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/format.h"

namespace jfog::mpi {

// Of one communicator of a fault-tolerant job. A rank is stuck if another one
// waits for it for much longer than operations usually take, and it does not
// answer meanwhile that it waits in an operation, too. Its process is ended, so
// that it is a failed rank for all others, and does not come back.
class HangDetector {
 public:
  // The usual time from the end of one operation to that of the next, and the
  // shortest wait that is a hang; all in seconds.
  struct Pace {
    double median = 0;
    double deviation = 0;
    double limit = 0;
  };

  explicit HangDetector(int size) : ranks_(size) {}
  ~HangDetector();
  HangDetector(const HangDetector&) = delete;
  HangDetector& operator=(const HangDetector&) = delete;

  // Turns it on. A hang lasts for at least `shortest` seconds. `processes`
  // has the process of each rank, 0 for those that this one cannot end.
  void Begin(double shortest, const std::vector<int>& processes);
  bool is_on() const { return is_on_.load(std::memory_order_acquire); }

  // An operation has ended that all ranks come to.
  void CountEnd(Clock::time_point now);
  // Those that have ended in this process, on all communicators.
  static std::uint64_t Ends() { return ends_.load(std::memory_order_relaxed); }
  // Leaves out the time up to the next end: a rank has failed meanwhile.
  void SkipTime();
  // Nullopt before enough operations have ended to know.
  std::optional<Pace> FindPace();

  // This rank asks another one whether it waits; the answer is that it does.
  void CountQuestion(int rank);
  void CountAnswer(int rank);
  // After a pause of this process: answers may wait to be read.
  void ForgetQuestions();
  // Seconds since the first question that is not answered; 0 if there is none.
  double Unanswered(int rank);

  // True for the first verdict of this rank that another one is stuck, and for
  // the first one after an answer.
  bool TakeVerdict(int rank);

  // Another rank says that this one is stuck; or no longer.
  void Suspect(int rank, bool is_suspect);
  bool has_suspects() const {
    return suspects_.load(std::memory_order_relaxed) > 0;
  }
  std::vector<int> Suspects();
  // Whether this rank can end the process of that one.
  bool Reaches(int rank);
  // Seconds without an answer by which a suspect is stuck for this rank, too.
  double ConfirmAfter();
  // Kills the process of a rank, if it can be reached from this one.
  void EndProcess(int rank);

 private:
  struct Rank {
    std::optional<Clock::time_point> asked_at;
    bool is_ended = false;
    bool is_suspect = false;
    int process = 0;  // its number; 0 if this rank cannot end it
    // A descriptor, which outlives the number; -1 before Linux 5.3.
    int descriptor = -1;
  };

  inline static std::atomic<std::uint64_t> ends_{0};
  std::atomic<bool> is_on_{false};
  std::atomic<int> suspects_{0};
  std::mutex mutex_;  // guards all below
  double shortest_ = 0;
  std::vector<Rank> ranks_;
  std::optional<Clock::time_point> ended_at_;  // the last operation
  std::vector<double> times_;                  // seconds; the last ones
  std::size_t next_ = 0;                       // the oldest of these
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_HANG_DETECTOR_H_
