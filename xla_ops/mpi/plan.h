// The FFI state of the calls that exchange along a graph.
#ifndef JFOG_XLA_OPS_MPI_PLAN_H_
#define JFOG_XLA_OPS_MPI_PLAN_H_

#include <atomic>
#include <cstdint>

#include "common/call_plan.h"
#include "common/status.h"
#include "mpi/communicator.h"

namespace jfog::mpi {

using State = CallPlan<Communicator>;

struct Plan : State {
  std::int64_t graph = 0;  // hash; 0: ranks do not share a graph

  // An error, if the communicator is not ready for work.
  ffi::Error Check(const char* name) const {
    return CheckReady(comm.get(), name);
  }
  // The round of a step, which comes from the program modulo the period.
  ffi::ErrorOr<const Round*> At(std::int64_t step) const {
    return FindRound(rounds, step);
  }
  // Starts the comparison of graphs between all ranks, once for each graph of a
  // communicator. Called in program order, which is equal on all ranks, and not
  // where the plan is made: ranks may compile in different orders.
  void Agree();

 protected:
  // Reads the common part: the communicator, the mode and the rounds. A
  // communicator that was shut down is refused in the call, as in programs that
  // were compiled before.
  ffi::Error ReadCommon(const ffi::Dictionary& attributes, const char* name);

 private:
  std::atomic<bool> agreed_{false};
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_PLAN_H_
