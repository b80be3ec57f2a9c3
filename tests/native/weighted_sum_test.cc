// Weighted sums against sums in float64 and in exact integers.
#include "common/weighted_sum.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace jfog {
namespace {

// Lengths around those of vector registers, and one that is longer.
const std::size_t kLengths[] = {0, 1, 3, 7, 8, 17, 64, 1001};

template <typename T>
std::vector<T> Random(std::mt19937& random, std::size_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = T(normal(random));
  return values;
}

// Compares with `self_weight x + sum w x_j`, or `x + sum w (x_j - x)`.
template <typename T>
void CheckSum(DataType type, double tolerance) {
  std::mt19937 random(11);
  const std::vector<double> weights = {0.25, -0.5, 0.125};
  for (const bool difference : {false, true}) {
    for (const std::size_t count : kLengths) {
      const double self_weight = difference ? 1 - (0.25 - 0.5 + 0.125) : 0.75;
      const auto x = Random<T>(random, count);
      std::vector<std::vector<T>> others;
      std::vector<Term> terms;
      for (const double weight : weights) {
        others.push_back(Random<T>(random, count));
        terms.push_back({others.back().data(), weight});
      }
      std::vector<T> y(count), in_place = x;
      WeightedSum(type, count, x.data(), self_weight, terms, difference,
                  y.data());
      WeightedSum(type, count, in_place.data(), self_weight, terms, difference,
                  in_place.data());
      for (std::size_t i = 0; i < count; ++i) {
        double sum = self_weight * static_cast<double>(x[i]);
        for (std::size_t j = 0; j < others.size(); ++j) {
          sum += weights[j] * static_cast<double>(others[j][i]);
        }
        REQUIRE(std::abs(static_cast<double>(y[i]) - sum) <=
                tolerance * (1 + std::abs(sum)));
        REQUIRE(static_cast<double>(in_place[i]) == static_cast<double>(y[i]));
      }
    }
  }
}

}  // namespace

TEST_CASE("weighted sums of floats, out of place and in place") {
  CheckSum<double>(DataType::F64, 1e-14);
  CheckSum<float>(DataType::F32, 1e-6);
  CheckSum<Float16>(DataType::F16, 1e-3);
  CheckSum<Bfloat16>(DataType::BF16, 8e-3);
}

TEST_CASE("the difference form leaves equal values as they are") {
  std::mt19937 random(13);
  const auto x = Random<float>(random, 1001);
  std::vector<float> y(x.size());
  const std::vector<Term> terms = {{x.data(), 0.1}, {x.data(), 0.3}};
  WeightedSum(DataType::F32, x.size(), x.data(), 0.6, terms, true, y.data());
  CHECK(y == x);
}

TEST_CASE("a self weight of zero leaves no trace of the own value") {
  const std::vector<float> x = {std::nanf(""), INFINITY};
  const std::vector<float> other = {1.5f, -2.0f};
  std::vector<float> y(2);
  WeightedSum(DataType::F32, 2, x.data(), 0, {{other.data(), 1}}, false,
              y.data());
  CHECK(y == other);
}

TEST_CASE("integers add modulo their width") {
  const std::vector<std::int8_t> x = {100, -100, 5}, other = {100, -100, -7};
  std::vector<std::int8_t> y(3);
  WeightedSum(DataType::S8, 3, x.data(), 1, {{other.data(), 1}}, false,
              y.data());
  CHECK(y == std::vector<std::int8_t>{-56, 56, -2});
}

TEST_CASE("dtypes with a weighted sum, and with a sum") {
  CHECK(HasWeightedSum(DataType::C64));
  CHECK_FALSE(HasWeightedSum(DataType::S32));
  CHECK(HasSum(DataType::S32));
  CHECK_FALSE(HasSum(DataType::PRED));
}

}  // namespace jfog
