// Attributes of a call site, decoded once when its program is compiled.
#ifndef JFOG_XLA_OPS_NCCL_PLAN_H_
#define JFOG_XLA_OPS_NCCL_PLAN_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/call_plan.h"
#include "common/status.h"
#include "nccl/communicator.h"

namespace jfog::nccl {

using State = CallPlan<Communicator>;

struct Plan : State {
  std::string operation;
  std::uint64_t variant = 0;
  std::uint64_t signature = 0;  // of the program's leaves, before any packing
  // Of each received buffer; a start has no results to read it from.
  std::vector<std::int64_t> received_bytes;

 protected:
  // Reads the common part, except for the rounds. A communicator that is not
  // ready for work fails the compilation.
  ffi::Error ReadCommon(const ffi::Dictionary& attributes);
};

struct ExchangePlan : Plan {
  bool selects = false;  // ranks come from an operand, not from `rounds`
  bool apart = false;    // every destination gets a slice of its own
  std::int64_t source_count = 0;
  // Elements by leaf and rank; empty if all slices are equal.
  std::vector<std::int64_t> send_counts;
  std::vector<std::int64_t> receive_counts;
  std::int64_t send_slots = 1;
  std::int64_t slots = 1;

  ffi::Error Read(const ffi::Dictionary& attributes);
};

struct CollectivePlan : Plan {
  std::vector<std::int64_t> reductions;
  std::int64_t root = 0;

  ffi::Error Read(const ffi::Dictionary& attributes);
};

// Its rounds are those of machines.
struct HierarchicalPlan : Plan {
  // Null if it has one rank.
  std::shared_ptr<Communicator> local;
  std::shared_ptr<Communicator> machines;
  std::int64_t slots = 0;

  ffi::Error Read(const ffi::Dictionary& attributes);
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_PLAN_H_
