// Handlers of the collectives over all ranks.
#include "nccl/collectives.h"

#include <string>
#include <utility>
#include <vector>

#include "nccl/call_context.h"

namespace jfog::nccl {
namespace {

ffi::Error MalformedCollective(const Plan& plan) {
  return MakeError(ffi::ErrorCode::kInternal,
                   "malformed call of " + plan.operation);
}

// Send and receive buffers of this rank for one leaf.
struct Share {
  std::size_t sent;
  std::size_t received;
};

// A collective with leaves of the same lengths on all ranks, whose results are
// `times` as long. `check` looks at the leaves first, `post` posts one that is
// not empty, and `share` says what counts of it.
template <typename Check, typename Post, typename ShareOf>
ffi::Error Collective(CudaStream stream, const Plan& plan,
                      ffi::RemainingArgs args, ffi::RemainingRets results,
                      std::size_t times, Check check, Post post,
                      ShareOf share) {
  Call call(plan, stream);
  JFOG_RETURN_IF_ERROR(call.Check());
  JFOG_RETURN_IF_ERROR(call.ReadLeaves(
      args, results, [&](const Leaf& leaf) { return times * leaf.bytes; }));
  const std::vector<Leaf>& leaves = call.leaves();
  for (const Leaf& leaf : leaves) {
    if (leaf.output_bytes != times * leaf.bytes)
      return MalformedCollective(plan);
  }
  JFOG_RETURN_IF_ERROR(check(leaves));
  OperationSpec spec = call.MakeOperationSpec();
  spec.is_collective = true;
  JFOG_RETURN_IF_ERROR(
      call.Launch(plan.comm, std::move(spec), [&](Group& group) {
        for (std::size_t i = 0; i < leaves.size(); ++i) {
          if (leaves[i].bytes > 0) post(group, i, leaves[i]);
        }
      }));
  // Under this rank itself: its way through the peers is NCCL's secret.
  Share sum{0, 0};
  for (const Leaf& leaf : leaves) {
    const Share counted = share(leaf);
    sum.sent += counted.sent;
    sum.received += counted.received;
  }
  if (!leaves.empty()) {
    plan.comm->traffic().CountSent(plan.comm->rank(), sum.sent);
    plan.comm->traffic().CountReceived(plan.comm->rank(), sum.received);
  }
  return call.Finish(results);
}

ffi::Error AllreduceImpl(CudaStream stream, State* state, ffi::Token,
                         ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                         ffi::RemainingRets results, ffi::Dictionary) {
  const auto& plan = As<CollectivePlan>(state);
  std::vector<ElementType> types;
  const auto check = [&](const std::vector<Leaf>& leaves) {
    if (plan.reductions.size() != leaves.size())
      return MalformedCollective(plan);
    for (const Leaf& leaf : leaves) {
      types.emplace_back();
      if (!FindElementType(leaf.type, &types.back())) {
        return MakeError(ffi::ErrorCode::kInvalidArgument,
                         plan.operation + " has no reduction of " +
                             NameOf(leaf.type) + " with NCCL");
      }
    }
    return ffi::Error::Success();
  };
  const auto post = [&](Group& group, std::size_t i, const Leaf& leaf) {
    group.AllReduce(leaf.input, leaf.output, leaf.count, types[i],
                    static_cast<ReductionKind>(plan.reductions[i]));
  };
  const auto share = [](const Leaf& leaf) {
    return Share{leaf.bytes, leaf.bytes};
  };
  return Collective(stream, plan, args, results, 1, check, post, share);
}

ffi::Error BroadcastImpl(CudaStream stream, State* state, ffi::Token,
                         ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                         ffi::RemainingRets results, ffi::Dictionary) {
  const auto& plan = As<CollectivePlan>(state);
  const auto check = [&](const std::vector<Leaf>&) {
    const bool is_rank = plan.root >= 0 && plan.root < plan.comm->size();
    return is_rank ? ffi::Error::Success() : MalformedCollective(plan);
  };
  const auto post = [&](Group& group, std::size_t, const Leaf& leaf) {
    group.Broadcast(leaf.input, leaf.output, leaf.bytes,
                    static_cast<int>(plan.root));
  };
  const auto share = [&](const Leaf& leaf) {
    const bool is_root = plan.root == plan.comm->rank();
    return is_root ? Share{leaf.bytes, 0} : Share{0, leaf.bytes};
  };
  return Collective(stream, plan, args, results, 1, check, post, share);
}

ffi::Error AllgatherImpl(CudaStream stream, State* state, ffi::Token,
                         ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                         ffi::RemainingRets results, ffi::Dictionary) {
  const auto& plan = As<CollectivePlan>(state);
  const std::size_t size = plan.comm->size();
  const auto check = [](const std::vector<Leaf>&) {
    return ffi::Error::Success();
  };
  const auto post = [&](Group& group, std::size_t, const Leaf& leaf) {
    group.AllGather(leaf.input, leaf.output, leaf.bytes);
  };
  const auto share = [](const Leaf& leaf) {
    return Share{leaf.bytes, leaf.output_bytes - leaf.bytes};
  };
  return Collective(stream, plan, args, results, size, check, post, share);
}

ffi::Error BarrierImpl(CudaStream stream, State* state, ffi::Token,
                       ffi::RemainingArgs args, ffi::Result<ffi::Token>,
                       ffi::RemainingRets results, ffi::Dictionary) {
  const auto check = [](const std::vector<Leaf>&) {
    return ffi::Error::Success();
  };
  const auto post = [](Group&, std::size_t, const Leaf&) {};
  const auto share = [](const Leaf&) { return Share{0, 0}; };
  return Collective(stream, As<CollectivePlan>(state), args, results, 1, check,
                    post, share);
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Ctx<ffi::State<State>>()
      .Arg<ffi::Token>()  // order in
      .RemainingArgs()    // leaves
      .Ret<ffi::Token>()  // order out
      .RemainingRets()    // as many leaves, or handle
      .Attrs();           // see ReadCollective
}

}  // namespace

bool FindElementType(DataType type, ElementType* found) {
  *found = kNoElementType;
  switch (type) {
#define JFOG_ELEMENT_TYPE(dtype, name, stored, accumulated, weight, mpi, nccl) \
  case DataType::dtype:                                                        \
    *found = nccl;                                                             \
    break;
    JFOG_FOR_EACH_DTYPE(JFOG_ELEMENT_TYPE)
#undef JFOG_ELEMENT_TYPE
    default:
      break;
  }
  return *found != kNoElementType;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclAllreduce, AllreduceImpl, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclBroadcast, BroadcastImpl, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclAllgather, AllgatherImpl, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclBarrier, BarrierImpl, Binding());

}  // namespace jfog::nccl
