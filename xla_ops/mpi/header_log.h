// The headers of the last operations of a communicator, for ranks that ask.
#ifndef JFOG_XLA_OPS_MPI_HEADER_LOG_H_
#define JFOG_XLA_OPS_MPI_HEADER_LOG_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/cache_line.h"
#include "common/operation_header.h"

namespace jfog::mpi {

// A ring by sequence number. Writers of different numbers and readers may run
// at the same time; a reader of an entry that is being written finds nothing.
class HeaderLog {
 public:
  static constexpr std::size_t kEntries = 1024;

  HeaderLog() : entries_(kEntries) {}

  // `name` must live as long as the log.
  void Record(const OperationHeader& header, const char* name) {
    Entry& entry = entries_[header.sequence % kEntries];
    entry.number.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    entry.signature.store(header.signature, std::memory_order_relaxed);
    entry.variant.store(header.variant, std::memory_order_relaxed);
    entry.leaves.store(header.leaves, std::memory_order_relaxed);
    entry.check.store(header.check, std::memory_order_relaxed);
    entry.name.store(name, std::memory_order_relaxed);
    entry.number.store(header.sequence + 1, std::memory_order_release);
  }

  // Null if the operation has not started, or is not among the last ones.
  std::optional<OperationHeader> Find(std::uint64_t sequence) const {
    const Entry& entry = entries_[sequence % kEntries];
    if (entry.number.load(std::memory_order_acquire) != sequence + 1) {
      return std::nullopt;
    }
    OperationHeader header =
        MakeHeader(entry.name.load(std::memory_order_relaxed), sequence,
                   entry.signature.load(std::memory_order_relaxed),
                   entry.variant.load(std::memory_order_relaxed),
                   entry.leaves.load(std::memory_order_relaxed));
    header.check = entry.check.load(std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (entry.number.load(std::memory_order_relaxed) != sequence + 1) {
      return std::nullopt;
    }
    return header;
  }

 private:
  struct alignas(kCacheLine) Entry {
    std::atomic<std::uint64_t> number{0};  // sequence number + 1; 0: none
    std::atomic<std::uint64_t> signature{0};
    std::atomic<std::uint64_t> variant{0};
    std::atomic<std::uint64_t> leaves{0};
    std::atomic<std::uint64_t> check{0};
    std::atomic<const char*> name{nullptr};
  };

  std::vector<Entry> entries_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_HEADER_LOG_H_
