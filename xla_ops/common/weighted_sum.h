// The arithmetic of mixing: a weighted sum of one's own and received values.
#ifndef JFOG_XLA_OPS_COMMON_WEIGHTED_SUM_H_
#define JFOG_XLA_OPS_COMMON_WEIGHTED_SUM_H_

#include <cstddef>
#include <vector>

#include "common/dtype.h"

namespace jfog {

struct Term {
  const void* values;
  double weight;
};

// Writes to y, which may be x itself,
//
//   difference:  y = x + sum_j w_j (x_j - x)     (weights that sum to 1)
//   otherwise:   y = self_weight x + sum_j w_j x_j
//
// over `count` elements, self first and then the terms in their order. Weights
// are rounded once to the type that accumulates: float32 for float32 and the
// 16-bit floats, float64 for float64 and complex128, and so on; those of
// integers are whole. A self weight of zero leaves x out, so that a pure move
// returns the sender's bits.
void WeightedSum(DataType type, std::size_t count, const void* x,
                 double self_weight, const std::vector<Term>& terms,
                 bool difference, void* y);

// Divides the elements of y, of a type with a weighted sum and at least 32
// bits.
void Divide(DataType type, std::size_t count, double by, void* y);

// The instructions of these sums: "AVX2" or "baseline".
const char* WeightedSumKernel();

// False for a type without fractions (integers, bool).
bool HasWeightedSum(DataType type);

// Whether sums with whole weights have a meaning (not for bool).
bool HasSum(DataType type);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_WEIGHTED_SUM_H_
