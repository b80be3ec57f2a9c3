// What the calls with equal attributes have in common, read once.
#include "mpi/plan.h"

#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "mpi/call.h"
#include "mpi/consistency_check.h"

namespace jfog::mpi {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using Doubles = ffi::Span<const double>;

// By the number that Python derives from the attributes.
struct Plans {
  std::mutex mutex;
  std::unordered_map<std::int64_t, std::shared_ptr<Plan>> plans;
};

// Never destroyed: programs may still run while the process ends.
Plans& ThePlans() {
  static Plans* plans = new Plans;
  return *plans;
}

}  // namespace

void Plan::Agree() {
  if (agreed.load(std::memory_order_relaxed)) return;
  if (!agreed.exchange(true) && graph != 0) AgreeOnGraph(comm, graph);
}

ffi::ErrorOr<const Round*> Plan::At(std::int64_t step) const {
  if (step < 0 || step >= static_cast<std::int64_t>(rounds.size())) {
    return ffi::Unexpected(MakeError(ffi::ErrorCode::kInternal,
                                     "step " + std::to_string(step) +
                                         " of a period of " +
                                         std::to_string(rounds.size())));
  }
  return &rounds[step];
}

// The attributes hold all rounds: round t's part lies at [begin[t],
// begin[t + 1]).
ffi::Error ReadPlan(const ffi::Dictionary& attributes, const char* name,
                    Plan* plan) {
  const auto context = attributes.get<std::int64_t>("context");
  const auto mode = attributes.get<std::int64_t>("mode");
  const auto graph = attributes.get<std::int64_t>("graph");
  const auto source_begin = attributes.get<Ints>("source_begin");
  const auto sources = attributes.get<Ints>("sources");
  const auto source_weights = attributes.get<Doubles>("source_weights");
  const auto destination_begin = attributes.get<Ints>("destination_begin");
  const auto destinations = attributes.get<Ints>("destinations");
  const auto self_weights = attributes.get<Doubles>("self_weights");
  const auto difference = attributes.get<Ints>("difference");
  if (!(context && mode && graph && source_begin && sources && source_weights &&
        destination_begin && destinations && self_weights && difference)) {
    return MakeError(ffi::ErrorCode::kInternal,
                     std::string(name) + " lacks attributes");
  }
  auto comm = Ready(*context, name);
  if (!comm) return comm.error();
  plan->comm = *comm;
  plan->mode = *mode;
  plan->graph = *graph;
  for (std::size_t t = 0; t + 1 < source_begin->size(); ++t) {
    const auto cut = [t](const auto& begin, const auto& values) {
      return std::vector(values->begin() + (*begin)[t],
                         values->begin() + (*begin)[t + 1]);
    };
    Round round;
    round.sources = cut(source_begin, sources);
    round.source_weights = cut(source_begin, source_weights);
    round.destinations = cut(destination_begin, destinations);
    round.self_weight = (*self_weights)[t];
    round.difference = (*difference)[t] != 0;
    plan->rounds.push_back(std::move(round));
  }
  return ffi::Error::Success();
}

ffi::ErrorOr<std::shared_ptr<Plan>> FindPlan(
    const ffi::Dictionary& attributes,
    const std::function<ffi::ErrorOr<std::shared_ptr<Plan>>()>& make) {
  const auto number = attributes.get<std::int64_t>("plan");
  if (!number) return ffi::Unexpected(number.error());
  Plans& plans = ThePlans();
  std::lock_guard<std::mutex> lock(plans.mutex);
  const auto found = plans.plans.find(*number);
  if (found != plans.plans.end()) return found->second;
  auto plan = make();
  if (plan) plans.plans.emplace(*number, *plan);
  return plan;
}

void ForgetPlans(const Communicator& comm) {
  Plans& plans = ThePlans();
  std::lock_guard<std::mutex> lock(plans.mutex);
  for (auto it = plans.plans.begin(); it != plans.plans.end();) {
    it = it->second->comm.get() == &comm ? plans.plans.erase(it) : ++it;
  }
}

}  // namespace jfog::mpi
