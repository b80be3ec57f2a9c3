// The FFI state of a call site: its attributes, decoded when its program is
// compiled.
#ifndef JFOG_XLA_OPS_COMMON_CALL_PLAN_H_
#define JFOG_XLA_OPS_COMMON_CALL_PLAN_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/failure.h"
#include "common/registry.h"
#include "common/status.h"

namespace jfog {

// Blocking or split.
enum Mode : std::int64_t {
  kWhole = 0,  // the results are those of the operation
  kStart = 1,  // the result is a handle to wait on
};

// The exchange of one rank in one round of a graph.
struct Round {
  std::vector<int> sources;
  std::vector<double> source_weights;  // empty if the caller weights
  std::vector<int> destinations;
  std::vector<double> destination_weights;  // empty if the receivers weight
  double self_weight = 1;
  bool difference = false;
};

// Reads all rounds of a graph. Weights are optional on NCCL, where XLA
// computes the weighted sum.
ffi::Error ReadRounds(const ffi::Dictionary& attributes,
                      const std::string& name, bool has_weights,
                      std::vector<Round>* rounds);

// The round of a step, which the program takes modulo the period.
ffi::ErrorOr<const Round*> FindRound(const std::vector<Round>& rounds,
                                     std::int64_t step);

ffi::Error LacksAttributes(const std::string& name);

// The communicator of an attribute, ready for work.
template <typename Comm>
ffi::ErrorOr<std::shared_ptr<Comm>> Ready(Registry<Comm>& comms,
                                          std::int64_t context,
                                          const char* name) {
  if (IsForked()) return ffi::Unexpected(ForkedError(name));
  std::shared_ptr<Comm> comm = comms.Find(context);
  JFOG_RETURN_IF_ERROR(CheckReady(comm.get(), name));
  return comm;
}

// The common part of all plans, and the type of the FFI state of both backends.
// A plan lives as long as the program of its call site. It keeps the
// communicator alive, which refuses the program's calls once it is closed.
template <typename Comm>
struct CallPlan {
  using State = CallPlan;
  inline static ffi::TypeId id = {};

  virtual ~CallPlan() = default;

  std::shared_ptr<Comm> comm;
  std::int64_t mode = kWhole;
  std::vector<Round> rounds;  // empty without a graph
  // XLA passes it from one thread to another by means that ThreadSanitizer does
  // not see.
  std::atomic<bool> is_made{false};
};

// Handler of the instantiate stage: decodes the attributes with `P::Read`.
template <typename P>
ffi::ErrorOr<std::unique_ptr<typename P::State>> MakePlan(
    ffi::Dictionary attributes) {
  auto plan = std::make_unique<P>();
  ffi::Error error = plan->Read(attributes);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  plan->is_made.store(true, std::memory_order_release);
  return std::unique_ptr<typename P::State>(std::move(plan));
}

// The state of a call, as the type that it was made as.
template <typename P>
P& As(typename P::State* state) {
  state->is_made.load(std::memory_order_acquire);
  return static_cast<P&>(*state);
}

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_CALL_PLAN_H_
