// MPI datatypes and reductions of leaves, and the type in which they travel.
#include "mpi/datatypes.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace jfog::mpi {
namespace {

// Minimum and maximum as user-defined reductions. A NaN wins, as in NumPy,
// where MPI leaves the result open; and MPICH 4.0.2 compares unsigned integers
// as signed ones.
template <typename T, bool kMaximum>
void Extremum(void* in, void* inout, int* length, MPI_Datatype*) {
  const T* a = static_cast<const T*>(in);
  T* b = static_cast<T*>(inout);
  for (int i = 0; i < *length; ++i) {
    if (a[i] != a[i] || (kMaximum ? a[i] > b[i] : a[i] < b[i])) b[i] = a[i];
  }
}

// Sums of small integers, which wrap around as XLA's do: Open MPI's own
// saturate where its component for AVX adds them, from 16 elements on (5.0).
template <typename T>
void Sum(void* in, void* inout, int* length, MPI_Datatype*) {
  const T* a = static_cast<const T*>(in);
  T* b = static_cast<T*>(inout);
  for (int i = 0; i < *length; ++i) b[i] = static_cast<T>(a[i] + b[i]);
}

template <MPI_User_function* kFunction>
MPI_Op UserOp() {
  static const MPI_Op op = [] {
    MPI_Op made = MPI_OP_NULL;
    MPI_Op_create(kFunction, /*commute=*/1, &made);
    return made;
  }();
  return op;
}

MPI_Op SumOf(DataType type) {
  switch (type) {
    case DataType::S8:
      return UserOp<&Sum<std::int8_t>>();
    case DataType::U8:
      return UserOp<&Sum<std::uint8_t>>();
    case DataType::S16:
      return UserOp<&Sum<std::int16_t>>();
    case DataType::U16:
      return UserOp<&Sum<std::uint16_t>>();
    case DataType::PRED:
      return MPI_LOR;
    default:
      return MPI_SUM;
  }
}

// 16-bit floats travel as float32, and complex numbers have no order.
template <bool kMaximum>
MPI_Op ExtremumOf(DataType type) {
  switch (type) {
#define JFOG_EXTREMUM(dtype, name, stored, ...)     \
  case DataType::dtype:                             \
    if constexpr (std::is_arithmetic_v<stored>) {   \
      return UserOp<&Extremum<stored, kMaximum>>(); \
    }                                               \
    return MPI_OP_NULL;
    JFOG_FOR_EACH_SUMMABLE_DTYPE(JFOG_EXTREMUM)
#undef JFOG_EXTREMUM
    case DataType::PRED:
      return kMaximum ? MPI_LOR : MPI_LAND;
    default:
      return MPI_OP_NULL;
  }
}

template <typename T>
void Widen(const void* x, std::size_t count, std::byte* wire) {
  const T* narrow = static_cast<const T*>(x);
  float* wide = reinterpret_cast<float*>(wire);
  for (std::size_t k = 0; k < count; ++k) wide[k] = narrow[k];
}

template <typename T>
void Narrow(const std::byte* wire, std::size_t count, void* y) {
  const float* wide = reinterpret_cast<const float*>(wire);
  T* narrow = static_cast<T*>(y);
  for (std::size_t k = 0; k < count; ++k) narrow[k] = T(wide[k]);
}

}  // namespace

DataType WireType(DataType type) {
  return type == DataType::BF16 || type == DataType::F16 ? DataType::F32 : type;
}

MPI_Datatype MpiType(DataType type) {
  switch (type) {
#define JFOG_MPI_TYPE(dtype, name, stored, accumulated, weight, mpi, nccl) \
  case DataType::dtype:                                                    \
    return mpi;
    JFOG_FOR_EACH_DTYPE(JFOG_MPI_TYPE)
#undef JFOG_MPI_TYPE
    default:
      return MPI_DATATYPE_NULL;
  }
}

MPI_Op MpiOp(Reduction reduction, DataType type) {
  switch (reduction) {
    case kSum:
    case kMean:
      return SumOf(type);
    case kProd:
      return type == DataType::PRED ? MPI_LAND : MPI_PROD;
    case kMin:
    case kMax: {
      const bool maximum = reduction == kMax;
      return maximum ? ExtremumOf<true>(type) : ExtremumOf<false>(type);
    }
  }
  return MPI_OP_NULL;
}

void PackWire(DataType type, const void* x, std::size_t count,
              std::byte* wire) {
  if (type == DataType::BF16) {
    Widen<Bfloat16>(x, count, wire);
  } else if (type == DataType::F16) {
    Widen<Float16>(x, count, wire);
  } else if (count > 0) {
    std::memcpy(wire, x, count * SizeOf(type));
  }
}

void UnpackWire(DataType type, const std::byte* wire, std::size_t count,
                void* y) {
  if (type == DataType::BF16) {
    Narrow<Bfloat16>(wire, count, y);
  } else if (type == DataType::F16) {
    Narrow<Float16>(wire, count, y);
  } else if (count > 0) {
    std::memcpy(y, wire, count * SizeOf(type));
  }
}

}  // namespace jfog::mpi
