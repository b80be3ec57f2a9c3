// Agreement between ranks on what they are about to do.
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

// Compares, beside the operations and without making any wait, that all ranks
// come to use this graph as their next new one. Ranks whose graphs differ may
// well exchange what they expect of each other and get wrong numbers, if one
// only sends where the other does not receive; this spoils their communicator.
void AgreeOnGraph(const std::shared_ptr<Communicator>& comm,
                  std::uint64_t graph);

// Whom an operation names as its peers, and whether they name this rank, too.
class PeerCheck {
 public:
  PeerCheck() = default;
  explicit PeerCheck(Pattern pattern);

  // Asks all peers, once.
  void Ask(Communicator& comm, const Header& header);
  // Reads answers; how a peer's word differs from this rank's, if it does.
  std::optional<std::string> ReadAnswers(Communicator& comm,
                                         const Header& header);
  // Peers that have been asked and have not answered.
  const std::vector<int>& open() const { return open_; }

 private:
  Pattern pattern_;
  bool asked_ = false;
  std::vector<int> open_;
};

// Notes the peers of an operation that is about to start. With `check`, and
// where they are new here, waits until all of them have said that they name
// this rank in the same places. They answer when they come to the operation.
ffi::Error AgreeOnPeers(const std::shared_ptr<Communicator>& comm,
                        const Operation& operation, Pattern pattern,
                        bool check);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_CONSISTENCY_CHECK_H_
