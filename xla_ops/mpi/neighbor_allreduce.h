// Handlers of the neighbor collectives.
#ifndef JFOG_XLA_OPS_MPI_NEIGHBOR_ALLREDUCE_H_
#define JFOG_XLA_OPS_MPI_NEIGHBOR_ALLREDUCE_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(MakeNeighborAllreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NeighborAllreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(PeerAllreduce);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_NEIGHBOR_ALLREDUCE_H_
