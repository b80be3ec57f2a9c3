// Memory of one rank's part of a window: exposed value, slots, locks.
#include "mpi/windows/memory.h"

#include <sched.h>

#include <cstring>
#include <new>
#include <thread>

#include "common/cache_line.h"
#include "common/weighted_sum.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

// A lock is held for the copy of a payload, or longer if its holder waits for a
// core: yield the core first, then sleep.
constexpr int kYields = 200;
constexpr std::chrono::microseconds kMemoryNap{50};
// A process whose turn has come enters within this time, or has ended.
constexpr std::chrono::milliseconds kPassAfter{20};
constexpr std::size_t kHeadBytes = AlignUp(sizeof(WindowMemory::Head));
constexpr std::size_t kRecordBytes = AlignUp(sizeof(WindowMemory::Record));

}  // namespace

bool TicketLock::Acquire(std::int32_t rank,
                         const std::function<bool()>& may_wait) {
  const std::uint32_t ticket = TakeTicket();
  for (int polls = 0; !TryEnter(ticket, rank); ++polls) {
    if (polls < kYields) {
      sched_yield();
    } else if (may_wait()) {
      std::this_thread::sleep_for(kMemoryNap);
    } else {
      return false;
    }
  }
  return true;
}

void LockLook::Free(TicketLock& lock, const std::function<bool(int)>& is_gone) {
  const std::int32_t holder = lock.holder();
  if (holder != TicketLock::kNobody) {
    since_.reset();
    if (is_gone(holder)) lock.ReleaseFor(holder);
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (!since_ || lock.serving() != serving_) {
    serving_ = lock.serving();
    since_ = now;
  } else if (now - *since_ > kPassAfter) {
    lock.Pass(serving_);
    since_.reset();
  }
}

std::size_t WindowMemory::Bytes(std::size_t payload_bytes, int records) {
  return kHeadBytes + records * (kRecordBytes + AlignUp(payload_bytes));
}

WindowMemory::WindowMemory(std::byte* memory, std::size_t payload_bytes)
    : memory_(memory), payload_bytes_(AlignUp(payload_bytes)) {}

void WindowMemory::Initialize(int records) {
  new (memory_) Head;
  for (int i = 0; i < records; ++i) new (&record(i)) Record;
}

WindowMemory::Head& WindowMemory::head() const {
  return *reinterpret_cast<Head*>(memory_);
}

WindowMemory::Record& WindowMemory::record(int i) const {
  return *reinterpret_cast<Record*>(memory_ + kHeadBytes +
                                    i * (kRecordBytes + payload_bytes_));
}

std::byte* WindowMemory::payload(int i) const {
  return reinterpret_cast<std::byte*>(&record(i)) + kRecordBytes;
}

void WriteScaled(const Payload& payload, double weight, std::byte* to) {
  for (const Leaf& leaf : payload) {
    if (leaf.count == 0) continue;
    if (weight == 1) {
      std::memcpy(to + leaf.offset, leaf.input, leaf.bytes());
    } else {
      WeightedSum(leaf.type, leaf.count, leaf.input, weight, {},
                  /*difference=*/false, to + leaf.offset);
    }
  }
}

void AddScaled(const Payload& payload, double weight, std::byte* to) {
  for (const Leaf& leaf : payload) {
    if (leaf.count == 0) continue;
    std::byte* sum = to + leaf.offset;
    WeightedSum(leaf.type, leaf.count, sum, 1, {{leaf.input, weight}},
                /*difference=*/false, sum);
  }
}

}  // namespace jfog::mpi
