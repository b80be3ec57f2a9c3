// Mailboxes: short messages between the ranks of one machine.
#include "mpi/mailboxes.h"

#include "mpi/collective_start.h"

namespace jfog::mpi {

// Zeros are a valid state of all of it, so fresh memory needs no construction,
// and a ring takes no memory until its pair of ranks sends.
struct alignas(4096) Mailboxes::Ring {
  Mark done[kSlots];
  Message messages[kSlots];
};
static_assert(Mailboxes::kPayload % kCacheLine == 0);

std::unique_ptr<Mailboxes> Mailboxes::Make(MPI_Comm comm,
                                           const std::vector<int>& ranks) {
  const int size = SizeOfComm(comm);
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  std::unique_ptr<Mailboxes> boxes(new Mailboxes(size));
  boxes->local_ = PlacesIn(ranks, size);
  boxes->me_ = boxes->local_[rank];
  boxes->memory_ = SharedMemory::Make(comm, ranks, ranks.size() * sizeof(Ring));
  return boxes->memory_ == nullptr ? nullptr : std::move(boxes);
}

// The rings of one writer lie in its own memory, in the order of the readers.
Mailboxes::Ring& Mailboxes::RingOf(int writer, int reader) const {
  return reinterpret_cast<Ring*>(memory_->of(writer))[reader];
}

Mailboxes::Message* Mailboxes::Place(int rank, std::uint64_t number) const {
  Ring& ring = RingOf(me_, local_[rank]);
  const std::size_t slot = number % kSlots;
  Message& message = ring.messages[slot];
  // The message before it may be unwritten.
  const std::uint64_t before = StampBefore(number);
  const bool is_free =
      message.stamp.load(std::memory_order_relaxed) == before &&
      ring.done[slot].number.load(std::memory_order_acquire) == before;
  return is_free ? &message : nullptr;
}

const Mailboxes::Message* Mailboxes::Find(int rank,
                                          std::uint64_t number) const {
  const Message& message = RingOf(local_[rank], me_).messages[number % kSlots];
  return message.stamp.load(std::memory_order_acquire) == number + 1 ? &message
                                                                     : nullptr;
}

void Mailboxes::Done(int rank, std::uint64_t number) const {
  RingOf(local_[rank], me_)
      .done[number % kSlots]
      .number.store(number + 1, std::memory_order_release);
}

std::optional<OperationHeader> Mailboxes::Peek(int rank) const {
  const std::uint64_t number = received_[rank].load(std::memory_order_relaxed);
  const Message* message = Find(rank, number);
  if (message == nullptr) return std::nullopt;
  const OperationHeader header = message->header;
  // Another thread may have consumed it meanwhile, and the writer reused it.
  std::atomic_thread_fence(std::memory_order_acquire);
  if (Find(rank, number) == nullptr) return std::nullopt;
  return header;
}

}  // namespace jfog::mpi
