// Duplicates of MPI communicators, kept from one world to the next.
#ifndef JFOG_XLA_OPS_MPI_DUPLICATES_H_
#define JFOG_XLA_OPS_MPI_DUPLICATES_H_

#include <mpi.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "mpi/buffer_pool.h"

namespace jfog::mpi {

// Duplicates of a communicator, with counts of the messages on them: for
// messages of operations, for control messages, and for collectives of MPI,
// those of operations and those of agreements, which ranks may start in another
// order.
//
// Messages and collectives have communicators of their own. Where a rank fails,
// Open MPI 5.0 drops messages of collectives, also those of a rank that lives,
// and then waits for the place of the dropped one in the sequence of that
// rank's messages: no later message from there would arrive on that
// communicator.
//
// MPI has few of them (Open MPI 65532), and freeing one is collective, while a
// shutdown is not. So they are kept, and the next world or part of the same
// ranks uses them again, if by the counts no message is left on them.
class Duplicates {
 public:
  // Collective over `parent`. Makes new ones if those that are kept have
  // messages on the way.
  static std::unique_ptr<Duplicates> Acquire(MPI_Comm parent);
  // Keeps them for later, once no operation of this rank uses them; after a
  // failure, when they may be in use, leaks them deliberately.
  static void Release(std::unique_ptr<Duplicates> duplicates, bool has_failed);

  MPI_Comm comm() const { return comm_; }
  MPI_Comm control_comm() const { return control_comm_; }
  MPI_Comm collective_comm() const { return collective_comm_; }
  MPI_Comm agreement_comm() const { return agreement_comm_; }
  std::array<MPI_Comm, 4> all() const {
    return {comm_, control_comm_, collective_comm_, agreement_comm_};
  }

  // Of a message of an operation: when it is sent, and when it has been received.
  void CountSent(int rank) { Add(&sent_[rank]); }
  void CountReceived(int rank) { Add(&received_[rank]); }

  // Sends a control message; never waits.
  void SendControl(int rank, int tag, const void* bytes, std::size_t count);
  void CountControlReceived(int rank) { Add(&control_received_[rank]); }

 private:
  using Counts = std::vector<std::atomic<std::uint64_t>>;
  struct Sent {
    Buffer bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  explicit Duplicates(MPI_Comm parent);
  static void Add(std::atomic<std::uint64_t>* count) {
    count->fetch_add(1, std::memory_order_relaxed);
  }
  // Collective over `parent`: whether no message is left on them.
  bool IsQuiet(MPI_Comm parent);
  void Reset();

  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Comm control_comm_ = MPI_COMM_NULL;
  MPI_Comm collective_comm_ = MPI_COMM_NULL;
  MPI_Comm agreement_comm_ = MPI_COMM_NULL;
  Counts sent_, received_, control_sent_, control_received_;  // by rank
  std::mutex mutex_;            // guards all below
  std::list<Sent> in_transit_;  // control messages
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_DUPLICATES_H_
