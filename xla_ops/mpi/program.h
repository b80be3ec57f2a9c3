// The start of a program that communicates, see program_effect in _compat.py.
#ifndef JFOG_XLA_OPS_MPI_PROGRAM_H_
#define JFOG_XLA_OPS_MPI_PROGRAM_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

// Lets the next program choose the device.
void ResetProgramDevice();

// token -> token, pred, f32[,]. Refuses a program on a second device: XLA
// orders programs on one device only. The pred is false, which XLA cannot know
// when it compiles; the matrix is not written.
XLA_FFI_DECLARE_HANDLER_SYMBOL(ProgramBegin);
// token, f32[,] -> token. Uses the matrix, so that XLA keeps what computes it.
XLA_FFI_DECLARE_HANDLER_SYMBOL(ProgramReady);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PROGRAM_H_
