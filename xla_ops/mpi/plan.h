// Decoded attributes of equal calls, cached for the process.
#ifndef JFOG_XLA_OPS_MPI_PLAN_H_
#define JFOG_XLA_OPS_MPI_PLAN_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "common/call_plan.h"
#include "common/status.h"
#include "mpi/communicator.h"

namespace jfog::mpi {

struct Plan {
  virtual ~Plan() = default;

  std::shared_ptr<Communicator> comm;
  std::int64_t mode = 0;
  std::int64_t graph = 0;  // hash; 0: ranks do not share a graph
  std::vector<Round> rounds;
  std::atomic<bool> agreed{false};

  // Starts the comparison of graphs between all ranks, once.
  void Agree();
  // The round of a step, which comes from the program modulo the period.
  ffi::ErrorOr<const Round*> At(std::int64_t step) const {
    return FindRound(rounds, step);
  }
};

// Fills in the plan's common part: the communicator and the rounds.
ffi::Error ReadPlan(const ffi::Dictionary& attributes, const char* name,
                    Plan* plan);

// The plan of a call, by the hash in its attributes; `make` decodes it the
// first time.
ffi::ErrorOr<std::shared_ptr<Plan>> FindPlan(
    const ffi::Dictionary& attributes,
    const std::function<ffi::ErrorOr<std::shared_ptr<Plan>>()>& make);

// Drops the plans of a communicator.
void ForgetPlans(const Communicator& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PLAN_H_
