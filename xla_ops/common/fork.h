// Forks of this process, which have neither its threads nor its connections.
#ifndef JFOG_XLA_OPS_COMMON_FORK_H_
#define JFOG_XLA_OPS_COMMON_FORK_H_

#include <pthread.h>

#include <atomic>
#include <string>

#include "common/status.h"

namespace jfog {

inline std::atomic<bool> is_forked{false};

// Whether this process is a fork of the one that called `WatchForks`. A load
// and no system call, because every operation asks.
inline bool IsForked() { return is_forked.load(std::memory_order_relaxed); }

inline void WatchForks() {
  static const int code =
      pthread_atfork(nullptr, nullptr, [] { is_forked.store(true); });
  (void)code;  // without memory for it, forks are not noticed
}

// The error of work in a fork.
inline ffi::Error ForkedError(const std::string& name) {
  return MakeError(
      ffi::ErrorCode::kFailedPrecondition,
      name +
          " in a fork of a rank, which has neither its threads nor its "
          "connections; start the process by 'spawn' instead, and call "
          "jfog.init(backend='single') in it for a world of its own");
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_FORK_H_
