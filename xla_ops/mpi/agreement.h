// Agreement between ranks on what they are about to do.
#ifndef JFOG_XLA_OPS_MPI_AGREEMENT_H_
#define JFOG_XLA_OPS_MPI_AGREEMENT_H_

#include <cstdint>
#include <memory>

#include "mpi/communicator.h"

namespace jfog::mpi {

// Compares, beside the operations and without making any wait, that all ranks
// come to use this graph as their next new one. Ranks whose graphs differ may
// well exchange what they expect of each other and get wrong numbers, if one
// only sends where the other does not receive; this spoils their communicator.
void AgreeOnGraph(const std::shared_ptr<Communicator>& comm,
                  std::uint64_t graph);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_AGREEMENT_H_
