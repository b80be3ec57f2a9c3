// Handlers of neighbor_allreduce and pair_gossip.
#include "mpi/neighbor_allreduce.h"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "mpi/guarded_handler.h"
#include "mpi/launch.h"
#include "mpi/neighbor_average.h"
#include "mpi/plan.h"

namespace jfog::mpi {
namespace {

// The source of the weights of a call, in the order of the Python side.
enum Weighting : std::int64_t {
  kGraph = 0,        // the graph
  kDestination = 1,  // a runtime row: y = row[me] x + sum_j row[j] x_j
  kSource = 2,       // its transpose, where the senders scale:
                     // y = row[me] x + sum_j (row_j[me] x_j)
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

constexpr const char* kNeighborAllreduce = "neighbor_allreduce";

// A completed average, for reuse: its construction would dominate the time of a
// call of few bytes. A thread that finds another one here goes without.
class Spare {
 public:
  // Acquires what the last thread has released. XLA orders the two, but
  // ThreadSanitizer does not see that.
  ~Spare() { Take(); }
  std::shared_ptr<NeighborAverage> Take() {
    if (is_busy_.exchange(true, std::memory_order_acquire)) return nullptr;
    std::shared_ptr<NeighborAverage> average = std::move(average_);
    is_busy_.store(false, std::memory_order_release);
    return average;
  }
  void Put(std::shared_ptr<NeighborAverage> average) {
    if (is_busy_.exchange(true, std::memory_order_acquire)) return;
    average_.swap(average);
    is_busy_.store(false, std::memory_order_release);
  }

 private:
  std::atomic<bool> is_busy_{false};
  std::shared_ptr<NeighborAverage> average_;
};

struct NeighborPlan : Plan {
  std::int64_t weighting = kGraph;
  std::vector<Spare> spares;  // of each round

