// The deadline of a wait for peers: announcement, warning, expiry.
#include "common/deadline.h"

#include <cstdio>

namespace jfog {

Clock::duration WaitTime::Look() {
  const Clock::time_point now = Clock::now();
  if (now - looked_at_ <= kPause) waited_ += now - looked_at_;
  looked_at_ = now;
  return waited_;
}

bool Deadline::TakeAnnouncement(Clock::duration waited) {
  if (announced_ || Seconds(waited) <= kAnnounceAt * timeout_) return false;
  announced_ = true;
  return true;
}

bool Deadline::TakeWarning(Clock::duration waited) {
  if (warned_ || !IsLong(waited)) return false;
  warned_ = true;
  return true;
}

void Deadline::Warn(Clock::duration waited, const std::string& title,
                    const std::string& peers, const std::string& more) {
  if (!warns_) return;
  std::fprintf(stderr, "jfog: %s has waited %s for %s%s\n", title.c_str(),
               Format(waited).c_str(), peers.c_str(), more.c_str());
  std::fflush(stderr);
}

std::string Deadline::Expired(Clock::duration waited, const std::string& peers,
                              const std::string& leaves) {
  return "waited " + Format(waited) + " for " + peers +
         "; is it dead, slow, or in another operation? (" + leaves +
         "; the limit is jfog.init(timeout=...))";
}

}  // namespace jfog
