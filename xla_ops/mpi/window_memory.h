// One rank's part of a window in memory: its value, its slots, their locks.
#ifndef JFOG_XLA_OPS_MPI_WINDOW_MEMORY_H_
#define JFOG_XLA_OPS_MPI_WINDOW_MEMORY_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "mpi/payload.h"

namespace jfog::mpi {

// Excludes threads and processes that share memory, in the order in which they
// come: a writer without a pause cannot keep a reader away. Whoever gives up
// has a turn that never ends, so what was locked is of no use any more.
class TicketLock {
 public:
  // False, if `may_wait` says so before it is this caller's turn.
  bool Acquire(const std::function<bool()>& may_wait);
  void Release() { serving_.fetch_add(1, std::memory_order_release); }

  // In two steps, for who has other things to do meanwhile.
  std::uint32_t TakeTicket() {
    return next_.fetch_add(1, std::memory_order_relaxed);
  }
  bool IsTurn(std::uint32_t ticket) const {
    return serving_.load(std::memory_order_acquire) == ticket;
  }

 private:
  std::atomic<std::uint32_t> next_{0};
  std::atomic<std::uint32_t> serving_{0};
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
static_assert(std::atomic<std::int64_t>::is_always_lock_free);

// A view of memory that may be shared: a head, and records. Record 0 is the
// value that is exposed, which its owner writes and others read; record 1 + k
// is the slot of the k-th in-neighbor, who writes it, and the owner reads it.
class WindowMemory {
 public:
  enum State : std::int32_t {
    kOpen = 0,
    kFreed = 1,  // by its owner
    kEnded = 2,  // its owner has left
  };
  struct Head {
    std::atomic<std::int32_t> state{kOpen};
    TicketLock mutex;  // the user's
  };
  struct Record {
    TicketLock lock;
    std::atomic<std::int64_t> version{0};
  };

  static std::size_t Bytes(std::size_t payload_bytes, int records);

  WindowMemory() = default;
  WindowMemory(std::byte* memory, std::size_t payload_bytes);
  // Makes head and records.
  void Initialize(int records);

  explicit operator bool() const { return memory_ != nullptr; }
  Head& head() const;
  Record& record(int i) const;
  // The payload of a record, to be used under its lock.
  std::byte* payload(int i) const;
  State state() const {
    return static_cast<State>(head().state.load(std::memory_order_acquire));
  }

 private:
  std::byte* memory_ = nullptr;
  std::size_t payload_bytes_ = 0;
};

// `to = weight leaves` and `to += weight leaves`, where `to` is a payload of
// such leaves. A weight of 1 writes the bits.
void WriteScaled(const Leaves& leaves, double weight, std::byte* to);
void AddScaled(const Leaves& leaves, double weight, std::byte* to);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOW_MEMORY_H_
