// FFI handler of the average inside and between machines.
#ifndef JFOG_XLA_OPS_MPI_HIERARCHICAL_H_
#define JFOG_XLA_OPS_MPI_HIERARCHICAL_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(MakeHierarchicalNeighborAllreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(HierarchicalNeighborAllreduce);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_HIERARCHICAL_H_
