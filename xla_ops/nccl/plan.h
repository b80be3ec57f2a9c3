// Attributes of a call site, decoded once when its program is compiled.
#ifndef JFOG_XLA_OPS_NCCL_PLAN_H_
#define JFOG_XLA_OPS_NCCL_PLAN_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/call_plan.h"
#include "common/status.h"
#include "nccl/communicator.h"

namespace jfog::nccl {

// The FFI state of a call site. It keeps the communicators of a program alive;
// closed ones refuse its calls.
struct Plan {
  static ffi::TypeId id;

  virtual ~Plan() = default;

  std::shared_ptr<Communicator> comm;
  std::int64_t mode = kWhole;
  std::string operation;
  std::uint64_t variant = 0;
  std::uint64_t signature = 0;  // of the program's leaves, before any packing
  // Of each received buffer; a start has no results to read it from.
  std::vector<std::int64_t> received_bytes;
  // XLA passes it from one thread to another by means that ThreadSanitizer does
  // not see.
  std::atomic<bool> is_made{false};
};

// The state of a call, as the type that it was made as.
template <typename P>
const P& As(const Plan& state) {
  state.is_made.load(std::memory_order_acquire);
  return static_cast<const P&>(state);
}

struct ExchangePlan : Plan {
  std::vector<Round> rounds;
  bool selects = false;  // ranks come from an operand, not from `rounds`
  bool apart = false;    // every destination gets a slice of its own
  std::int64_t source_count = 0;
  // Elements by leaf and rank; empty if all slices are equal.
  std::vector<std::int64_t> send_counts;
  std::vector<std::int64_t> receive_counts;
  std::int64_t send_slots = 1;
  std::int64_t slots = 1;
};

struct CollectivePlan : Plan {
  std::vector<std::int64_t> reductions;
  std::int64_t root = 0;
};

struct HierarchicalPlan : Plan {
  // Null if it has one rank.
  std::shared_ptr<Communicator> local;
  std::shared_ptr<Communicator> machines;
  std::vector<Round> rounds;  // of machines
  std::int64_t slots = 0;
};

// The communicator of an attribute, ready for work.
ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const std::string& name);

// Decodes the attributes of a call site.
using MadePlan = ffi::ErrorOr<std::unique_ptr<Plan>>;
MadePlan MakeExchangePlan(ffi::Dictionary attributes);
MadePlan MakeCollectivePlan(ffi::Dictionary attributes);
MadePlan MakeHierarchicalPlan(ffi::Dictionary attributes);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_PLAN_H_
