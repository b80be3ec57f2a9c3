// Averages inside and between machines: plan and handler.
#include "mpi/hierarchical.h"

#include <memory>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "mpi/hierarchical_exchange.h"
#include "mpi/launch.h"
#include "mpi/plan.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;

constexpr const char* kName = "hierarchical_neighbor_allreduce";

struct HierarchicalPlan : Plan {
  std::vector<int> members;  // the ranks of this machine
};

ffi::ErrorOr<std::shared_ptr<Plan>> MakePlan(
    const ffi::Dictionary& attributes) {
  auto plan = std::make_shared<HierarchicalPlan>();
  JFOG_RETURN_IF_ERROR(ReadPlan(attributes, kName, plan.get()));
  const auto members = attributes.get<Ints>("members");
  if (!members) return ffi::Unexpected(members.error());
  plan->members.assign(members->begin(), members->end());
  return std::shared_ptr<Plan>(std::move(plan));
}

Completion HierarchicalImpl(ffi::Token, ffi::BufferR0<ffi::S32> step,
                            ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                            ffi::RemainingRets results,
                            ffi::Dictionary attributes) {
  JFOG_ASSIGN_OR_RETURN(
      found, FindPlan(attributes, [&] { return MakePlan(attributes); }));
  const auto& plan = static_cast<const HierarchicalPlan&>(*found);
  JFOG_RETURN_IF_ERROR(CheckReady(plan.comm.get(), kName));
  const std::int64_t at = *step.typed_data();
  JFOG_ASSIGN_OR_RETURN(round, plan.At(at));
  found->Agree();
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, plan.mode));
  JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, kName));
  if (plan.mode == kStart) leaves.Stage();
  return Launch(std::make_shared<HierarchicalExchange>(
                    plan.comm, kName, std::move(leaves), Mix(plan.graph, at),
                    plan.members, *round),
                results, plan.mode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    HierarchicalNeighborAllreduce, HierarchicalImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attrs());                       // see MakePlan

}  // namespace jfog::mpi
