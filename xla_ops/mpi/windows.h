// Handlers of windows.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_H_

#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jfog::mpi {

XLA_FFI_DECLARE_HANDLER_SYMBOL(WinCreate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinPut);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinAccumulate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinGet);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinUpdate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinVersion);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinAssociatedP);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WinFree);

// The mutexes of these ranks, ascending, in the window of this number. Throw
// what JAX would raise.
void LockWindow(std::uint32_t number, const std::vector<int>& ranks);
void UnlockWindow(std::uint32_t number, const std::vector<int>& ranks);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_H_
