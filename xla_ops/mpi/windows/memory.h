// Memory of one rank's part of a window: exposed value, slots, locks.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_MEMORY_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_MEMORY_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

#include "mpi/payload.h"

namespace jfog::mpi {

// Fair lock between threads and between processes that share memory: first
// come, first served, so that a writer without a pause cannot starve a reader.
// The word with the holder excludes callers from each other; tickets only order
// them. So the lock outlives a process that ends while it holds the lock or
// waits for it: another one releases the lock for it, or passes its ticket.
class TicketLock {
 public:
  // For a process of that rank. False if `may_wait` returns false before it is
  // this caller's turn; its ticket then stays in the queue.
  bool Acquire(std::int32_t rank, const std::function<bool()>& may_wait);
  void Release() { Release(ticket_.load(std::memory_order_relaxed)); }

  // Acquisition in two steps, for a caller that polls.
  std::uint32_t TakeTicket() {
    return next_.fetch_add(1, std::memory_order_relaxed);
  }
  // Whether the caller holds it from now on.
  bool TryEnter(std::uint32_t ticket, std::int32_t rank) {
    // Not negative: its turn has come, or somebody has passed it.
    if (static_cast<std::int32_t>(serving() - ticket) < 0) return false;
    std::int32_t expected = kNobody;
    if (!holder_.compare_exchange_strong(expected, rank,
                                         std::memory_order_acquire)) {
      return false;
    }
    ticket_.store(ticket, std::memory_order_relaxed);
    return true;
  }

  // Releases it for a holder whose process has ended; the payload that it
  // guards may be half written.
  void ReleaseFor(std::int32_t holder) {
    const std::uint32_t ticket = ticket_.load(std::memory_order_relaxed);
    if (!holder_.compare_exchange_strong(holder, kNobody,
                                         std::memory_order_acq_rel)) {
      return;
    }
    Pass(ticket);
  }
  // Serves the next ticket after this one, whose owner has ended before it
  // entered. An owner that comes after all may enter late.
  void Pass(std::uint32_t ticket) {
    serving_.compare_exchange_strong(ticket, ticket + 1,
                                     std::memory_order_release);
  }

  // The rank that holds the lock.
  static constexpr std::int32_t kNobody = -1;
  std::int32_t holder() const {
    return holder_.load(std::memory_order_relaxed);
  }
  std::uint32_t serving() const {
    return serving_.load(std::memory_order_acquire);
  }

 private:
  void Release(std::uint32_t ticket) {
    holder_.store(kNobody, std::memory_order_release);
    Pass(ticket);
  }

  std::atomic<std::uint32_t> next_{0};
  std::atomic<std::uint32_t> serving_{0};
  std::atomic<std::int32_t> holder_{kNobody};
  std::atomic<std::uint32_t> ticket_{0};  // of the holder
};

// Looks at a lock that its caller waits for, and frees it from processes that
// have ended.
class LockLook {
 public:
  // `is_gone` says whether the process of a rank has ended.
  void Free(TicketLock& lock, const std::function<bool(int)>& is_gone);

 private:
  // A ticket that is served and does not enter: since when.
  std::uint32_t serving_ = 0;
  std::optional<std::chrono::steady_clock::time_point> since_;
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(std::atomic<std::int64_t>::is_always_lock_free);

// A view of memory that may be shared: a head, then records. Record 0 is the
// exposed value, written by its owner and read by other ranks; record 1 + k is
// the slot of the k-th in-neighbor, written by that neighbor and read by the
// owner.
class WindowMemory {
 public:
  enum State : std::int32_t {
    kOpen = 0,
    kFreed = 1,  // by its owner
    kEnded = 2,  // its owner has left the communicator
  };
  struct Head {
    std::atomic<std::int32_t> state{kOpen};
    TicketLock mutex;  // jfog.win_mutex
  };
  struct Record {
    TicketLock lock;
    std::atomic<std::int64_t> version{0};  // writes since the last update
  };

  static std::size_t Bytes(std::size_t payload_bytes, int records);

  WindowMemory() = default;
  WindowMemory(std::byte* memory, std::size_t payload_bytes);
  // Constructs the head and the records in place.
  void Initialize(int records);

  explicit operator bool() const { return memory_ != nullptr; }
  Head& head() const;
  Record& record(int i) const;
  // The payload of a record; access it under the record's lock.
  std::byte* payload(int i) const;
  State state() const {
    return static_cast<State>(head().state.load(std::memory_order_acquire));
  }

 private:
  std::byte* memory_ = nullptr;
  std::size_t payload_bytes_ = 0;
};

// `to = weight * payload` and `to += weight * payload`, where `to` is laid out
// like the payload. A weight of 1 copies the bits.
void WriteScaled(const Payload& payload, double weight, std::byte* to);
void AddScaled(const Payload& payload, double weight, std::byte* to);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_MEMORY_H_
