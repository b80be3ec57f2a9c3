// The leaves of one operation: their layout inside a message, their signature.
#ifndef JFOG_XLA_OPS_MPI_LEAVES_H_
#define JFOG_XLA_OPS_MPI_LEAVES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"

namespace jfog::mpi {

// All leaves of a pytree travel in one message: a header, then every leaf at
// an offset that suits its alignment.
struct Leaves {
  std::vector<DataType> types;
  std::vector<std::size_t> counts;  // elements of the inputs
  std::vector<std::size_t> output_counts;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::vector<std::size_t> offsets;  // bytes from the start of the message
  std::size_t message_bytes = 0;     // the header included
  std::uint64_t signature = 0;

  std::size_t size() const { return types.size(); }
  std::size_t bytes(std::size_t i) const {
    return counts[i] * SizeOf(types[i]);
  }
  // "3 leaves, float32 x 1200, ..."
  std::string Describe() const;
};

// Reads the operands from `first` on, one for each result.
ffi::ErrorOr<Leaves> ReadLeaves(ffi::RemainingArgs args, std::size_t first,
                                ffi::RemainingRets results);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_LEAVES_H_
