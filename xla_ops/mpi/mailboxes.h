// Mailboxes: short messages between the ranks of one machine.
#ifndef JFOG_XLA_OPS_MPI_MAILBOXES_H_
#define JFOG_XLA_OPS_MPI_MAILBOXES_H_

#include <mpi.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/cache_line.h"
#include "common/operation_header.h"
#include "mpi/shared_memory.h"

namespace jfog::mpi {

// A ring of messages in shared memory for every ordered pair of ranks of a
// machine and communicator. Both ends number the messages of a pair in program
// order; a message lies in the slot of its number, modulo their count.
//
// Each slot has a stamp of its writer, the number of the message in it plus
// one, and a mark of its reader, the same once the message is consumed. The
// writer reuses a slot when both are equal, so it is at most `kSlots` messages
// ahead of the reader, who may consume them in any order.
class Mailboxes {
 public:
  static constexpr std::size_t kPayload = 4096;  // longest, bytes
  static constexpr int kSlots = 4;

  struct Message {
    std::atomic<std::uint64_t> stamp{0};  // the writer's; 0: none yet
    OperationHeader header;  // on the stamp's cache line, but for the name
    alignas(kCacheLine) std::byte payload[kPayload];
  };

  // Collective over `comm`, of which `ranks` share memory with this one, itself
  // among them. Null where they do not.
  static std::unique_ptr<Mailboxes> Make(MPI_Comm comm,
                                         const std::vector<int>& ranks);

  // Whether a rank of `comm` is on this machine.
  bool Reaches(int rank) const { return local_[rank] >= 0; }

  // For the writer: the number of the next message to a rank.
  std::uint64_t NextSent(int rank) { return Next(sent_[rank]); }
  // The slot of a message; null until the reader is done with the one in it.
  Message* Place(int rank, std::uint64_t number) const;
  void Publish(Message& message, std::uint64_t number) const {
    message.stamp.store(number + 1, std::memory_order_release);
  }

  // For the reader: the number of the next message from a rank.
  std::uint64_t NextReceived(int rank) { return Next(received_[rank]); }
  // A message; null until it is published.
  const Message* Find(int rank, std::uint64_t number) const;
  void Done(int rank, std::uint64_t number) const;
  // The header of a message from a rank that no operation here has come to.
  std::optional<OperationHeader> Peek(int rank) const;

 private:
  using Counter = std::atomic<std::uint64_t>;
  // On a cache line of its own, against false sharing between ranks.
  struct alignas(kCacheLine) Mark {
    std::atomic<std::uint64_t> number{0};
  };
  struct Ring;

  explicit Mailboxes(int size) : sent_(size), received_(size) {}
  static std::uint64_t Next(Counter& counter) {
    return counter.fetch_add(1, std::memory_order_relaxed);
  }
  Ring& RingOf(int writer, int reader) const;
  // The stamp of the message before this one in its slot.
  static std::uint64_t StampBefore(std::uint64_t number) {
    return number < kSlots ? 0 : number - kSlots + 1;
  }

  std::vector<int> local_;  // of each rank its rank on the machine, or -1
  int me_ = 0;              // on the machine
  std::unique_ptr<SharedMemory> memory_;
  std::vector<Counter> sent_, received_;  // messages, by rank
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_MAILBOXES_H_
