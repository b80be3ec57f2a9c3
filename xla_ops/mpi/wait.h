// Completion of split operations: the handlers wait and poll.
#ifndef JFOG_XLA_OPS_MPI_WAIT_H_
#define JFOG_XLA_OPS_MPI_WAIT_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(Wait);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Poll);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WAIT_H_
