// Memory that the ranks of one machine share, for long exchanges.
#include "mpi/lanes.h"

#include <sys/statvfs.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace jfog::mpi {
namespace {

constexpr std::size_t kLine = 64;
// MPI puts shared memory here; a page of it that cannot be had kills a process.
constexpr const char* kFileSystem = "/dev/shm";
constexpr std::size_t kSpare = 4;  // times of what the lanes need

bool HasRoom(std::size_t bytes) {
  struct statvfs system;
  if (statvfs(kFileSystem, &system) != 0) return true;  // it is elsewhere
  return system.f_bavail * system.f_frsize / kSpare >= bytes;
}

bool IsWanted() {
  const char* text = std::getenv("JFOG_SHARED_MEMORY");
  return text == nullptr || std::strcmp(text, "0") != 0;
}

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
  int usable = IsWanted() && lanes->size_ > 1 && HasRoom(lanes->size_ * bytes);
  MPI_Allreduce(MPI_IN_PLACE, &usable, 1, MPI_INT, MPI_MIN, machine);
  void* own = nullptr;
  MPI_Win window = MPI_WIN_NULL;
  if (usable) {
    usable =
        MPI_Win_allocate_shared(static_cast<MPI_Aint>(bytes), 1, MPI_INFO_NULL,
                                machine, &own, &window) == MPI_SUCCESS;
    MPI_Allreduce(MPI_IN_PLACE, &usable, 1, MPI_INT, MPI_MIN, machine);
  }
  if (usable) {
    // The window lives as long as the process, like the memory.
    for (int local = 0; local < lanes->size_; ++local) {
      MPI_Aint length = 0;
      int unit = 0;
      void* base = nullptr;
      MPI_Win_shared_query(window, local, &length, &unit, &base);
      lanes->memory_.push_back(static_cast<std::byte*>(base));
    }
    for (std::size_t i = 0; i < marks; ++i) {
      new (static_cast<std::byte*>(own) + i * sizeof(Mark)) Mark;
    }
    int size = 0;
    MPI_Comm_size(comm, &size);
    std::vector<int> ranks(size);
    for (int rank = 0; rank < size; ++rank) ranks[rank] = rank;
    lanes->local_.resize(size);
    MPI_Group all, here;
    MPI_Comm_group(comm, &all);
    MPI_Comm_group(machine, &here);
    MPI_Group_translate_ranks(all, size, ranks.data(), here,
                              lanes->local_.data());
    MPI_Group_free(&all);
    MPI_Group_free(&here);
    for (int& local : lanes->local_) {
      if (local == MPI_UNDEFINED) local = -1;
    }
  }
  MPI_Barrier(machine);  // all marks are made
  MPI_Comm_free(&machine);
  return usable ? lanes : nullptr;
}

Lanes::Mark& Lanes::Ready(int local, int lane, int slot) const {
  return reinterpret_cast<Mark*>(memory_[local])[lane * kSlots + slot];
}

Lanes::Mark& Lanes::DoneMark(int local, int lane, int slot, int reader) const {
  return reinterpret_cast<Mark*>(
      memory_[local])[kLanes * kSlots + (lane * kSlots + slot) * size_ +
                      reader];
}

std::byte* Lanes::Bytes(int local, int lane, int slot) const {
  return memory_[local] + kLanes * kSlots * (1 + size_) * sizeof(Mark) +
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
