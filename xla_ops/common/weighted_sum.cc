// The arithmetic of mixing: a weighted sum of one's own and received values.
#include "common/weighted_sum.h"

#include <algorithm>
#include <complex>

namespace jfog {
namespace {

// One block's accumulators stay in the first-level cache while the terms pass.
constexpr std::size_t kBlock = 1024;

// T is stored, A accumulates, R is the type of a weight.
template <typename T, typename A, typename R>
void Sum(std::size_t count, const T* x, double self_weight,
         const std::vector<Term>& terms, bool difference, T* y) {
  A own[kBlock];
  A sum[kBlock];
  const R self = static_cast<R>(self_weight);
  for (std::size_t start = 0; start < count; start += kBlock) {
    const std::size_t n = std::min(kBlock, count - start);
    for (std::size_t k = 0; k < n; ++k) own[k] = static_cast<A>(x[start + k]);
    std::size_t first = 0;
    if (difference) {
      std::copy_n(own, n, sum);
    } else if (self_weight == 0 && !terms.empty()) {
      const T* values = static_cast<const T*>(terms[0].values) + start;
      const R weight = static_cast<R>(terms[0].weight);
      for (std::size_t k = 0; k < n; ++k) {
        sum[k] = weight * static_cast<A>(values[k]);
      }
      first = 1;
    } else {
      for (std::size_t k = 0; k < n; ++k) sum[k] = self * own[k];
    }
    for (std::size_t t = first; t < terms.size(); ++t) {
      const T* values = static_cast<const T*>(terms[t].values) + start;
      const R weight = static_cast<R>(terms[t].weight);
      if (difference) {
        for (std::size_t k = 0; k < n; ++k) {
          sum[k] += weight * (static_cast<A>(values[k]) - own[k]);
        }
      } else {
        for (std::size_t k = 0; k < n; ++k) {
          sum[k] += weight * static_cast<A>(values[k]);
        }
      }
    }
    for (std::size_t k = 0; k < n; ++k) y[start + k] = static_cast<T>(sum[k]);
  }
}

template <typename T, typename A, typename R>
bool Run(std::size_t count, const void* x, double self_weight,
         const std::vector<Term>& terms, bool difference, void* y) {
  Sum<T, A, R>(count, static_cast<const T*>(x), self_weight, terms, difference,
               static_cast<T*>(y));
  return true;
}

}  // namespace

bool WeightedSum(DataType type, std::size_t count, const void* x,
                 double self_weight, const std::vector<Term>& terms,
                 bool difference, void* y) {
  switch (type) {
    case DataType::F32:
      return Run<float, float, float>(count, x, self_weight, terms, difference,
                                      y);
    case DataType::F64:
      return Run<double, double, double>(count, x, self_weight, terms,
                                         difference, y);
    case DataType::BF16:
      return Run<Bfloat16, float, float>(count, x, self_weight, terms,
                                         difference, y);
    case DataType::F16:
      return Run<Float16, float, float>(count, x, self_weight, terms,
                                        difference, y);
    case DataType::C64:
      return Run<std::complex<float>, std::complex<float>, float>(
          count, x, self_weight, terms, difference, y);
    case DataType::C128:
      return Run<std::complex<double>, std::complex<double>, double>(
          count, x, self_weight, terms, difference, y);
    default:
      return false;
  }
}

}  // namespace jfog
