// Shared-memory channels: payloads between the ranks of one machine.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_

#include <mpi.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mpi/shared_memory.h"

namespace jfog::mpi {

// The channels of all ranks of a machine. Each rank owns a few: it writes
// chunks into the slots of a channel, a ring, and other ranks read them in
// place, so a byte is copied once for any number of receivers.
//
// Every slot has a mark of its writer, the stamp of the chunk in it, and one
// mark per reader, the stamp of the last chunk it is done with. A mark is
// written by one rank only, and the slot is reused when all readers' marks
// equal the writer's.
//
// A channel is claimed by one operation at a time, and only when all chunks of
// the operation before have been read, so no operation waits for the readers of
// another one. Without a free channel the operation sends messages.
class Channels {
 public:
  // A channel claimed by an operation, which numbers its chunks from 0.
  struct Claim {
    int channel = 0;
    std::uint64_t stamp = 0;  // of chunk 0, unique per writer; 0: no channel
  };

  // Collective over `comm`. Ranks of unequal `machine` count as ranks of
  // several machines, even if they share memory. Null without shared memory.
  static std::shared_ptr<Channels> Make(MPI_Comm comm, int machine);
  ~Channels() = default;
  Channels(const Channels&) = delete;
  Channels& operator=(const Channels&) = delete;

  // Whether a rank of `comm` is on this machine.
  bool Reaches(int rank) const { return local_[rank] >= 0; }

  // For the writer: claims a free channel, if any, for chunks to these ranks.
  std::optional<Claim> Acquire(const std::vector<int>& readers,
                               std::uint64_t chunks);
  // Ends a claim, when all its chunks have been published.
  void Release(const Claim& claim);
  // The slot for a chunk; null until all readers are done with the chunk in it.
  std::byte* Place(const Claim& claim, std::uint64_t chunk) const;
  void Publish(const Claim& claim, std::uint64_t chunk);
  // Waits for this rank no longer, which has failed.
  void Forget(int rank);
  // The ranks that keep `Place` from returning a slot.
  std::vector<int> Behind(const Claim& claim, std::uint64_t chunk) const;

  // For a reader: a chunk of the sender's; null until it is published.
  const std::byte* Find(int sender, const Claim& claim,
                        std::uint64_t chunk) const;
  void Done(int sender, const Claim& claim, std::uint64_t chunk);

  static constexpr int kChannels = 2;
  static constexpr int kSlots = 8;
  static constexpr std::size_t kSlotBytes = 60 * 1024;

 private:
  struct Mark;
  struct Own {
    bool claimed = false;
    std::vector<int> readers;                    // of the chunks in its slots
    std::array<std::uint64_t, kSlots> stamps{};  // 0: empty
  };

  Channels() = default;
  // The parts of a rank's memory, by its rank on the machine.
  Mark& Ready(int local, int channel, int slot) const;
  Mark& DoneMark(int local, int channel, int slot, int reader) const;
  std::byte* Bytes(int local, int channel, int slot) const;
  bool IsRead(const Own& own, int channel, int slot, int reader) const;

  std::vector<int> local_;  // of each rank its rank on the machine, or -1
  int size_ = 0;            // ranks on the machine
  int me_ = 0;
  std::vector<std::atomic<bool>> forgotten_;  // by rank on the machine
  // Leaked deliberately: freeing it would be collective.
  std::unique_ptr<SharedMemory> memory_;
  mutable std::mutex mutex_;  // guards all below
  std::array<Own, kChannels> own_;
  std::uint64_t next_ = 1;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_CHANNEL_H_
