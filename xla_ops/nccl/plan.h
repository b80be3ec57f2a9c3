// What a call site's attributes say, read once when its program is made.
#ifndef JFOG_XLA_OPS_NCCL_PLAN_H_
#define JFOG_XLA_OPS_NCCL_PLAN_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "nccl/communicator.h"

namespace jfog::nccl {

// What a handler does with its operation.
enum Mode : std::int64_t {
  kWhole = 0,  // its results are those of the call
  kStart = 1,  // the result is a handle, a number to wait for the operation by
};

// The state of a call site. It keeps the communicators alive that a program
// uses, though closed ones refuse its calls.
struct Plan {
  static ffi::TypeId id;

  virtual ~Plan() = default;

  std::shared_ptr<Communicator> comm;
  std::int64_t mode = kWhole;
  std::string operation;
  std::uint64_t variant = 0;
  std::uint64_t signature = 0;  // of the program's leaves, before any packing
  // Of each received buffer; in a start nothing else says it.
  std::vector<std::int64_t> received_bytes;
  // XLA passes it from one thread to another, and ThreadSanitizer knows nothing
  // of how.
  std::atomic<bool> is_made{false};
};

// The state of a call, as what it was made as.
template <typename P>
const P& As(const Plan& state) {
  state.is_made.load(std::memory_order_acquire);
  return static_cast<const P&>(state);
}

// Whom this rank exchanges with in one round of a graph.
struct Round {
  std::vector<int> sources;
  std::vector<int> destinations;
};

struct ExchangePlan : Plan {
  std::vector<Round> rounds;
  bool selects = false;  // whether the program names the ranks, not the table
  bool apart = false;    // whether every destination gets a slice of its own
  std::int64_t source_count = 0;
  // Elements by leaf and rank; empty where all slices are alike.
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
  // Null where it has one rank.
  std::shared_ptr<Communicator> local;
  std::shared_ptr<Communicator> machines;
  std::vector<Round> rounds;  // of machines
  std::int64_t slots = 0;
};

// The communicator of an attribute, ready for work.
ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const std::string& name);

// The round that a selector's value names.
ffi::ErrorOr<const Round*> FindRound(const std::vector<Round>& rounds,
                                     std::int64_t step);

XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeExchange);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeCollective);
XLA_FFI_DECLARE_HANDLER_SYMBOL(NcclMakeHierarchical);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_PLAN_H_
