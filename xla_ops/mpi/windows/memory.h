// Memory of one rank's part of a window: exposed value, slots, locks.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_MEMORY_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_MEMORY_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "mpi/payload.h"

namespace jfog::mpi {

// Fair lock between threads and between processes that share memory: first
// come, first served, so that a writer without a pause cannot starve a reader.
// A caller that gives up leaves a ticket that is never released, so the lock
// cannot be acquired again.
class TicketLock {
 public:
  // False if `may_wait` returns false before it is this caller's turn.
  bool Acquire(const std::function<bool()>& may_wait);
  void Release() {
    holder_.store(kUnknown, std::memory_order_relaxed);
    serving_.fetch_add(1, std::memory_order_release);
  }

  // Acquisition in two steps, for a caller that polls.
  std::uint32_t TakeTicket() {
    return next_.fetch_add(1, std::memory_order_relaxed);
  }
  bool IsTurn(std::uint32_t ticket) const {
    return serving_.load(std::memory_order_acquire) == ticket;
  }

  // The rank that holds the lock, for errors of ranks that wait.
  static constexpr std::int32_t kUnknown = -1;
  void SetHolder(std::int32_t rank) {
    holder_.store(rank, std::memory_order_relaxed);
  }
  std::int32_t holder() const {
    return holder_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<std::uint32_t> next_{0};
  std::atomic<std::uint32_t> serving_{0};
  std::atomic<std::int32_t> holder_{kUnknown};
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