  ffi::Error Read(const ffi::Dictionary& attributes) {
    JFOG_RETURN_IF_ERROR(ReadCommon(attributes, kNeighborAllreduce));
    const auto source = attributes.get<std::int64_t>("weighting");
    if (!source) return source.error();
    weighting = *source;
    spares = std::vector<Spare>(rounds.size());
    return ffi::Error::Success();
  }
};

// The round, with the weights of a runtime row.
ffi::ErrorOr<Round> Reweighted(Round round, const NeighborPlan& plan,
                               const ffi::AnyBuffer& row) {
  ffi::Error error = CheckWeights(row, plan.comm->size());
  if (error.failure()) return ffi::Unexpected(std::move(error));
  round.difference = false;
  round.self_weight = Weight(row, plan.comm->rank());
  for (std::size_t k = 0; k < round.sources.size(); ++k) {
    round.source_weights[k] =
        plan.weighting == kDestination ? Weight(row, round.sources[k]) : 1.0;
  }
  if (plan.weighting == kSource) {
    for (int destination : round.destinations) {
      round.destination_weights.push_back(Weight(row, destination));
    }
  }
  return round;
}

Completion NeighborAllreduceImpl(State* state, ffi::Token,
                                 ffi::BufferR0<ffi::S32> step,
                                 ffi::RemainingArgs args,
                                 ffi::Result<ffi::Token>,
                                 ffi::RemainingRets results, ffi::Dictionary) {
  NeighborPlan& plan = As<NeighborPlan>(state);
  JFOG_RETURN_IF_ERROR(plan.Check(kNeighborAllreduce));
  const std::int64_t at = *step.typed_data();
  JFOG_ASSIGN_OR_RETURN(planned, plan.At(at));
  const bool has_row = plan.weighting != kGraph;
  const bool reuses = !has_row && plan.mode == kWhole;
  plan.Agree();
  std::shared_ptr<NeighborAverage> average;
  if (reuses) average = plan.spares[at].Take();
  if (average == nullptr || !average->Renew(args, results)) {
    JFOG_ASSIGN_OR_RETURN(leaves,
                          ReadCall(args, has_row ? 1 : 0, results, plan.mode));
    JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, kNeighborAllreduce));
    Round reweighted;
    if (has_row) {
      auto row = args.get<ffi::AnyBuffer>(0);
      if (!row) return row.error();
      JFOG_ASSIGN_OR_RETURN(round, Reweighted(*planned, plan, *row));
      reweighted = std::move(round);
    }
    if (plan.mode == kStart) leaves.Stage();
    average = std::make_shared<NeighborAverage>(
        plan.comm, kNeighborAllreduce, std::move(leaves),
        Mix(Mix(plan.graph, plan.weighting), at),
        has_row ? reweighted : *planned);
    // Where the senders weight, this rank does not know the weight that is
    // missing.
    if (plan.weighting != kSource) average->AllowMissing();
  }
  if (!reuses) return Launch(std::move(average), results, plan.mode);
  average->Start();
  if (!EndsSoon(*average)) return HandOver(std::move(average));
  if (average->error().failure()) return average->error();
  plan.spares[at].Put(std::move(average));
  return ffi::Error::Success();
}

// The peers are operands of each rank: `ids` holds the sources, `sources` of
// them, and then the destinations; `weights` the self weight, those of the
// sources and those of the destinations.
Completion PeerAllreduceImpl(ffi::Token, ffi::BufferR1<ffi::S32> ids,
                             ffi::AnyBuffer weights, ffi::RemainingArgs args,
                             ffi::Result<ffi::Token>,
                             ffi::RemainingRets results, std::int64_t context,
                             std::int64_t mode, std::int64_t pair,
                             std::int64_t sources, std::int64_t scales,
                             std::int64_t difference, std::int64_t check) {
  const char* const name = pair ? "pair_gossip" : "neighbor_allreduce";
  JFOG_ASSIGN_OR_RETURN(comm, Ready(Communicators(), context, name));
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, mode));
  JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, name));
  const std::size_t count = ids.element_count();
  JFOG_RETURN_IF_ERROR(CheckWeights(weights, 1 + count));
  Round round;
  round.self_weight = Weight(weights, 0);
  round.difference = difference != 0;
  for (std::size_t k = 0; k < count; ++k) {
    const int peer = ids.typed_data()[k];
    if (peer < 0 || peer >= comm->size()) {
      return MakeError(
          ffi::ErrorCode::kInvalidArgument,
          std::string(name) + " with rank " + std::to_string(peer) +
              ", which is out of range for a communicator of size " +
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
  auto average =
      std::make_shared<NeighborAverage>(comm, name, std::move(leaves),
                                        /*variant=*/0, round);
  // See above: where a sender scales, its weight is not known here.
  if (!scales) average->AllowMissing();
  JFOG_RETURN_IF_ERROR(average->AgreeOnPeers(check != 0));
  return Launch(std::move(average), results, mode);
}

}  // namespace

JFOG_DEFINE_HANDLER(MakeNeighborAllreduce, "neighbor_allreduce",
                    MakePlan<NeighborPlan>,
                    ffi::Ffi::BindInstantiate().Attrs());

JFOG_DEFINE_HANDLER(
    NeighborAllreduce, "neighbor_allreduce", NeighborAllreduceImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::State<State>>()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR0<ffi::S32>>()  // step, already modulo the period
        .RemainingArgs()                 // [row of weights,] leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attrs());                       // see NeighborPlan

JFOG_DEFINE_HANDLER(
    PeerAllreduce, "neighbor_allreduce", PeerAllreduceImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Token>()               // order in
        .Arg<ffi::BufferR1<ffi::S32>>()  // ranks of sources, destinations
        .Arg<ffi::AnyBuffer>()           // weights of self and of those
        .RemainingArgs()                 // leaves
        .Ret<ffi::Token>()               // order out
        .RemainingRets()                 // leaves like the operands, or handle
        .Attr<std::int64_t>("context")
        .Attr<std::int64_t>("mode")
        .Attr<std::int64_t>("pair")
        .Attr<std::int64_t>("sources")
        .Attr<std::int64_t>("scales")
        .Attr<std::int64_t>("difference")
        .Attr<std::int64_t>("check"));

}  // namespace jfog::mpi
