// Instantiate handlers: XLA calls them once for each call site of a program.
#ifndef JFOG_XLA_OPS_NCCL_INSTANTIATE_H_
#define JFOG_XLA_OPS_NCCL_INSTANTIATE_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeExchange);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeCollective);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeHierarchical);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_INSTANTIATE_H_
