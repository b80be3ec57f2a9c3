// Handles of the split operations in flight.
#ifndef JFOG_XLA_OPS_MPI_HANDLES_H_
#define JFOG_XLA_OPS_MPI_HANDLES_H_

#include "common/handle_table.h"
#include "mpi/operation.h"

namespace jfog::mpi {

HandleTable<Operation>& Handles();

// Closes the handles of a communicator; returns how many were open.
int ForgetHandles(const Communicator& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_HANDLES_H_
