// neighbor_allgather and its transpose: exchanges and handlers.
#include "mpi/neighbor_allgather.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "common/weighted_sum.h"
#include "mpi/exchange.h"
#include "mpi/guarded_handler.h"
#include "mpi/launch.h"
#include "mpi/plan.h"

namespace jfog::mpi {
namespace {

using Longs = ffi::Span<const std::int64_t>;

struct GatherPlan : Plan {
  const char* name = "neighbor_allgather";
  bool check = false;      // of peers that are not from a graph
  std::int64_t first = 0;  // the graph's round that is round 0 of the plan
  std::vector<std::int64_t> rows;   // [i * size + r] of leaf i on rank r
  std::vector<std::int64_t> width;  // elements of one row of leaf i
  std::vector<std::int64_t> total;  // rows of the gathered leaf i, with padding

  std::size_t Count(std::size_t leaf, int rank) const {
    return rows[leaf * comm->size() + rank] * width[leaf];
  }

  ffi::Error Read(const ffi::Dictionary& attributes) {
    JFOG_RETURN_IF_ERROR(ReadCommon(attributes, name));
    const auto checks = attributes.get<std::int64_t>("check");
    const auto first_round = attributes.get<std::int64_t>("first");
    if (!(checks && first_round)) return LacksAttributes(name);
    check = *checks != 0;
    first = *first_round;
    const auto read = [&](const char* attribute,
                          std::vector<std::int64_t>* values) {
      const auto found = attributes.get<Longs>(attribute);
      if (!found) return LacksAttributes(name);
      values->assign(found->begin(), found->end());
      return ffi::Error::Success();
    };
    JFOG_RETURN_IF_ERROR(read("rows", &rows));
    JFOG_RETURN_IF_ERROR(read("width", &width));
    return read("total", &total);
  }
};

struct TransposePlan : GatherPlan {
  TransposePlan() { name = "neighbor_allgather_transpose"; }
};

// The part of one rank in the gathered leaves, as a payload of its own. It
// begins at the elements `starts`, which are advanced to its end.
Payload PartOf(const Payload& whole, const GatherPlan& plan, int rank,
               std::vector<std::size_t>* starts) {
  Payload part;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    Leaf leaf = whole[i];
    const std::size_t start = (*starts)[i] * SizeOf(leaf.type);
    leaf.count = leaf.output_count = plan.Count(i, rank);
    leaf.input += start;
    leaf.output += start;
    (*starts)[i] += leaf.count;
    part.leaves.push_back(leaf);
  }
  part.ComputeOffsets();
  return part;
}

// The consecutive parts of ranks in the gathered leaves.
std::vector<Payload> PartsOf(const Payload& whole, const GatherPlan& plan,
                             const std::vector<int>& ranks) {
  std::vector<std::size_t> starts(whole.size(), 0);
  std::vector<Payload> parts;
  for (int rank : ranks) parts.push_back(PartOf(whole, plan, rank, &starts));
  return parts;
}

std::vector<std::size_t> Sizes(const std::vector<Payload>& parts) {
  std::vector<std::size_t> sizes;
  for (const Payload& part : parts) sizes.push_back(part.payload_bytes);
  return sizes;
}

// Covers the lengths of all ranks, since those may differ between ranks.
std::uint64_t Signature(const Payload& leaves, const GatherPlan& plan) {
  std::uint64_t signature = leaves.size();
  for (const Leaf& leaf : leaves) {
    signature = Mix(signature, static_cast<std::uint64_t>(leaf.type));
  }
  for (std::int64_t width : plan.width) signature = Mix(signature, width);
  for (std::int64_t rows : plan.rows) signature = Mix(signature, rows);
  return signature;
}

// y = [x_j for j in sources], along the first axis, and padding.
class GatherExchange : public Exchange {
 public:
  GatherExchange(const GatherPlan& plan, const char* name, Payload whole,
                 std::uint64_t variant, const Round& round,
                 std::vector<Payload> parts)
      : Exchange(plan.comm, name, std::move(whole), variant,
                 {round.sources, round.destinations, /*same_payload=*/true,
                  /*is_followup=*/false, Sizes(parts)}),
        parts_(std::move(parts)) {
    SetSignature(Signature(leaves(), plan));
    // Zeros from the last part to the end of each leaf.
    std::vector<std::size_t> filled(leaves().size(), 0);
    for (const Payload& part : parts_) {
      for (std::size_t i = 0; i < part.size(); ++i) {
        filled[i] += part[i].bytes();
      }
    }
    for (std::size_t i = 0; i < leaves().size(); ++i) {
      const std::size_t rest = leaves()[i].output_bytes() - filled[i];
      if (rest > 0) std::memset(leaves()[i].output + filled[i], 0, rest);
    }
  }

 private:
  void Pack(std::size_t, std::size_t begin, std::size_t end,
            std::byte* to) override {
    leaves().CopyOut(begin, end, to);
  }

  ffi::Error Consume(std::size_t, std::size_t,
                     const std::vector<Part>& received) override {
    for (std::size_t s = 0; s < received.size(); ++s) {
      const Part& chunk = received[s];
      if (chunk.bytes == nullptr) continue;
      parts_[s].CopyIn(chunk.begin, chunk.end, chunk.bytes);
    }
    return ffi::Error::Success();
  }

  const char* phase() const override { return "copy"; }
  std::size_t CountOfSource(std::size_t s) const override {
    return parts_[s].bytes;
  }

