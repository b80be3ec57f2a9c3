// The deadline of a wait for peers: announcement, warning, expiry.
#ifndef JFOG_XLA_OPS_COMMON_DEADLINE_H_
#define JFOG_XLA_OPS_COMMON_DEADLINE_H_

#include <atomic>
#include <chrono>
#include <string>

#include "common/format.h"

namespace jfog {

// Fractions of the timeout: when a waiting rank announces its position to the
// others, and when it warns its user.
constexpr double kAnnounceAt = 0.05;
constexpr double kWarnAt = 0.1;

// A longer time between two looks is a pause of this process.
constexpr std::chrono::seconds kPause{1};

// The time that a caller has waited and looked, in a loop with short naps. Time
// without a look is left out: a process that is suspended does not wait.
class WaitTime {
 public:
  WaitTime() { ++waits_; }
  ~WaitTime() { --waits_; }
  WaitTime(const WaitTime&) = delete;
  WaitTime& operator=(const WaitTime&) = delete;

  // Whether this process waits so anywhere.
  static bool Any() { return waits_ > 0; }
  // The time up to this look.
  Clock::duration Look();

 private:
  inline static std::atomic<int> waits_{0};
  Clock::time_point looked_at_ = Clock::now();
  Clock::duration waited_{0};
};

class Deadline {
 public:
  explicit Deadline(double timeout) : timeout_(timeout) {}

  // True once per wait, when it is time to announce the position.
  bool TakeAnnouncement(Clock::duration waited);
  // True once per wait, when it is time for a warning.
  bool TakeWarning(Clock::duration waited);
  // Prints a warning, unless warnings are off: `more` follows the peers.
  static void Warn(Clock::duration waited, const std::string& title,
                   const std::string& peers, const std::string& more = "");
  // Whether this process prints warnings of waits.
  static void SetWarnings(bool on) { warns_ = on; }
  bool IsLong(Clock::duration waited) const {
    return Seconds(waited) > kWarnAt * timeout_;
  }
  bool HasExpired(Clock::duration waited) const {
    return Seconds(waited) > timeout_;
  }
  // Prepares for the next wait.
  void Reset() { announced_ = warned_ = false; }

  // The text of the failure after a title.
  static std::string Expired(Clock::duration waited, const std::string& peers,
                             const std::string& leaves);

 private:
  double timeout_;  // seconds
  bool announced_ = false;
  bool warned_ = false;
  inline static std::atomic<bool> warns_{true};
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_DEADLINE_H_
