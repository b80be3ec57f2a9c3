// Instantiate handlers: XLA calls them once for each call site of a program.
#include "nccl/instantiate.h"

#include "nccl/plan.h"

namespace jfog::nccl {

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeExchange, MakePlan<ExchangePlan>,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeCollective, MakePlan<CollectivePlan>,
                              ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclMakeHierarchical, MakePlan<HierarchicalPlan>,
                              ffi::Ffi::BindInstantiate().Attrs());

}  // namespace jfog::nccl
