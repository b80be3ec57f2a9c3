// What the calls with equal attributes have in common, read once.
#ifndef JFOG_XLA_OPS_MPI_PLAN_H_
#define JFOG_XLA_OPS_MPI_PLAN_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "common/status.h"
#include "mpi/communicator.h"

namespace jfog::mpi {

// What one rank does in one round of a graph.
struct Round {
  std::vector<int> sources;
  std::vector<double> source_weights;
  std::vector<int> destinations;
  std::vector<double> destination_weights;  // empty where the receivers weight
  double self_weight = 1;
  bool difference = false;
};

struct Plan {
  virtual ~Plan() = default;

  std::shared_ptr<Communicator> comm;
  std::int64_t mode = 0;
  std::int64_t graph = 0;  // tells graphs apart; 0: ranks have none in common
  std::vector<Round> rounds;
  std::atomic<bool> agreed{false};

  // Lets all ranks compare their graphs, the first time.
  void Agree();
  // The round of a step, which comes from the program modulo the period.
  ffi::ErrorOr<const Round*> At(std::int64_t step) const;
};

// Fills in the plan's common part: the communicator and the rounds.
ffi::Error ReadPlan(const ffi::Dictionary& attributes, const char* name,
                    Plan* plan);

// The plan of attributes that carry its number, made by `make` the first time.
ffi::ErrorOr<std::shared_ptr<Plan>> FindPlan(
    const ffi::Dictionary& attributes,
    const std::function<ffi::ErrorOr<std::shared_ptr<Plan>>()>& make);

// Drops what is kept for calls on a communicator.
void ForgetPlans(const Communicator& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PLAN_H_
