// The arithmetic of NCCL's reductions.
#include "reduction.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace jfog::emulation {
namespace {

// Sixteen bits that stand for a float, and round after each operation.
struct Bfloat16 {
  std::uint16_t bits;

  explicit Bfloat16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    if (std::isnan(value)) {
      bits = static_cast<std::uint16_t>((wide >> 16) | 0x40);
    } else {
      bits = static_cast<std::uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >>
                                        16);
    }
  }
  explicit operator float() const {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

struct Float16 {
  std::uint16_t bits;

  explicit Float16(float value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) {
      bits = sign | 0x7e00;
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else if (size < 0x1p-14f) {  // in units of 2^-24
      bits = sign | static_cast<std::uint16_t>(std::nearbyint(size * 0x1p24f));
    } else {
      int exponent;
      const float mantissa = std::frexp(size, &exponent);  // in [0.5, 1)
      // Rounding up to 2048 carries into the exponent, as it should.
      const int units = static_cast<int>(std::nearbyint(mantissa * 2048));
      bits = sign | static_cast<std::uint16_t>(((exponent + 14) << 10) +
                                               (units - 1024));
    }
  }
  explicit operator float() const {
    const int exponent = (bits >> 10) & 31;
    const int mantissa = bits & 1023;
    float size;
    if (exponent == 31) {
      size = mantissa ? NAN : INFINITY;
    } else if (exponent == 0) {
      size = std::ldexp(static_cast<float>(mantissa), -24);
    } else {
      size = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    }
    return bits & 0x8000 ? -size : size;
  }
};

// The type in which one operation is carried out.
template <typename T>
struct Wide {
  using Type = T;
};
template <>
struct Wide<Bfloat16> {
  using Type = float;
};
template <>
struct Wide<Float16> {
  using Type = float;
};

template <typename T>
T Combine(nccl::ReductionKind kind, T a, T b) {
  using W = typename Wide<T>::Type;
  const W x = static_cast<W>(a);
  const W y = static_cast<W>(b);
  if constexpr (std::is_floating_point_v<W>) {
    switch (kind) {
      case nccl::kProd:
        return static_cast<T>(x * y);
      case nccl::kMax:
        return static_cast<T>(std::fmax(x, y));
      case nccl::kMin:
        return static_cast<T>(std::fmin(x, y));
      default:
        return static_cast<T>(x + y);
    }
  } else {
    using U = std::make_unsigned_t<W>;  // which wraps around
    switch (kind) {
      case nccl::kProd:
        return static_cast<T>(std::uint64_t{static_cast<U>(x)} *
                              std::uint64_t{static_cast<U>(y)});
      case nccl::kMax:
        return x > y ? x : y;
      case nccl::kMin:
        return x < y ? x : y;
      default:
        return static_cast<T>(std::uint64_t{static_cast<U>(x)} +
                              std::uint64_t{static_cast<U>(y)});
    }
  }
}

// One input's part in the result: a mean of floats is a sum of shares, rounded.
template <typename T>
T Share(nccl::ReductionKind kind, T value, std::size_t ranks) {
  using W = typename Wide<T>::Type;
  if constexpr (std::is_floating_point_v<W>) {
    if (kind == nccl::kAvg) {
      const T share = static_cast<T>(W{1} / static_cast<W>(ranks));
      return static_cast<T>(static_cast<W>(value) * static_cast<W>(share));
    }
  }
  return value;
}

template <typename T>
void ReduceAs(nccl::ReductionKind kind, std::size_t count,
              const std::vector<const char*>& inputs, char* result) {
  using W = typename Wide<T>::Type;
  const std::size_t ranks = inputs.size();
  const auto read = [&](std::size_t rank, std::size_t i) {
    alignas(T) char bytes[sizeof(T)];
    std::memcpy(bytes, inputs[rank] + i * sizeof(T), sizeof(T));
    return Share(kind, *reinterpret_cast<const T*>(bytes), ranks);
  };
  for (std::size_t i = 0; i < count; ++i) {
    T value = read(0, i);
    for (std::size_t rank = 1; rank < ranks; ++rank)
      value = Combine(kind, value, read(rank, i));
    if constexpr (!std::is_floating_point_v<W>) {
      // A mean of integers is the sum, divided towards zero.
      if (kind == nccl::kAvg)
        value = static_cast<T>(value / static_cast<T>(ranks));
    }
    std::memcpy(result + i * sizeof(T), &value, sizeof(T));
  }
}

}  // namespace

std::size_t SizeOf(nccl::ElementType type) {
  switch (type) {
    case nccl::kInt8:
    case nccl::kUint8:
      return 1;
    case nccl::kFloat16:
    case nccl::kBfloat16:
      return 2;
    case nccl::kInt32:
    case nccl::kUint32:
    case nccl::kFloat32:
      return 4;
    case nccl::kInt64:
    case nccl::kUint64:
    case nccl::kFloat64:
      return 8;
  }
  return 0;
}

void Reduce(nccl::ElementType type, nccl::ReductionKind kind, std::size_t count,
            const std::vector<const char*>& inputs, char* result) {
  switch (type) {
    case nccl::kInt8:
      return ReduceAs<std::int8_t>(kind, count, inputs, result);
    case nccl::kUint8:
      return ReduceAs<std::uint8_t>(kind, count, inputs, result);
    case nccl::kInt32:
      return ReduceAs<std::int32_t>(kind, count, inputs, result);
    case nccl::kUint32:
      return ReduceAs<std::uint32_t>(kind, count, inputs, result);
    case nccl::kInt64:
      return ReduceAs<std::int64_t>(kind, count, inputs, result);
    case nccl::kUint64:
      return ReduceAs<std::uint64_t>(kind, count, inputs, result);
    case nccl::kFloat16:
      return ReduceAs<Float16>(kind, count, inputs, result);
    case nccl::kFloat32:
      return ReduceAs<float>(kind, count, inputs, result);
    case nccl::kFloat64:
      return ReduceAs<double>(kind, count, inputs, result);
    case nccl::kBfloat16:
      return ReduceAs<Bfloat16>(kind, count, inputs, result);
  }
}

}  // namespace jfog::emulation
