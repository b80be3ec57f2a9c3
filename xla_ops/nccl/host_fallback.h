// Handlers of the host, run on operands of the device.
#ifndef JFOG_XLA_OPS_NCCL_HOST_FALLBACK_H_
#define JFOG_XLA_OPS_NCCL_HOST_FALLBACK_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

// A handler for XLA's GPU that copies operands to the host, runs a handler of
// its CPU there, and copies the results back. The same handler gives the same
// one again; null if there are too many.
XLA_FFI_Handler* Staged(XLA_FFI_Handler* host);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_HOST_FALLBACK_H_
