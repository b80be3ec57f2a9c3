// The attributes of a call site that both backends share: mode and rounds.
#ifndef JFOG_XLA_OPS_COMMON_CALL_PLAN_H_
#define JFOG_XLA_OPS_COMMON_CALL_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

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

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_CALL_PLAN_H_