  const std::vector<Payload> parts_;  // of the sources
};

// The transpose: each rank sends its sources their parts of the cotangent c,
// and y = sum_i c_i[this rank's part] over its destinations i. Edges turn
// around, so the exchange's sources are the round's destinations.
class ScatterExchange : public Exchange {
 public:
  ScatterExchange(const GatherPlan& plan, const char* name, Payload whole,
                  std::uint64_t variant, const Round& round,
                  std::vector<Payload> parts, Payload own)
      : Exchange(plan.comm, name, std::move(whole), variant,
                 {round.destinations, round.sources, /*same_payload=*/false,
                  /*is_followup=*/false,
                  std::vector<std::size_t>(round.destinations.size(),
                                           own.payload_bytes),
                  Sizes(parts)}),
        parts_(std::move(parts)),
        own_(std::move(own)) {
    SetSignature(Signature(leaves(), plan));
  }

 private:
  void Pack(std::size_t destination, std::size_t begin, std::size_t end,
            std::byte* to) override {
    parts_[destination].CopyOut(begin, end, to);
  }

  ffi::Error Consume(std::size_t, std::size_t,
                     const std::vector<Part>& received) override {
    if (received.empty()) {
      for (const Leaf& leaf : own_) {
        if (leaf.bytes() > 0) std::memset(leaf.output, 0, leaf.bytes());
      }
      return ffi::Error::Success();
    }
    // All parts have the length of this rank's own, so the first one's range is
    // that of all.
    own_.ForEachRun(received[0].begin, received[0].end,
                    [&](const Leaf& leaf, std::size_t first, std::size_t count,
                        std::size_t at) {
                      std::vector<Term> terms;
                      for (std::size_t k = 1; k < received.size(); ++k) {
                        terms.push_back({received[k].bytes + at, 1.0});
                      }
                      WeightedSum(leaf.type, count, received[0].bytes + at, 1.0,
                                  terms, /*difference=*/false,
                                  leaf.output + first * SizeOf(leaf.type));
                    });
    return ffi::Error::Success();
  }

  std::size_t CountOfSource(std::size_t) const override { return own_.bytes; }
  std::size_t CountOfDestination(std::size_t d) const override {
    return parts_[d].bytes;
  }

  const std::vector<Payload> parts_;  // of the destinations
  const Payload own_;
};

Completion LaunchExchange(GatherPlan& plan, bool transposed,
                          const ffi::BufferR0<ffi::S32>& step,
                          ffi::RemainingArgs args, ffi::RemainingRets results) {
  const char* const name = plan.name;
  JFOG_RETURN_IF_ERROR(plan.Check(name));
  const std::int64_t at = *step.typed_data();
  JFOG_ASSIGN_OR_RETURN(round, plan.At(at));
  plan.Agree();
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, plan.mode));
  const int me = plan.comm->rank();
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    const std::size_t gathered = plan.total[i] * plan.width[i];
    leaves[i].output_count = transposed ? plan.Count(i, me) : gathered;
  }
  if (transposed) JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, name));
  if (plan.mode == kStart) leaves.Stage(/*separate_outputs=*/true);
  std::vector<Payload> parts = PartsOf(leaves, plan, round->sources);
  const std::uint64_t variant = Mix(plan.graph, plan.first + at);
  std::shared_ptr<Exchange> operation;
  if (transposed) {
    std::vector<std::size_t> starts(leaves.size(), 0);
    Payload own = PartOf(leaves, plan, me, &starts);
    operation = std::make_shared<ScatterExchange>(
        plan, name, std::move(leaves), variant, *round, std::move(parts),
        std::move(own));
  } else {
    operation = std::make_shared<GatherExchange>(
        plan, name, std::move(leaves), variant, *round, std::move(parts));
  }
  if (plan.graph == 0) {
    JFOG_RETURN_IF_ERROR(operation->AgreeOnPeers(plan.check));
  }
  return Launch(std::move(operation), results, plan.mode);
}

Completion NeighborAllgatherImpl(State* state, ffi::Token,
                                 ffi::BufferR0<ffi::S32> step,
                                 ffi::RemainingArgs args,
                                 ffi::Result<ffi::Token>,
                                 ffi::RemainingRets results, ffi::Dictionary) {
  return LaunchExchange(As<GatherPlan>(state), false, step, args, results);
}

Completion NeighborAllgatherTransposeImpl(State* state, ffi::Token,
                                          ffi::BufferR0<ffi::S32> step,
                                          ffi::RemainingArgs args,
                                          ffi::Result<ffi::Token>,
                                          ffi::RemainingRets results,
                                          ffi::Dictionary) {
  return LaunchExchange(As<TransposePlan>(state), true, step, args, results);
}

}  // namespace

JFOG_DEFINE_HANDLER(MakeNeighborAllgather, "neighbor_allgather",
                    MakePlan<GatherPlan>, ffi::Ffi::BindInstantiate().Attrs());

JFOG_DEFINE_HANDLER(
    NeighborAllgather, "neighbor_allgather", NeighborAllgatherImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::State<State>>()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // gathered leaves, or handle
        .Attrs());                       // see GatherPlan

JFOG_DEFINE_HANDLER(MakeNeighborAllgatherTranspose, "neighbor_allgather",
                    MakePlan<TransposePlan>,
                    ffi::Ffi::BindInstantiate().Attrs());

JFOG_DEFINE_HANDLER(
    NeighborAllgatherTranspose, "neighbor_allgather",
    NeighborAllgatherTransposeImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::State<State>>()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // cotangents of gathered leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // cotangents of leaves, or handle
        .Attrs());                       // see GatherPlan

}  // namespace jfog::mpi
