// Instantiate handlers: XLA calls them once for each call site of a program.
#include "nccl/instantiate.h"

#include "nccl/plan.h"

namespace jfog::nccl {

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeExchange, MakeExchangePlan,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeCollective, MakeCollectivePlan,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeHierarchical, MakeHierarchicalPlan,
                              ffi::Ffi::BindInstantiate().Attrs());

}  // namespace jfog::nccl
