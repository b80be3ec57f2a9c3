// Neighbor collectives over MPI point-to-point messages.
#include "mpi/neighbor.h"

#include <cstring>
#include <utility>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/agreement.h"
#include "mpi/call.h"
#include "mpi/exchange.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using Doubles = ffi::Span<const double>;

// Where the weights of a call come from.
enum Weighting : std::int64_t {
  kGraph = 0,        // the table
  kDestination = 1,  // a runtime row: y = row[me] x + sum_j row[j] x_j
  kSource = 2,       // its transpose: every sender scales, y = row[me] x +
                     // sum_j (row_j[me] x_j)
};

// What one rank does in one round.
struct Round {
  std::vector<int> sources;
  std::vector<double> source_weights;
  std::vector<int> destinations;
  std::vector<double> destination_weights;  // empty where the receivers weight
  double self_weight = 1;
  bool difference = false;
};

// The weighted sum of one's own payload and those of the sources.
class Average : public Exchange {
 public:
  Average(std::shared_ptr<Communicator> comm, const char* name, Leaves leaves,
          std::uint64_t variant, Round round)
      : Exchange(std::move(comm), name, std::move(leaves), variant,
                 std::move(round.sources), std::move(round.destinations),
                 round.destination_weights.empty()),
        round_(std::move(round)) {
    for (double weight : round_.source_weights) {
      terms_.push_back({nullptr, weight});
    }
  }

 private:
  void Pack(std::size_t destination, std::size_t begin, std::size_t end,
            std::byte* to) override {
    leaves().ForEachRun(begin, end, [&](const Leaf& leaf, std::size_t first,
                                        std::size_t count, std::size_t at) {
      const std::size_t width = SizeOf(leaf.type);
      const std::byte* x = leaf.input + first * width;
      if (round_.destination_weights.empty()) {
        std::memcpy(to + at, x, count * width);
      } else {
        WeightedSum(leaf.type, count, x,
                    round_.destination_weights[destination], {}, false,
                    to + at);
      }
    });
  }

  ffi::Error Consume(std::size_t begin, std::size_t end,
                     const std::vector<const std::byte*>& received) override {
    leaves().ForEachRun(begin, end, [&](const Leaf& leaf, std::size_t first,
                                        std::size_t count, std::size_t at) {
      for (std::size_t k = 0; k < received.size(); ++k) {
        terms_[k].values = received[k] + at;
      }
      const std::size_t start = first * SizeOf(leaf.type);
      WeightedSum(leaf.type, count, leaf.input + start, round_.self_weight,
                  terms_, round_.difference, leaf.output + start);
    });
    return ffi::Error::Success();
  }

  Round round_;
  std::vector<Term> terms_;
};

// Reads entry i of a float32 or float64 operand.
double Weight(const ffi::AnyBuffer& weights, std::size_t i) {
  if (weights.element_type() == DataType::F64) {
    return static_cast<const double*>(weights.untyped_data())[i];
  }
  return static_cast<const float*>(weights.untyped_data())[i];
}

ffi::Error CheckWeights(const ffi::AnyBuffer& weights, std::size_t count) {
  if ((weights.element_type() == DataType::F32 ||
       weights.element_type() == DataType::F64) &&
      weights.element_count() == count) {
    return ffi::Error::Success();
  }
  return MakeError(ffi::ErrorCode::kInternal, "malformed operand of weights");
}

ffi::Error CheckTypes(const Leaves& leaves, const char* name) {
  for (const Leaf& leaf : leaves) {
    if (!HasWeightedSum(leaf.type)) {
      return MakeError(
          ffi::ErrorCode::kInvalidArgument,
          std::string(name) + " has no weighted sum of " + NameOf(leaf.type));
    }
  }
  return ffi::Error::Success();
}

