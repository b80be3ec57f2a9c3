// FFI handlers of the collectives over all ranks.
#ifndef JFOG_XLA_OPS_MPI_COLLECTIVES_H_
#define JFOG_XLA_OPS_MPI_COLLECTIVES_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(Allreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Broadcast);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Allgather);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Barrier);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COLLECTIVES_H_
