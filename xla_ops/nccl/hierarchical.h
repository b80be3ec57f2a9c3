// Averages within machines and between them, one after the other.
#ifndef JFOG_XLA_OPS_NCCL_HIERARCHICAL_H_
#define JFOG_XLA_OPS_NCCL_HIERARCHICAL_H_

#include "xla/ffi/api/ffi.h"

namespace jfog::nccl {

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclHierarchicalStart);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_HIERARCHICAL_H_
