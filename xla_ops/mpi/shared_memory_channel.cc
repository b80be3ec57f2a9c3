// Memory that the ranks of one machine share, for long exchanges.
#include "mpi/shared_memory_channel.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace jfog::mpi {
namespace {

constexpr std::size_t kLine = 64;

}  // namespace

// A stamp on a cache line of its own.
struct alignas(kLine) Lanes::Mark {
  std::atomic<std::uint64_t> stamp{0};
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

std::shared_ptr<Lanes> Lanes::Make(MPI_Comm comm, int local_size) {
  std::shared_ptr<Lanes> lanes(new Lanes);
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm real = MPI_COMM_NULL, machine = MPI_COMM_NULL;
  if (MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL,
                          &real) != MPI_SUCCESS) {
    return nullptr;
  }
  MPI_Comm_split(real, local_size > 0 ? rank / local_size : 0, rank, &machine);
  MPI_Comm_free(&real);
  MPI_Comm_set_errhandler(machine, MPI_ERRORS_RETURN);
  MPI_Comm_rank(machine, &lanes->me_);
  MPI_Comm_size(machine, &lanes->size_);
  const std::size_t marks = kLanes * kSlots * (1 + lanes->size_);
  const std::size_t bytes = marks * sizeof(Mark) + kLanes * kSlots * kSlotBytes;
  lanes->memory_ = SharedMemory::Make(machine, bytes);
  const bool usable = lanes->memory_ != nullptr;
  if (usable) {
    std::byte* own = lanes->memory_->of(lanes->me_);
    for (std::size_t i = 0; i < marks; ++i) new (own + i * sizeof(Mark)) Mark;
    lanes->local_ = RanksIn(comm, machine);
  }
  MPI_Barrier(machine);  // all marks are made
  MPI_Comm_free(&machine);
  return usable ? lanes : nullptr;
}

Lanes::Mark& Lanes::Ready(int local, int lane, int slot) const {
  return reinterpret_cast<Mark*>(memory_->of(local))[lane * kSlots + slot];
}

Lanes::Mark& Lanes::DoneMark(int local, int lane, int slot, int reader) const {
  return reinterpret_cast<Mark*>(memory_->of(
      local))[kLanes * kSlots + (lane * kSlots + slot) * size_ + reader];
}

std::byte* Lanes::Bytes(int local, int lane, int slot) const {
  return memory_->of(local) + kLanes * kSlots * (1 + size_) * sizeof(Mark) +
         (lane * kSlots + slot) * kSlotBytes;
}

bool Lanes::IsRead(const Own& own, int lane, int slot, int reader) const {
  return DoneMark(me_, lane, slot, reader)
             .stamp.load(std::memory_order_acquire) == own.stamps[slot];
}

std::optional<Lanes::Claim> Lanes::Acquire(const std::vector<int>& readers,
                                           std::uint64_t chunks) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int lane = 0; lane < kLanes; ++lane) {
    Own& own = own_[lane];
    bool free = !own.claimed;
    for (int slot = 0; free && slot < kSlots; ++slot) {
      if (own.stamps[slot] == 0) continue;
      for (int reader : own.readers) {
        free = free && IsRead(own, lane, slot, reader);
      }
    }
    if (!free) continue;
    own.claimed = true;
    own.stamps.fill(0);
    own.readers.clear();
    for (int rank : readers) own.readers.push_back(local_[rank]);
    const Claim claim{lane, next_};
    next_ += chunks;
    return claim;
  }
  return std::nullopt;
}

void Lanes::Release(const Claim& claim) {
  std::lock_guard<std::mutex> lock(mutex_);
  own_[claim.lane].claimed = false;
}

// A claimed lane is its operation's alone, which needs no lock.

std::byte* Lanes::Place(const Claim& claim, std::uint64_t chunk) const {
  const Own& own = own_[claim.lane];
  const int slot = static_cast<int>(chunk % kSlots);
  if (own.stamps[slot] != 0) {
    for (int reader : own.readers) {
      if (!IsRead(own, claim.lane, slot, reader)) return nullptr;
    }
  }
  return Bytes(me_, claim.lane, slot);
}

void Lanes::Publish(const Claim& claim, std::uint64_t chunk) {
  const int slot = static_cast<int>(chunk % kSlots);
  own_[claim.lane].stamps[slot] = claim.stamp + chunk;
  Ready(me_, claim.lane, slot)
      .stamp.store(claim.stamp + chunk, std::memory_order_release);
}

std::vector<int> Lanes::Behind(const Claim& claim, std::uint64_t chunk) const {
  const Own& own = own_[claim.lane];
  const int slot = static_cast<int>(chunk % kSlots);
  std::vector<int> behind;
  for (std::size_t rank = 0; rank < local_.size(); ++rank) {
    const bool reads =
        std::count(own.readers.begin(), own.readers.end(), local_[rank]) > 0;
    if (reads && own.stamps[slot] != 0 &&
        !IsRead(own, claim.lane, slot, local_[rank])) {
      behind.push_back(static_cast<int>(rank));
    }
  }
  return behind;
}

const std::byte* Lanes::Find(int sender, const Claim& claim,
                             std::uint64_t chunk) const {
  const int local = local_[sender];
  const int slot = static_cast<int>(chunk % kSlots);
  const std::uint64_t stamp =
      Ready(local, claim.lane, slot).stamp.load(std::memory_order_acquire);
  return stamp == claim.stamp + chunk ? Bytes(local, claim.lane, slot)
                                      : nullptr;
}

void Lanes::Done(int sender, const Claim& claim, std::uint64_t chunk) {
  DoneMark(local_[sender], claim.lane, static_cast<int>(chunk % kSlots), me_)
      .stamp.store(claim.stamp + chunk, std::memory_order_release);
}

}  // namespace jfog::mpi
