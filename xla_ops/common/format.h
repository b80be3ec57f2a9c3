// Durations, ranks and leaves as text, equal on every backend.
#ifndef JFOG_XLA_OPS_COMMON_FORMAT_H_
#define JFOG_XLA_OPS_COMMON_FORMAT_H_

#include <chrono>
#include <cstddef>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace jfog {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration);

// "2.5 s".
std::string Format(Clock::duration duration);

// "rank 1", "ranks 1, 2"; "the other ranks" for an empty list.
std::string RankList(const std::vector<int>& ranks);

struct Shape {
  DataType type;
  std::size_t count;  // of elements
};

// "3 leaves, float32 x 1200, ..."
std::string Describe(const std::vector<Shape>& leaves);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_FORMAT_H_
