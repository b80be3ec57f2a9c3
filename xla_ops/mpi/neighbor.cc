// Neighbor collectives over MPI point-to-point messages.
#include "mpi/neighbor.h"

#include <cstring>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/communicator.h"
#include "mpi/leaves.h"

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

// This rank's row of one round, cut out of the attributes, which hold all
// rounds: those of round t lie at [begin[t], begin[t + 1]). The last element of
// every array but the offsets is padding, for attributes may not be empty.
struct Round {
  std::vector<int> sources;
  std::vector<double> source_weights;
  std::vector<int> destinations;
  std::vector<double> destination_weights;  // of kSource
  double self_weight = 1;
  bool difference = false;
};

// Reads row[i] of a float32 or float64 operand.
double Weight(const ffi::AnyBuffer& row, std::size_t i) {
  if (row.element_type() == DataType::F64) {
    return static_cast<const double*>(row.untyped_data())[i];
  }
  return static_cast<const float*>(row.untyped_data())[i];
}

ffi::Error CheckRow(const ffi::AnyBuffer& row, int size) {
  if ((row.element_type() == DataType::F32 ||
       row.element_type() == DataType::F64) &&
      row.element_count() == static_cast<std::size_t>(size)) {
    return ffi::Error::Success();
  }
  return MakeError(ffi::ErrorCode::kInternal, "malformed row of weights");
}

ffi::Error NeighborAllreduceImpl(
    ffi::Token, ffi::BufferR0<ffi::S32> step, ffi::RemainingArgs args,
    ffi::Result<ffi::Token>, ffi::RemainingRets results, std::int64_t context,
    std::int64_t graph, std::int64_t weighting, Ints source_begin, Ints sources,
    Doubles source_weights, Ints destination_begin, Ints destinations,
    Doubles self_weights, Ints difference) {
  const std::shared_ptr<Communicator> comm = Lookup(context);
  if (comm == nullptr) {
    return MakeError(ffi::ErrorCode::kFailedPrecondition,
                     "neighbor_allreduce on a communicator that was shut down");
  }
  JFOG_RETURN_IF_ERROR(comm->Refusal());

  const std::int64_t period =
      static_cast<std::int64_t>(source_begin.size()) - 1;
  const std::int64_t at = *step.typed_data();
  if (period < 1 || at < 0 || at >= period) {
    return MakeError(ffi::ErrorCode::kInternal, "step " + std::to_string(at) +
                                                    " of a period of " +
                                                    std::to_string(period));
  }
  const bool has_row = weighting != kGraph;
  auto leaves_or = ReadLeaves(args, has_row ? 1 : 0, results);
  if (!leaves_or) return leaves_or.error();
  const Leaves& leaves = *leaves_or;

  Round round;
  for (int k = source_begin[at]; k < source_begin[at + 1]; ++k) {
    round.sources.push_back(sources[k]);
    round.source_weights.push_back(source_weights[k]);
  }
  for (int k = destination_begin[at]; k < destination_begin[at + 1]; ++k) {
    round.destinations.push_back(destinations[k]);
  }
  round.self_weight = self_weights[at];
  round.difference = difference[at] != 0;
  if (has_row) {
    auto row = args.get<ffi::AnyBuffer>(0);
    if (!row) return row.error();
    JFOG_RETURN_IF_ERROR(CheckRow(*row, comm->size()));
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

  Operation operation(comm, "neighbor_allreduce", leaves.signature,
                      Mix(Mix(graph, weighting), at), leaves.Describe());
  const std::size_t bytes = leaves.message_bytes;
  std::vector<const std::byte*> received;
  for (int source : round.sources) {
    received.push_back(nullptr);
    JFOG_RETURN_IF_ERROR(
        operation.PostReceive(source, bytes, &received.back()));
  }
  // MPI sends from copies: what is still being sent when an operation fails
  // must not be a buffer that XLA uses again.
  const Header header = operation.MakeHeader(bytes - sizeof(Header));
  std::byte* packed = nullptr;
  for (std::size_t d = 0; d < round.destinations.size(); ++d) {
    if (packed == nullptr || weighting == kSource) {
      packed = operation.Allocate(bytes);
      std::memcpy(packed, &header, sizeof(header));
      for (std::size_t i = 0; i < leaves.size(); ++i) {
        std::byte* place = packed + leaves.offsets[i];
        if (weighting != kSource) {
          std::memcpy(place, leaves.inputs[i], leaves.bytes(i));
        } else {
          WeightedSum(leaves.types[i], leaves.counts[i], leaves.inputs[i],
                      round.destination_weights[d], {}, false, place);
        }
      }
    }
    JFOG_RETURN_IF_ERROR(
        operation.PostSend(round.destinations[d], packed, bytes));
  }
  JFOG_RETURN_IF_ERROR(operation.WaitAll());

  std::vector<Term> terms(received.size());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    for (std::size_t k = 0; k < received.size(); ++k) {
      terms[k] = {received[k] + leaves.offsets[i], round.source_weights[k]};
    }
    if (!WeightedSum(leaves.types[i], leaves.counts[i], leaves.inputs[i],
                     round.self_weight, terms, round.difference,
                     leaves.outputs[i])) {
      return operation.Fail(
          ffi::ErrorCode::kInvalidArgument,
          std::string("has no weighted sum of ") + NameOf(leaves.types[i]));
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    NeighborAllreduce, NeighborAllreduceImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // [row of weights,] leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves, each like its operand
        .Attr<std::int64_t>("context")
        .Attr<std::int64_t>("graph")
        .Attr<std::int64_t>("weighting")
        .Attr<Ints>("source_begin")
        .Attr<Ints>("sources")
        .Attr<Doubles>("source_weights")
        .Attr<Ints>("destination_begin")
        .Attr<Ints>("destinations")
        .Attr<Doubles>("self_weights")
        .Attr<Ints>("difference"));

}  // namespace jfog::mpi
