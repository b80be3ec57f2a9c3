// Handlers of the collectives over all ranks.
#ifndef JFOG_XLA_OPS_MPI_COLLECTIVES_H_
#define JFOG_XLA_OPS_MPI_COLLECTIVES_H_

#include <cstdint>
#include <memory>

#include "common/status.h"
#include "mpi/communicator.h"
#include "mpi/payload.h"
#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

// Waits until all ranks have come to this, with leaves and a variant like
// these. A step of a collective operation that goes on without XLA.
ffi::Error CheckedBarrier(const std::shared_ptr<Communicator>& comm,
                          const char* name, Payload leaves,
                          std::uint64_t variant);

XLA_FFI_DECLARE_HANDLER_SYMBOL(Allreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Broadcast);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Allgather);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Barrier);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COLLECTIVES_H_
