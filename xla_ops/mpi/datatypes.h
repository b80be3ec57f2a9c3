// MPI datatypes and reductions of leaves, and the type in which they travel.
#ifndef JFOG_XLA_OPS_MPI_DATATYPES_H_
#define JFOG_XLA_OPS_MPI_DATATYPES_H_

#include <mpi.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace jfog::mpi {

// In the order of the Python side.
enum Reduction : std::int64_t {
  kSum = 0,
  kMean = 1,
  kMin = 2,
  kMax = 3,
  kProd = 4
};

// The type in which a leaf is reduced and sent: float32 for 16-bit floats.
DataType WireType(DataType type);

// MPI_DATATYPE_NULL for a type that MPI does not reduce.
MPI_Datatype MpiType(DataType type);

// MPI_OP_NULL for a reduction that is not defined for the type.
MPI_Op MpiOp(Reduction reduction, DataType type);

// Copies elements of `type` to elements of its wire type, and back.
void PackWire(DataType type, const void* x, std::size_t count, std::byte* wire);
void UnpackWire(DataType type, const std::byte* wire, std::size_t count,
                void* y);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_DATATYPES_H_
