// Handlers of the collectives over all ranks.
#ifndef JFOG_XLA_OPS_NCCL_COLLECTIVES_H_
#define JFOG_XLA_OPS_NCCL_COLLECTIVES_H_

#include "common/dtype.h"
#include "nccl/api.h"
#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

// False for a type that NCCL does not reduce.
bool FindElementType(DataType type, ElementType* found);

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclAllreduce);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclBroadcast);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclAllgather);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclBarrier);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_COLLECTIVES_H_
