// Shared-memory channels: payloads between the ranks of one machine.
#include "mpi/shared_memory_channel.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "common/cache_line.h"
#include "mpi/collective_start.h"

namespace jfog::mpi {
// A stamp on its own cache line, against false sharing between ranks.
struct alignas(kCacheLine) Channels::Mark {
  std::atomic<std::uint64_t> stamp{0};
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

namespace {

// The ranks of `comm` that share memory with this one and are on the same
// pretended machine. Collective.
std::vector<int> RanksOn(int machine, MPI_Comm comm) {
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  std::vector<int> machines(SizeOfComm(comm)), ranks;
  Require(
      MPI_Allgather(&machine, 1, MPI_INT, machines.data(), 1, MPI_INT, comm),
      "MPI_Allgather");
  const TemporaryComm real = TemporaryComm::OfMachine(comm, rank);
  for (int other : RanksOf(real.comm(), comm)) {
    if (machines[other] == machine) ranks.push_back(other);
  }
  return ranks;
}

}  // namespace

std::shared_ptr<Channels> Channels::Make(MPI_Comm comm, int machine_index) {
  const std::vector<int> ranks = RanksOn(machine_index, comm);
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  std::shared_ptr<Channels> channels(new Channels);
  channels->local_ = PlacesIn(ranks, SizeOfComm(comm));
  channels->me_ = channels->local_[rank];
  channels->size_ = static_cast<int>(ranks.size());
  channels->forgotten_ = std::vector<std::atomic<bool>>(ranks.size());
  const std::size_t marks = kChannels * kSlots * (1 + ranks.size());
  const std::size_t bytes =
      marks * sizeof(Mark) + kChannels * kSlots * kSlotBytes;
  channels->memory_ = SharedMemory::Make(comm, ranks, bytes);
  const bool usable = channels->memory_ != nullptr;
  if (usable) {
    std::byte* own = channels->memory_->own();
    for (std::size_t i = 0; i < marks; ++i) new (own + i * sizeof(Mark)) Mark;
  }
  // No rank reads a mark before it is constructed.
  Require(MPI_Barrier(comm), "MPI_Barrier");
  return usable ? channels : nullptr;
}

Channels::Mark& Channels::Ready(int local, int channel, int slot) const {
  return reinterpret_cast<Mark*>(memory_->of(local))[channel * kSlots + slot];
}

Channels::Mark& Channels::DoneMark(int local, int channel, int slot,
                                   int reader) const {
  return reinterpret_cast<Mark*>(memory_->of(
      local))[kChannels * kSlots + (channel * kSlots + slot) * size_ + reader];
}

std::byte* Channels::Bytes(int local, int channel, int slot) const {
  return memory_->of(local) + kChannels * kSlots * (1 + size_) * sizeof(Mark) +
         (channel * kSlots + slot) * kSlotBytes;
}

bool Channels::IsRead(const Own& own, int channel, int slot, int reader) const {
  return DoneMark(me_, channel, slot, reader)
                 .stamp.load(std::memory_order_acquire) == own.stamps[slot] ||
         forgotten_[reader].load(std::memory_order_acquire);
}

void Channels::Forget(int rank) {
  if (local_[rank] >= 0) {
    forgotten_[local_[rank]].store(true, std::memory_order_release);
  }
}

std::optional<Channels::Claim> Channels::Acquire(
    const std::vector<int>& readers, std::uint64_t chunks) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int channel = 0; channel < kChannels; ++channel) {
    Own& own = own_[channel];
    bool free = !own.claimed;
    for (int slot = 0; free && slot < kSlots; ++slot) {
      if (own.stamps[slot] == 0) continue;
      for (int reader : own.readers) {
        free = free && IsRead(own, channel, slot, reader);
      }
    }
    if (!free) continue;
    own.claimed = true;
    own.stamps.fill(0);
    own.readers.clear();
    for (int rank : readers) own.readers.push_back(local_[rank]);
    const Claim claim{channel, next_};
    next_ += chunks;
    return claim;
  }
  return std::nullopt;
}

void Channels::Release(const Claim& claim) {
  std::lock_guard<std::mutex> lock(mutex_);
  own_[claim.channel].claimed = false;
}

// The state of a claimed channel belongs to one operation: no lock is taken
// below.

std::byte* Channels::Place(const Claim& claim, std::uint64_t chunk) const {
  const Own& own = own_[claim.channel];
  const int slot = static_cast<int>(chunk % kSlots);
  if (own.stamps[slot] != 0) {
    for (int reader : own.readers) {
      if (!IsRead(own, claim.channel, slot, reader)) return nullptr;
    }
  }
  return Bytes(me_, claim.channel, slot);
}

void Channels::Publish(const Claim& claim, std::uint64_t chunk) {
  const int slot = static_cast<int>(chunk % kSlots);
  own_[claim.channel].stamps[slot] = claim.stamp + chunk;
  Ready(me_, claim.channel, slot)
      .stamp.store(claim.stamp + chunk, std::memory_order_release);
}

std::vector<int> Channels::Behind(const Claim& claim,
                                  std::uint64_t chunk) const {
  const Own& own = own_[claim.channel];
  const int slot = static_cast<int>(chunk % kSlots);
  std::vector<int> behind;
  for (std::size_t rank = 0; rank < local_.size(); ++rank) {
    const bool reads =
        std::count(own.readers.begin(), own.readers.end(), local_[rank]) > 0;
    if (reads && own.stamps[slot] != 0 &&
        !IsRead(own, claim.channel, slot, local_[rank])) {
      behind.push_back(static_cast<int>(rank));
    }
  }
  return behind;
}

const std::byte* Channels::Find(int sender, const Claim& claim,
                                std::uint64_t chunk) const {
  const int local = local_[sender];
  const int slot = static_cast<int>(chunk % kSlots);
  const std::uint64_t stamp =
      Ready(local, claim.channel, slot).stamp.load(std::memory_order_acquire);
  return stamp == claim.stamp + chunk ? Bytes(local, claim.channel, slot)
                                      : nullptr;
}

void Channels::Done(int sender, const Claim& claim, std::uint64_t chunk) {
  DoneMark(local_[sender], claim.channel, static_cast<int>(chunk % kSlots), me_)
      .stamp.store(claim.stamp + chunk, std::memory_order_release);
}

}  // namespace jfog::mpi
