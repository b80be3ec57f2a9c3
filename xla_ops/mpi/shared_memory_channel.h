// Memory that the ranks of one machine share, for long exchanges.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_

#include <mpi.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mpi/shared_memory.h"

namespace jfog::mpi {

// Every rank writes into lanes of its own, and all ranks of its machine read
// them in place: a byte is copied once, for however many receivers. A lane is a
// few slots for chunks. It belongs to one operation at a time, and only when
// all that was written before has been read, so no operation ever waits for the
// readers of another one; who finds no free lane sends messages instead.
class Lanes {
 public:
  // A lane in the hands of an operation. Its chunks are numbered from 0.
  struct Claim {
    int lane = 0;
    std::uint64_t stamp = 0;  // of its first chunk; never used twice
  };

  // Collective over `comm`. With `local_size` that many consecutive ranks pass
  // for a machine. Null where there is no shared memory.
  static std::shared_ptr<Lanes> Make(MPI_Comm comm, int local_size);
  ~Lanes() = default;
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  // Whether a rank of `comm` is on this machine.
  bool Reaches(int rank) const { return local_[rank] >= 0; }

  // For the sender: a free lane, if there is one, for chunks to these ranks.
  std::optional<Claim> Acquire(const std::vector<int>& readers,
                               std::uint64_t chunks);
  // All chunks have been published.
  void Release(const Claim& claim);
  // Where to write a chunk; null while some reader is not done with its slot.
  std::byte* Place(const Claim& claim, std::uint64_t chunk) const;
  void Publish(const Claim& claim, std::uint64_t chunk);
  // The ranks for which `Place` returns null.
  std::vector<int> Behind(const Claim& claim, std::uint64_t chunk) const;

  // For a receiver: a chunk of the sender's, or null while it has not come.
  const std::byte* Find(int sender, const Claim& claim,
                        std::uint64_t chunk) const;
  void Done(int sender, const Claim& claim, std::uint64_t chunk);

  static constexpr int kLanes = 2;
  static constexpr int kSlots = 8;
  static constexpr std::size_t kSlotBytes = 60 * 1024;

 private:
  struct Mark;
  struct Own {
    bool claimed = false;
    std::vector<int> readers;  // of what is in its slots
    std::array<std::uint64_t, kSlots> stamps{};
  };

  Lanes() = default;
  // The parts of a rank's memory, by its number on the machine.
  Mark& Ready(int local, int lane, int slot) const;
  Mark& DoneMark(int local, int lane, int slot, int reader) const;
  std::byte* Bytes(int local, int lane, int slot) const;
  bool IsRead(const Own& own, int lane, int slot, int reader) const;

  std::vector<int> local_;  // of each rank its number on the machine, or -1
  int size_ = 0;            // ranks on the machine
  int me_ = 0;
  // Lives as long as the process.
  std::unique_ptr<SharedMemory> memory_;
  mutable std::mutex mutex_;  // guards all below
  std::array<Own, kLanes> own_;
  std::uint64_t next_ = 1;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_
