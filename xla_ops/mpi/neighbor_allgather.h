// Handlers of the neighbor gathers.
#ifndef JFOG_XLA_OPS_MPI_NEIGHBOR_ALLGATHER_H_
#define JFOG_XLA_OPS_MPI_NEIGHBOR_ALLGATHER_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(MakeNeighborAllgather);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NeighborAllgather);
XLA_FFI_DECLARE_HANDLER_SYMBOL(MakeNeighborAllgatherTranspose);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NeighborAllgatherTranspose);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_NEIGHBOR_ALLGATHER_H_
