// finite_time_average: rounds of exchanges that end in the exact average.
#include "mpi/finite_time.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/hash.h"
#include "common/weighted_sum.h"
#include "mpi/buffer_pool.h"
#include "mpi/exchange.h"
#include "mpi/guarded_handler.h"
#include "mpi/launch.h"
#include "mpi/neighbor_average.h"
#include "mpi/plan.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;

constexpr const char* kFiniteTime = "finite_time_average";

// A view of the leaves: from the operands or the outputs to the outputs.
enum Input { kOperands, kOutputs };
Payload ViewOf(const Payload& whole, Input input) {
  Payload view;
  view.leaves = whole.leaves;
  if (input == kOutputs) {
    for (Leaf& leaf : view.leaves) leaf.input = leaf.output;
  }
  view.ComputeOffsets();
  return view;
}

// One round of the protocol with two sums: with R received from the source,
// S += R and T += R. S lies in the outputs, T in memory laid out like a
// payload; one of the two is sent.
class Hop : public Exchange {
 public:
  Hop(std::shared_ptr<Communicator> comm, Payload leaves, std::uint64_t variant,
      const Round& round, std::byte* t, bool sends_s, bool is_followup)
      : Exchange(std::move(comm), kFiniteTime, std::move(leaves), variant,
                 {round.sources, round.destinations, /*same_payload=*/true,
                  is_followup}),
        t_(t),
        sends_s_(sends_s) {}

 private:
  void Pack(std::size_t, std::size_t begin, std::size_t end,
            std::byte* to) override {
    // S lies in the outputs, which are this exchange's inputs, too.
    if (sends_s_) return leaves().CopyOut(begin, end, to);
    std::memcpy(to, t_ + begin, end - begin);
  }

  ffi::Error Consume(std::size_t begin, std::size_t end,
                     const std::vector<Part>& received) override {
    leaves().ForEachRun(
        begin, end,
        [&](const Leaf& leaf, std::size_t first, std::size_t count,
            std::size_t at) {
          const std::size_t width = SizeOf(leaf.type);
          const std::vector<Term> terms = {{received[0].bytes + at, 1.0}};
          for (std::byte* sum : {leaf.output, t_ + leaf.offset}) {
            sum += first * width;
            WeightedSum(leaf.type, count, sum, 1.0, terms,
                        /*difference=*/false, sum);
          }
        });
    return ffi::Error::Success();
  }

  std::byte* const t_;
  const bool sends_s_;
};

struct FiniteTimePlan : Plan {
  bool is_exact = false;      // the protocol with two sums
  std::vector<bool> sends_s;  // by round; otherwise T is sent

  ffi::Error Read(const ffi::Dictionary& attributes) {
    JFOG_RETURN_IF_ERROR(ReadCommon(attributes, kFiniteTime));
    const auto exact = attributes.get<std::int64_t>("exact");
    const auto inclusive = attributes.get<Ints>("inclusive");
    if (!(exact && inclusive)) return LacksAttributes(kFiniteTime);
    is_exact = *exact != 0;
    sends_s.assign(inclusive->begin(), inclusive->end());
    return ffi::Error::Success();
  }
};

// Consecutive rounds. Each is an operation with its own sequence number, taken
// when this operation is made, and starts when the round before it has ended.
class FiniteTime : public Operation {
 public:
  FiniteTime(const FiniteTimePlan& plan, Payload leaves)
      : Operation(plan.comm, kFiniteTime, std::move(leaves),
                  static_cast<std::uint64_t>(plan.graph)),
        divides_(plan.is_exact) {
    const Payload& whole = this->leaves();
    if (plan.is_exact) {
      sum_ = Buffer(whole.payload_bytes);
      std::memset(sum_.get(), 0, whole.payload_bytes);
    }
    for (std::size_t k = 0; k < plan.rounds.size(); ++k) {
      const std::uint64_t variant = Mix(plan.graph, k + 1);
      const bool is_followup = k > 0;
      if (plan.is_exact) {
        rounds_.push_back(std::make_unique<Hop>(
            plan.comm, ViewOf(whole, kOutputs), variant, plan.rounds[k],
            sum_.get(), plan.sends_s[k], is_followup));
      } else {
        rounds_.push_back(std::make_unique<NeighborAverage>(
            plan.comm, kFiniteTime,
            ViewOf(whole, is_followup ? kOutputs : kOperands), variant,
            plan.rounds[k], is_followup));
      }
    }
  }

