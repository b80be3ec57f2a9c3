// Decoded attributes of equal calls, cached for the process.
#include "mpi/plan.h"

#include <mutex>
#include <unordered_map>
#include <utility>

#include "mpi/consistency_check.h"
#include "mpi/launch.h"

namespace jfog::mpi {
namespace {

// By the hash of the attributes, which Python computes when it lowers a call.
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

ffi::Error ReadPlan(const ffi::Dictionary& attributes, const char* name,
                    Plan* plan) {
  const auto context = attributes.get<std::int64_t>("context");
  const auto mode = attributes.get<std::int64_t>("mode");
  const auto graph = attributes.get<std::int64_t>("graph");
  if (!(context && mode && graph)) return LacksAttributes(name);
  JFOG_ASSIGN_OR_RETURN(comm, Ready(*context, name));
  plan->comm = comm;
  plan->mode = *mode;
  plan->graph = *graph;
  return ReadRounds(attributes, name, /*has_weights=*/true, &plan->rounds);
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
