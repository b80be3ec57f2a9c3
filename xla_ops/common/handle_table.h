// Started operations by the number of their handle, until they are waited on.
#ifndef JFOG_XLA_OPS_COMMON_HANDLE_TABLE_H_
#define JFOG_XLA_OPS_COMMON_HANDLE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "common/status.h"

namespace jfog {

inline ffi::Error HandleNotOpen(const std::string& handle, const char* name) {
  return MakeError(ffi::ErrorCode::kFailedPrecondition,
                   std::string(name) + " on " + handle +
                       ", which is not open: a handle is waited on once, "
                       "before the shutdown of its communicator");
}

template <typename T>
class HandleTable {
 public:
  // `first` is the number of the first handle. A number has 64 bits, which last
  // for longer than any process, so that none is that of two operations.
  explicit HandleTable(std::uint64_t first = 1) : next_(first) {}

  // Writes the number as two words, the lower one first: JAX has no integers of
  // 64 bits by default. It is written and read under the lock: XLA passes it
  // from one thread to another by means that ThreadSanitizer does not see.
  void Insert(std::shared_ptr<T> started, std::uint32_t* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (open_.size() >= kManyHandles && !warned_) {
      warned_ = true;
      std::fprintf(stderr,
                   "jfog: %zu operations were started and not waited on; each "
                   "keeps a copy of its leaves until jfog.wait\n",
                   open_.size());
    }
    open_.emplace(next_, std::move(started));
    handle[0] = static_cast<std::uint32_t>(next_);
    handle[1] = static_cast<std::uint32_t>(next_ >> 32);
    ++next_;
  }

  // The operation of a handle; `take` closes the handle.
  ffi::ErrorOr<std::shared_ptr<T>> Find(const std::uint32_t* handle, bool take,
                                        const char* name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::uint64_t number =
        handle[0] | static_cast<std::uint64_t>(handle[1]) << 32;
    const auto found = open_.find(number);
    if (found == open_.end()) {
      return ffi::Unexpected(
          HandleNotOpen("handle " + std::to_string(number), name));
    }
    std::shared_ptr<T> started = found->second;
    if (take) open_.erase(found);
    return started;
  }

  // Closes the handles of which `matches` is true; returns their number.
  template <typename Predicate>
  int Forget(Predicate matches) {
    std::lock_guard<std::mutex> lock(mutex_);
    int forgotten = 0;
    for (auto it = open_.begin(); it != open_.end();) {
      if (matches(*it->second)) {
        it = open_.erase(it);
        ++forgotten;
      } else {
        ++it;
      }
    }
    return forgotten;
  }

 private:
  // More open handles than this are probably a mistake of the program.
  static constexpr std::size_t kManyHandles = 1000;

  std::mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<T>> open_;
  std::uint64_t next_;
  bool warned_ = false;
};

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_HANDLE_TABLE_H_
