// Handler of the exact average in finitely many rounds.
#ifndef JFOG_XLA_OPS_MPI_FINITE_TIME_H_
#define JFOG_XLA_OPS_MPI_FINITE_TIME_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(MakeFiniteTimeAverage);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FiniteTimeAverage);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_FINITE_TIME_H_
