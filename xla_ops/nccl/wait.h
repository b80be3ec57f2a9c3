// Completion of split operations: the handlers wait and poll.
#ifndef JFOG_XLA_OPS_NCCL_WAIT_H_
#define JFOG_XLA_OPS_NCCL_WAIT_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclWait);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclPoll);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_WAIT_H_
