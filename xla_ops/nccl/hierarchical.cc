// Averages within machines and between them, one after the other.
#include "nccl/hierarchical.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "nccl/call_context.h"
#include "nccl/collectives.h"
#include "nccl/exchange.h"

namespace jfog::nccl {
namespace {

// A leaf is averaged in as many parts as the machine has ranks. This rank's
// part, and those of the same place from other machines, form its block; the
// blocks of all ranks of the machine are what is received.
struct Block {
  DevicePointer address;
  std::size_t part;   // bytes of one's own part, and of each received one
  std::size_t bytes;  // of the block
};

ffi::Error ReduceParts(const HierarchicalPlan& plan, Call& call,
                       const std::vector<Block>& blocks) {
  const std::vector<Leaf>& leaves = call.leaves();
  if (plan.local == nullptr) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      JFOG_RETURN_IF_ERROR(
          call.Copy(blocks[i].address, leaves[i].input, blocks[i].part));
    }
    return ffi::Error::Success();
  }
  std::vector<ElementType> types(leaves.size());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    if (!FindElementType(leaves[i].type, &types[i])) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       plan.operation + " has no reduction of " +
                           NameOf(leaves[i].type) + " with NCCL");
    }
  }
  OperationSpec spec = call.MakeOperationSpec();
  spec.is_collective = true;
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    plan.local->traffic().CountSent(plan.local->rank(), leaves[i].bytes);
    plan.local->traffic().CountReceived(plan.local->rank(), blocks[i].part);
  }
  return call.Launch(plan.local, std::move(spec), [&](Group& group) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      // NCCL has the type, so its width is not 0.
      const std::size_t count =
          blocks[i].part /
          leaves[i].width();  // NOLINT(clang-analyzer-core.DivideZero)
      if (count == 0) continue;
      group.ReduceScatter(leaves[i].input, blocks[i].address, count, types[i],
                          kAvg);
    }
  });
}

ffi::Error ExchangeParts(const HierarchicalPlan& plan, Call& call,
                         const std::vector<Block>& blocks, const Round& round,
                         std::uint64_t variant) {
  if (plan.machines == nullptr) return ffi::Error::Success();
  std::vector<PeerMessage> outgoing, incoming;
  for (const int rank : round.destinations) {
    outgoing.push_back({rank, {}});
    for (const Block& block : blocks) {
      outgoing.back().pieces.push_back({block.address, block.part});
    }
  }
  for (std::size_t k = 0; k < round.sources.size(); ++k) {
    incoming.push_back({round.sources[k], {}});
    for (const Block& block : blocks) {
      incoming.back().pieces.push_back(
          {block.address + (1 + k) * block.part, block.part});
    }
  }
  OperationSpec spec = call.MakeOperationSpec();
  spec.variant = variant;
  spec.sources = EdgesOf(incoming);
  spec.destinations = EdgesOf(outgoing);
  return call.Launch(plan.machines, std::move(spec), [&](Group& group) {
    PostPeerMessages(outgoing, incoming, group);
  });
}

ffi::Error GatherBlocks(const HierarchicalPlan& plan, Call& call,
                        const std::vector<Block>& blocks) {
  const std::vector<Leaf>& leaves = call.leaves();
  if (plan.local == nullptr) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      JFOG_RETURN_IF_ERROR(
          call.Copy(leaves[i].output, blocks[i].address, blocks[i].bytes));
    }
    return ffi::Error::Success();
  }
  for (const Block& block : blocks) {
    plan.local->traffic().CountSent(plan.local->rank(), block.bytes);
    plan.local->traffic().CountReceived(plan.local->rank(),
                                        block.bytes * (plan.local->size() - 1));
  }
  OperationSpec spec = call.MakeOperationSpec();
  spec.is_collective = true;
  return call.Launch(plan.local, std::move(spec), [&](Group& group) {
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      if (blocks[i].bytes == 0) continue;
      group.AllGather(blocks[i].address, leaves[i].output, blocks[i].bytes);
    }
  });
}

ffi::Error HierarchicalStartImpl(CudaStream stream, State* state, ffi::Token,
                                 ffi::AnyBuffer selector,
                                 ffi::RemainingArgs args,
                                 ffi::Result<ffi::Token>,
                                 ffi::RemainingRets results, ffi::Dictionary) {
  const auto& plan = As<HierarchicalPlan>(state);
  Call call(plan, stream);
  JFOG_RETURN_IF_ERROR(call.Check());
  std::vector<std::int32_t> step{0};
  if (plan.rounds.size() > 1) {
    JFOG_RETURN_IF_ERROR(call.ReadInts(selector, &step));
  }
  step.resize(1, -1);
  auto round = FindRound(plan.rounds, step[0]);
  if (!round) return round.error();
  const std::size_t ranks = plan.local == nullptr ? 1 : plan.local->size();
  const std::size_t parts = 1 + plan.slots;
  const auto block_bytes = [&](const Leaf& leaf) {
    return leaf.bytes / ranks * parts;
  };
  JFOG_RETURN_IF_ERROR(call.ReadLeaves(args, results, [&](const Leaf& leaf) {
    return ranks * block_bytes(leaf);
  }));
  if (!call.is_start() || (*round)->sources.size() >= parts) {
    return MakeError(ffi::ErrorCode::kInternal,
                     "malformed call of " + plan.operation);
  }
  std::vector<Block> blocks;
  for (const Leaf& leaf : call.leaves()) {
    Block block{0, leaf.bytes / ranks, block_bytes(leaf)};
    JFOG_RETURN_IF_ERROR(call.Take(block.bytes, &block.address));
    blocks.push_back(block);
  }
  JFOG_RETURN_IF_ERROR(ReduceParts(plan, call, blocks));
  JFOG_RETURN_IF_ERROR(
      ExchangeParts(plan, call, blocks, **round, Mix(plan.variant, step[0])));
  JFOG_RETURN_IF_ERROR(GatherBlocks(plan, call, blocks));
  return call.Finish(results);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclHierarchicalStart, HierarchicalStartImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CudaStream>>()
                                  .Ctx<ffi::State<State>>()
                                  .Arg<ffi::Token>()      // order in
                                  .Arg<ffi::AnyBuffer>()  // step
                                  .RemainingArgs()        // leaves
                                  .Ret<ffi::Token>()      // order out
                                  .RemainingRets()        // handle
                                  .Attrs());  // see ReadHierarchical

}  // namespace jfog::nccl
