// The arithmetic of mixing: a weighted sum of one's own and received values.
#include "common/weighted_sum.h"

#include <algorithm>
#include <complex>
#include <cstdint>
#include <type_traits>

namespace jfog {
namespace {

// One block's accumulators stay in the first-level cache while the terms pass.
constexpr std::size_t kBlock = 1024;
// Up to this many terms are added in one pass.
constexpr std::size_t kFused = 4;

// Integer weights are whole.
template <typename R>
R Rounded(double weight) {
  if constexpr (std::is_integral_v<R>) {
    return static_cast<R>(static_cast<std::int64_t>(weight));
  }
  return static_cast<R>(weight);
}

// T is stored, A accumulates, R is the type of a weight. Every form adds the
// same numbers in the same order, so the bits do not depend on the form.
template <typename T, typename A, typename R, std::size_t N, bool kDifference>
inline __attribute__((always_inline)) void SumLoop(
    std::size_t count, const T* x, R self, const std::vector<Term>& terms,
    T* y) {
  const T* values[N + 1] = {};
  R weights[N + 1] = {};
  for (std::size_t t = 0; t < N; ++t) {
    values[t] = static_cast<const T*>(terms[t].values);
    weights[t] = Rounded<R>(terms[t].weight);
  }
  // An element of y depends on no other element than its own of x.
#pragma GCC ivdep
  for (std::size_t k = 0; k < count; ++k) {
    const A own = static_cast<A>(x[k]);
    A sum = kDifference ? own : self * own;
    for (std::size_t t = 0; t < N; ++t) {
      const A value = static_cast<A>(values[t][k]);
      sum += weights[t] * (kDifference ? value - own : value);
    }
    y[k] = static_cast<T>(sum);
  }
}

#if defined(__x86_64__)
// Wider registers, and the same bits: there is no fused multiplication in it.
template <typename T, typename A, typename R, std::size_t N, bool kDifference>
__attribute__((target("avx2"))) void SumLoopAvx2(std::size_t count, const T* x,
                                                 R self,
                                                 const std::vector<Term>& terms,
                                                 T* y) {
  SumLoop<T, A, R, N, kDifference>(count, x, self, terms, y);
}

bool HasAvx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}
#endif

template <typename T, typename A, typename R, std::size_t N, bool kDifference>
void SumFused(std::size_t count, const T* x, R self,
              const std::vector<Term>& terms, T* y) {
#if defined(__x86_64__)
  if (HasAvx2()) {
    return SumLoopAvx2<T, A, R, N, kDifference>(count, x, self, terms, y);
  }
#endif
  SumLoop<T, A, R, N, kDifference>(count, x, self, terms, y);
}

template <typename T, typename A, typename R>
void SumBlocks(std::size_t count, const T* x, R self,
               const std::vector<Term>& terms, bool difference, T* y) {
  A own[kBlock];
  A sum[kBlock];
  for (std::size_t start = 0; start < count; start += kBlock) {
    const std::size_t n = std::min(kBlock, count - start);
    for (std::size_t k = 0; k < n; ++k) own[k] = static_cast<A>(x[start + k]);
    std::size_t first = 0;
    if (difference) {
      std::copy_n(own, n, sum);
    } else if (self == R(0) && !terms.empty()) {
      const T* values = static_cast<const T*>(terms[0].values) + start;
      const R weight = Rounded<R>(terms[0].weight);
      for (std::size_t k = 0; k < n; ++k) {
        sum[k] = weight * static_cast<A>(values[k]);
      }
      first = 1;
    } else {
      for (std::size_t k = 0; k < n; ++k) sum[k] = self * own[k];
    }
    for (std::size_t t = first; t < terms.size(); ++t) {
      const T* values = static_cast<const T*>(terms[t].values) + start;
      const R weight = Rounded<R>(terms[t].weight);
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

template <typename T, typename A, typename R, std::size_t N = 0>
void Sum(std::size_t count, const void* x, double self_weight,
         const std::vector<Term>& terms, bool difference, void* y) {
  const T* in = static_cast<const T*>(x);
  T* out = static_cast<T*>(y);
  const R self = Rounded<R>(self_weight);
  if constexpr (N <= kFused) {
    if (terms.size() != N) {
      return Sum<T, A, R, N + 1>(count, x, self_weight, terms, difference, y);
    }
    if (difference)
      return SumFused<T, A, R, N, true>(count, in, self, terms, out);
    if (self != R(0) || N == 0) {
      return SumFused<T, A, R, N, false>(count, in, self, terms, out);
    }
  }
  SumBlocks<T, A, R>(count, in, self, terms, difference, out);
}

}  // namespace

void WeightedSum(DataType type, std::size_t count, const void* x,
                 double self_weight, const std::vector<Term>& terms,
                 bool difference, void* y) {
  switch (type) {
#define JFOG_SUM(dtype, name, stored, accumulated, weight, ...)           \
  case DataType::dtype:                                                   \
    return Sum<stored, accumulated, weight>(count, x, self_weight, terms, \
                                            difference, y);
    JFOG_FOR_EACH_SUMMABLE_DTYPE(JFOG_SUM)
#undef JFOG_SUM
    default:
      return;
  }
}

void Divide(DataType type, std::size_t count, double by, void* y) {
  const auto run = [&](auto* values, std::size_t numbers) {
    const auto divisor = static_cast<std::decay_t<decltype(*values)>>(by);
    for (std::size_t k = 0; k < numbers; ++k) values[k] /= divisor;
  };
  // A complex number over a real one is two real divisions.
  switch (type) {
    case DataType::F32:
      return run(static_cast<float*>(y), count);
    case DataType::F64:
      return run(static_cast<double*>(y), count);
    case DataType::C64:
      return run(static_cast<float*>(y), 2 * count);
    case DataType::C128:
      return run(static_cast<double*>(y), 2 * count);
    default:
      return;
  }
}

bool HasSum(DataType type) {
  return HasWeightedSum(type) || (type != DataType::PRED && SizeOf(type) > 0);
}

const char* WeightedSumKernel() {
#if defined(__x86_64__)
  if (HasAvx2()) return "AVX2";
#endif
  return "baseline";
}

bool HasWeightedSum(DataType type) {
  switch (type) {
#define JFOG_HAS_FRACTIONS(dtype, name, stored, accumulated, weight, ...) \
  case DataType::dtype:                                                   \
    return !std::is_integral_v<stored>;
    JFOG_FOR_EACH_SUMMABLE_DTYPE(JFOG_HAS_FRACTIONS)
#undef JFOG_HAS_FRACTIONS
    default:
      return false;
  }
}

}  // namespace jfog