Completion NeighborAllreduceImpl(
    ffi::Token, ffi::BufferR0<ffi::S32> step, ffi::RemainingArgs args,
    ffi::Result<ffi::Token>, ffi::RemainingRets results, std::int64_t context,
    std::int64_t mode, std::int64_t graph, std::int64_t weighting,
    Ints source_begin, Ints sources, Doubles source_weights,
    Ints destination_begin, Ints destinations, Doubles self_weights,
    Ints difference) {
  constexpr const char* kName = "neighbor_allreduce";
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, kName));
  const std::int64_t period =
      static_cast<std::int64_t>(source_begin.size()) - 1;
  const std::int64_t at = *step.typed_data();
  if (period < 1 || at < 0 || at >= period) {
    return MakeError(ffi::ErrorCode::kInternal, "step " + std::to_string(at) +
                                                    " of a period of " +
                                                    std::to_string(period));
  }
  const bool has_row = weighting != kGraph;
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, has_row ? 1 : 0, results, mode));
  JFOG_RETURN_IF_ERROR(CheckTypes(leaves, kName));

  // This rank's part of one round, cut out of the attributes, which hold all:
  // that of round t lies at [begin[t], begin[t + 1]).
  Round round;
  const auto cut = [at](const auto& begin, const auto& values) {
    return std::vector(values.begin() + begin[at],
                       values.begin() + begin[at + 1]);
  };
  round.sources = cut(source_begin, sources);
  round.source_weights = cut(source_begin, source_weights);
  round.destinations = cut(destination_begin, destinations);
  round.self_weight = self_weights[at];
  round.difference = difference[at] != 0;
  if (has_row) {
    auto row = args.get<ffi::AnyBuffer>(0);
    if (!row) return row.error();
    JFOG_RETURN_IF_ERROR(CheckWeights(*row, comm->size()));
    round.difference = false;
    round.self_weight = Weight(*row, comm->rank());
    for (std::size_t k = 0; k < round.sources.size(); ++k) {
      round.source_weights[k] =
          weighting == kDestination ? Weight(*row, round.sources[k]) : 1.0;
    }
    if (weighting == kSource) {
      for (int destination : round.destinations) {
        round.destination_weights.push_back(Weight(*row, destination));
      }
    }
  }
  if (mode == kStart) leaves.Stage();
  AgreeOnGraph(comm, graph);
  return Launch(std::make_shared<Average>(
                    comm, kName, std::move(leaves),
                    Mix(Mix(graph, weighting), at), std::move(round)),
                results, mode);
}

// Every rank names its own peers: ids holds `sources` of them and then the
// destinations; weights its own, those of the sources, those of the
// destinations.
Completion PeerAllreduceImpl(ffi::Token, ffi::BufferR1<ffi::S32> ids,
                             ffi::AnyBuffer weights, ffi::RemainingArgs args,
                             ffi::Result<ffi::Token>,
                             ffi::RemainingRets results, std::int64_t context,
                             std::int64_t mode, std::int64_t pair,
                             std::int64_t sources, std::int64_t scales,
                             std::int64_t difference) {
  const char* const name = pair ? "pair_gossip" : "neighbor_allreduce";
  JFOG_ASSIGN_OR_RETURN(comm, Ready(context, name));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  JFOG_RETURN_IF_ERROR(CheckTypes(leaves, name));
  const std::size_t count = ids.element_count();
  JFOG_RETURN_IF_ERROR(CheckWeights(weights, 1 + count));
  Round round;
  round.self_weight = Weight(weights, 0);
  round.difference = difference != 0;
  for (std::size_t k = 0; k < count; ++k) {
    const int peer = ids.typed_data()[k];
    if (peer < 0 || peer >= comm->size()) {
      return MakeError(ffi::ErrorCode::kInvalidArgument,
                       std::string(name) + " with rank " +
                           std::to_string(peer) +
                           ", which is none of the communicator's " +
                           std::to_string(comm->size()));
    }
    const double weight = Weight(weights, 1 + k);
    if (k < static_cast<std::size_t>(sources)) {
      round.sources.push_back(peer);
      round.source_weights.push_back(weight);
    } else {
      round.destinations.push_back(peer);
      if (scales) round.destination_weights.push_back(weight);
    }
  }
  if (mode == kStart) leaves.Stage();
  return Launch(std::make_shared<Average>(comm, name, std::move(leaves),
                                          /*variant=*/0, std::move(round)),
                results, mode);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    NeighborAllreduce, NeighborAllreduceImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // [row of weights,] leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attr<std::int64_t>("context")
        .Attr<std::int64_t>("mode")
        .Attr<std::int64_t>("graph")
        .Attr<std::int64_t>("weighting")
        .Attr<Ints>("source_begin")
        .Attr<Ints>("sources")
        .Attr<Doubles>("source_weights")
        .Attr<Ints>("destination_begin")
        .Attr<Ints>("destinations")
        .Attr<Doubles>("self_weights")
        .Attr<Ints>("difference"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PeerAllreduce, PeerAllreduceImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()                // order in
        .Arg<ffi::BufferR1<ffi::S32>>()  // ranks of sources, destinations
        .Arg<ffi::AnyBuffer>()            // weights of self and of those
        .RemainingArgs()                  // leaves
        .Ret<ffi::Token>()                // order out
        .RemainingRets()                  // leaves like the operands, or handle
        .Attr<std::int64_t>("context")
        .Attr<std::int64_t>("mode")
        .Attr<std::int64_t>("pair")
        .Attr<std::int64_t>("sources")
        .Attr<std::int64_t>("scales")
        .Attr<std::int64_t>("difference"));

}  // namespace jfog::mpi
