// Averages inside and between machines: plan and handler.
#include "mpi/hierarchical.h"

#include <memory>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "mpi/guarded_handler.h"
#include "mpi/hierarchical_exchange.h"
#include "mpi/launch.h"
#include "mpi/plan.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;

constexpr const char* kHierarchical = "hierarchical_neighbor_allreduce";

struct HierarchicalPlan : Plan {
  std::vector<int> members;  // the ranks of this machine

  ffi::Error Read(const ffi::Dictionary& attributes) {
    JFOG_RETURN_IF_ERROR(ReadCommon(attributes, kHierarchical));
    const auto ranks = attributes.get<Ints>("members");
    if (!ranks) return ranks.error();
    members.assign(ranks->begin(), ranks->end());
    return ffi::Error::Success();
  }
};

Completion HierarchicalImpl(State* state, ffi::Token,
                            ffi::BufferR0<ffi::S32> step,
                            ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                            ffi::RemainingRets results, ffi::Dictionary) {
  HierarchicalPlan& plan = As<HierarchicalPlan>(state);
  JFOG_RETURN_IF_ERROR(plan.Check(kHierarchical));
  const std::int64_t at = *step.typed_data();
  JFOG_ASSIGN_OR_RETURN(round, plan.At(at));
  plan.Agree();
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, plan.mode));
  JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, kHierarchical));
  if (plan.mode == kStart) leaves.Stage();
  return Launch(std::make_shared<HierarchicalExchange>(
                    plan.comm, kHierarchical, std::move(leaves),
                    Mix(plan.graph, at), plan.members, *round),
                results, plan.mode);
}

}  // namespace

JFOG_DEFINE_HANDLER(MakeHierarchicalNeighborAllreduce,
                    "hierarchical_neighbor_allreduce",
                    MakePlan<HierarchicalPlan>,
                    ffi::Ffi::BindInstantiate().Attrs());

JFOG_DEFINE_HANDLER(
    HierarchicalNeighborAllreduce, "hierarchical_neighbor_allreduce",
    HierarchicalImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::State<State>>()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attrs());                       // see HierarchicalPlan

}  // namespace jfog::mpi
