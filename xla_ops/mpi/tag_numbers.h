// Numbers for tags, which are fewer than the operations that use them.
#ifndef JFOG_XLA_OPS_MPI_TAG_NUMBERS_H_
#define JFOG_XLA_OPS_MPI_TAG_NUMBERS_H_

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "mpi/wire_format.h"

namespace jfog::mpi {

// The count of numbers; a test that lets them repeat sets fewer.
inline int TagNumbers() {
  static const int count = [] {
    const char* text = std::getenv("JFOG_TEST_CHUNK_TAGS");
    const long given = text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    return given > 0 && given < kChunkTags ? static_cast<int>(given)
                                           : kChunkTags;
  }();
  return count;
}

// The order of the operations of a communicator that have the same number. MPI
// matches messages of one tag in the order of their posts, so an operation
// posts none before every operation of that number ahead of it has ended here.
// An operation waits for earlier ones only, so none waits for good.
class TagOrder {
 public:
  int NumberOf(std::uint64_t sequence) const {
    return static_cast<int>(sequence % static_cast<unsigned>(count_));
  }
  // Called in program order.
  void Enter(std::uint64_t sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.insert(open_.end(), sequence);
  }
  void Leave(std::uint64_t sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(sequence);
  }
  // Whether no operation that has not ended has this number or a number of a
  // turn before.
  bool IsTurnOf(std::uint64_t sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    return *open_.begin() + static_cast<unsigned>(count_) > sequence;
  }

 private:
  const int count_ = TagNumbers();
  std::mutex mutex_;
  std::set<std::uint64_t> open_;  // the sequence numbers that have entered
};

// The use of a number by one operation.
class TagUse {
 public:
  TagUse() = default;
  ~TagUse() { Leave(); }
  TagUse(const TagUse&) = delete;
  TagUse& operator=(const TagUse&) = delete;

  void Enter(TagOrder& order, std::uint64_t sequence) {
    Leave();
    order.Enter(sequence);
    order_ = &order;
    sequence_ = sequence;
    is_ready_ = false;
  }
  void Leave() {
    if (order_ != nullptr) order_->Leave(sequence_);
    order_ = nullptr;
    is_ready_ = true;
  }
  // Whether messages may be posted; an operation that never enters has none.
  bool is_ready() const { return is_ready_; }
  // Looks again; returns whether that has become true.
  bool BecomesReady() {
    if (is_ready_) return false;
    is_ready_ = order_->IsTurnOf(sequence_);
    return is_ready_;
  }

 private:
  TagOrder* order_ = nullptr;
  std::uint64_t sequence_ = 0;
  bool is_ready_ = true;
};

// The numbers of requests to windows, whose replies come in any order: a number
// is taken by one request at a time.
class RequestNumbers {
 public:
  // Null if all are taken.
  std::optional<int> Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (taken_.empty()) taken_.resize(TagNumbers());
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      const std::size_t number = next_++ % taken_.size();
      if (taken_[number]) continue;
      taken_[number] = true;
      return static_cast<int>(number);
    }
    return std::nullopt;
  }
  void GiveBack(int number) {
    std::lock_guard<std::mutex> lock(mutex_);
    taken_[number] = false;
  }

 private:
  std::mutex mutex_;
  std::size_t next_ = 0;
  std::vector<bool> taken_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_TAG_NUMBERS_H_
