// Consistency checks between ranks before and beside an operation.
#ifndef JFOG_XLA_OPS_MPI_CONSISTENCY_CHECK_H_
#define JFOG_XLA_OPS_MPI_CONSISTENCY_CHECK_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mpi/communicator.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// Compares the next new graph of all ranks, beside the operations and without
// delaying them. Ranks whose graphs differ may exchange messages that match and
// still compute wrong numbers; the check fails their communicator.
void AgreeOnGraph(const std::shared_ptr<Communicator>& comm,
                  std::uint64_t graph);

// Checks that the peers of an operation name this rank as their peer, too.
class PeerCheck {
 public:
  PeerCheck() = default;
  explicit PeerCheck(Pattern pattern);

  // Queries all peers, once.
  void Ask(Communicator& comm, const Header& header);
  // Reads answers; returns the text of a mismatch, if there is one.
  std::optional<std::string> ReadAnswers(Communicator& comm,
                                         const Header& header);
  // Peers with an open query.
  const std::vector<int>& open() const { return open_; }

 private:
  Pattern pattern_;
  bool asked_ = false;
  std::vector<int> open_;
};

// Records the peers of an operation that is about to start. With `check`, and
// if the peers are new, waits until all of them confirm the same edges; a peer
// answers when it comes to the operation.
ffi::Error AgreeOnPeers(const std::shared_ptr<Communicator>& comm,
                        const Operation& operation, Pattern pattern,
                        bool check);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_CONSISTENCY_CHECK_H_
