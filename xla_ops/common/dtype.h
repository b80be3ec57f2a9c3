// Element types: their sizes and names, and the 16-bit floats.
#ifndef JFOG_XLA_OPS_COMMON_DTYPE_H_
#define JFOG_XLA_OPS_COMMON_DTYPE_H_

#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace jfog {

using DataType = xla::ffi::DataType;

// Bytes of one element, 0 for a type that jfog does not move.
std::size_t SizeOf(DataType type);

// The NumPy name, "?" for a type that jfog does not move.
const char* NameOf(DataType type);

// The two 16-bit floats, held as bits; arithmetic happens in float32. Both
// conversions round to nearest, ties to even, and keep NaN a NaN.
struct Bfloat16 {
  std::uint16_t bits;

  Bfloat16() = default;
  explicit Bfloat16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    if ((wide & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<std::uint16_t>((wide >> 16) | 0x40u);
    } else {
      wide += 0x7fffu + ((wide >> 16) & 1u);
      bits = static_cast<std::uint16_t>(wide >> 16);
    }
  }
  operator float() const {
    std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

struct Float16 {
  std::uint16_t bits;

  Float16() = default;
  explicit Float16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    const std::uint16_t sign =
        static_cast<std::uint16_t>((wide >> 16) & 0x8000u);
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) {
      bits = sign | 0x7e00u;
    } else if (wide >= 0x477ff000u) {  // 65520 and above round to infinity
      bits = sign | 0x7c00u;
    } else if (wide < 0x38800000u) {  // below 2^-14: subnormal or zero
      // Adding 0.5 aligns the mantissa so that its last bit counts 2^-24.
      float magnitude;
      std::memcpy(&magnitude, &wide, sizeof(magnitude));
      magnitude += 0.5f;
      std::memcpy(&wide, &magnitude, sizeof(wide));
      bits = static_cast<std::uint16_t>(sign | (wide - 0x3f000000u));
    } else {
      wide += 0xc8000fffu + ((wide >> 13) & 1u);  // rebias by -112, then round
      bits = static_cast<std::uint16_t>(sign | (wide >> 13));
    }
  }
  operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7fffu;
    std::uint32_t wide;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
      wide = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= 0x400u) {
      wide = (magnitude << 13) + 0x38000000u;
    } else {  // subnormal: the mantissa counts 2^-24
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      std::memcpy(&wide, &value, sizeof(wide));
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// All types that jfog moves, one X(dtype, NumPy name, type as stored, type that
// accumulates a weighted sum, type of a weight, MPI's name, NCCL's name) each.
// Integers accumulate modulo 2^64, of which every integer type keeps its low
// bits; the accumulating type and the weight of bool are unused. The last two
// columns are names of mpi.h and nccl/api.h, for users that include those.
#define JFOG_FOR_EACH_SUMMABLE_DTYPE(X)                                       \
  X(S8, "int8", std::int8_t, std::uint64_t, std::uint64_t, MPI_INT8_T, kInt8) \
  X(S16, "int16", std::int16_t, std::uint64_t, std::uint64_t, MPI_INT16_T,    \
    kNoElementType)                                                           \
  X(S32, "int32", std::int32_t, std::uint64_t, std::uint64_t, MPI_INT32_T,    \
    kInt32)                                                                   \
  X(S64, "int64", std::int64_t, std::uint64_t, std::uint64_t, MPI_INT64_T,    \
    kInt64)                                                                   \
  X(U8, "uint8", std::uint8_t, std::uint64_t, std::uint64_t, MPI_UINT8_T,     \
    kUint8)                                                                   \
  X(U16, "uint16", std::uint16_t, std::uint64_t, std::uint64_t, MPI_UINT16_T, \
    kNoElementType)                                                           \
  X(U32, "uint32", std::uint32_t, std::uint64_t, std::uint64_t, MPI_UINT32_T, \
    kUint32)                                                                  \
  X(U64, "uint64", std::uint64_t, std::uint64_t, std::uint64_t, MPI_UINT64_T, \
    kUint64)                                                                  \
  X(F16, "float16", Float16, float, float, MPI_DATATYPE_NULL, kFloat16)       \
  X(BF16, "bfloat16", Bfloat16, float, float, MPI_DATATYPE_NULL, kBfloat16)   \
  X(F32, "float32", float, float, float, MPI_FLOAT, kFloat32)                 \
  X(F64, "float64", double, double, double, MPI_DOUBLE, kFloat64)             \
  X(C64, "complex64", std::complex<float>, std::complex<float>, float,        \
    MPI_C_FLOAT_COMPLEX, kNoElementType)                                      \
  X(C128, "complex128", std::complex<double>, std::complex<double>, double,   \
    MPI_C_DOUBLE_COMPLEX, kNoElementType)
#define JFOG_FOR_EACH_DTYPE(X)                                          \
  X(PRED, "bool", std::uint8_t, std::uint8_t, std::uint8_t, MPI_C_BOOL, \
    kNoElementType)                                                     \
  JFOG_FOR_EACH_SUMMABLE_DTYPE(X)

#define JFOG_DTYPE(dtype, ...) DataType::dtype,
inline constexpr DataType kDtypes[] = {JFOG_FOR_EACH_DTYPE(JFOG_DTYPE)};
#undef JFOG_DTYPE

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_DTYPE_H_