 private:
  ffi::Error Post() override {
    if (divides_ || rounds_.empty()) {
      for (const Leaf& leaf : leaves()) {
        if (leaf.input == leaf.output || leaf.bytes() == 0) continue;
        std::memcpy(leaf.output, leaf.input, leaf.bytes());
      }
    }
    if (!rounds_.empty()) rounds_[0]->Start();
    return ffi::Error::Success();
  }

  bool is_waiting() const override { return ended_ < rounds_.size(); }

  ffi::Error Resume(bool* moved) override {
    while (ended_ < rounds_.size()) {
      Operation& round = *rounds_[ended_];
      if (round.Advance()) *moved = true;
      if (!round.finished()) break;
      if (round.error().failure()) return round.error();
      *moved = true;
      if (++ended_ < rounds_.size()) rounds_[ended_]->Start();
    }
    return ffi::Error::Success();
  }

  ffi::Error Drained(bool* ended) override {
    *ended = true;
    for (const Leaf& leaf : leaves()) {
      if (divides_) Divide(leaf.type, leaf.count, comm().size(), leaf.output);
    }
    return ffi::Error::Success();
  }

  // Stalls are found by the round in flight, from the time it is awaited.
  ffi::Error Stalled() override {
    if (ended_ == rounds_.size()) return ffi::Error::Success();
    Operation& round = *rounds_[ended_];
    if (awaited_ != ended_ + 1) {
      awaited_ = ended_ + 1;
      round.Await();
    }
    round.CheckStall(Clock::now());
    return ffi::Error::Success();
  }

  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }
  std::vector<int> Missing() const override { return {}; }
  std::vector<int> WaitedFor() const override {
    if (ended_ == rounds_.size()) return {};
    return Operation::WaitedFor(*rounds_[ended_]);
  }
  void Leak() override {}

  const bool divides_;
  Buffer sum_;
  std::vector<std::unique_ptr<Operation>> rounds_;
  std::size_t ended_ = 0;
  std::size_t awaited_ = 0;  // the last round awaited, from 1
};

Completion FiniteTimeImpl(State* state, ffi::Token, ffi::RemainingArgs args,
                          ffi::Result<ffi::Token>, ffi::RemainingRets results,
                          ffi::Dictionary) {
  FiniteTimePlan& plan = As<FiniteTimePlan>(state);
  JFOG_RETURN_IF_ERROR(plan.Check(kFiniteTime));
  plan.Agree();
  JFOG_ASSIGN_OR_RETURN(leaves, ReadCall(args, 0, results, plan.mode));
  JFOG_RETURN_IF_ERROR(CheckWeighable(leaves, kFiniteTime));
  if (plan.mode == kStart) leaves.Stage();
  return Launch(std::make_shared<FiniteTime>(plan, std::move(leaves)), results,
                plan.mode);
}

}  // namespace

JFOG_DEFINE_HANDLER(MakeFiniteTimeAverage, "finite_time_average",
                    MakePlan<FiniteTimePlan>,
                    ffi::Ffi::BindInstantiate().Attrs());

JFOG_DEFINE_HANDLER(FiniteTimeAverage, "finite_time_average", FiniteTimeImpl,
                    ffi::Ffi::Bind()
                        .Ctx<ffi::State<State>>()
                        .Arg<ffi::Token>()  // order in
                        .RemainingArgs()    // leaves
                        .Ret<ffi::Token>()  // order out
                        .RemainingRets()    // leaves, or handle
                        .Attrs());          // see FiniteTimePlan

}  // namespace jfog::mpi
