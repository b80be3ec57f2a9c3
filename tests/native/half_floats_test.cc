// 16-bit floats: every value, and rounding against a search for the nearest.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <random>

#include "common/dtype.h"

namespace jfog {
namespace {

// All finite values of a type that are not negative, with their bits.
template <typename T>
std::map<double, std::uint16_t> Values() {
  std::map<double, std::uint16_t> values;
  for (std::uint32_t bits = 0; bits < 0x8000u; ++bits) {
    T half;
    half.bits = static_cast<std::uint16_t>(bits);
    const double value = static_cast<float>(half);
    if (std::isfinite(value)) values[value] = half.bits;
  }
  return values;
}

// The bits of the nearest value, of two equally near ones the even one. Half a
// unit above the largest value is infinity.
template <typename T>
std::uint16_t Nearest(const std::map<double, std::uint16_t>& values, double x) {
  const auto above = values.lower_bound(x);
  if (above != values.end() && above->first == x) return above->second;
  const auto below = std::prev(above);
  if (above == values.end()) {
    const double unit = below->first - std::prev(below)->first;
    const bool rounds_up = x - below->first >= unit / 2;
    return static_cast<std::uint16_t>(below->second + (rounds_up ? 1 : 0));
  }
  const double down = x - below->first, up = above->first - x;
  if (down != up) return down < up ? below->second : above->second;
  return below->second % 2 == 0 ? below->second : above->second;
}

template <typename T>
void CheckRounding() {
  const auto values = Values<T>();
  std::mt19937 random(7);
  std::uniform_int_distribution<std::uint32_t> bits(0, 0x7f7fffffu);
  for (int i = 0; i < 200000; ++i) {
    const std::uint32_t wide = bits(random);
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    const std::uint16_t expected = Nearest<T>(values, x);
    REQUIRE(T(x).bits == expected);
    REQUIRE(T(-x).bits == (expected | 0x8000u));
  }
  // Midpoints between neighbors are ties.
  for (auto value = values.begin(); std::next(value) != values.end(); ++value) {
    const double middle = (value->first + std::next(value)->first) / 2;
    const float x = static_cast<float>(middle);
    if (x == middle) REQUIRE(T(x).bits == Nearest<T>(values, middle));
  }
}

template <typename T>
void CheckRoundTrip() {
  for (std::uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    T half;
    half.bits = static_cast<std::uint16_t>(bits);
    const float value = half;
    if (std::isnan(value)) {
      REQUIRE(std::isnan(static_cast<float>(T(value))));
    } else {
      REQUIRE(T(value).bits == half.bits);
    }
  }
}

}  // namespace

TEST_CASE("every 16-bit float survives a conversion to float32 and back") {
  CheckRoundTrip<Float16>();
  CheckRoundTrip<Bfloat16>();
}

TEST_CASE("float32 rounds to the nearest 16-bit float, ties to even") {
  CheckRounding<Float16>();
  CheckRounding<Bfloat16>();
}

TEST_CASE("infinity and NaN stay what they are") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(static_cast<float>(Float16(infinity)) == infinity);
  CHECK(static_cast<float>(Bfloat16(-infinity)) == -infinity);
  CHECK(std::isnan(static_cast<float>(Float16(std::nanf("")))));
  CHECK(std::isnan(static_cast<float>(Bfloat16(std::nanf("")))));
}

TEST_CASE("sizes and names of dtypes") {
  CHECK(SizeOf(DataType::BF16) == 2);
  CHECK(SizeOf(DataType::C128) == 16);
  CHECK(SizeOf(DataType::PRED) == 1);
  CHECK(SizeOf(DataType::TOKEN) == 0);
  CHECK(std::string(NameOf(DataType::BF16)) == "bfloat16");
  CHECK(std::string(NameOf(DataType::TOKEN)) == "?");
}

}  // namespace jfog
