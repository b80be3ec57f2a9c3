// The identity of an operation, as ranks exchange and compare it.
#ifndef JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_
#define JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "common/dtype.h"

namespace jfog {

// Travels in front of (MPI) or beside (NCCL) every payload, so that ranks that
// run different operations detect it.
struct OperationHeader {
  std::uint64_t magic = 0;
  std::uint64_t sequence = 0;   // ordinal of the operation on its communicator
  std::uint64_t signature = 0;  // dtypes and element counts of all leaves
  std::uint64_t variant = 0;    // graph and round, reduction, or root
  std::uint64_t leaves = 0;     // MPI: see Summary; NCCL: bytes of the edge
  std::uint64_t stamp = 0;      // MPI: of the first chunk in shared memory
  std::uint64_t check = 0;      // NCCL: hash of all other fields; MPI: of name
  std::int32_t channel = 0;     // MPI: shared-memory channel
  char operation[36] = {};
};
static_assert(sizeof(OperationHeader) == 96, "keeps what follows aligned");

OperationHeader MakeHeader(std::string_view name, std::uint64_t sequence,
                           std::uint64_t signature, std::uint64_t variant,
                           std::uint64_t leaves);

// Leaves in one word: their number, the dtype if they share it, and their bytes
// without padding, up to a terabyte.
class Summary {
 public:
  void Add(DataType type, std::size_t bytes);
  std::uint64_t word() const;
  // "2 leaves of float32, 20 bytes", "1 leaf, float32 x 3".
  static std::string Describe(std::uint64_t word);
  // The bytes of so many leaves; none for another number, or if it did not fit.
  static std::optional<std::uint64_t> BytesOf(std::uint64_t word,
                                              std::size_t leaves);

 private:
  std::uint64_t count_ = 0;
  std::uint64_t bytes_ = 0;
  DataType type_ = DataType::INVALID;
  bool is_mixed_ = false;
};

// Whether the header has been written by jfog.
bool IsValid(const OperationHeader& header);

// The name of the operation.
std::string NameOf(const OperationHeader& header);

// "neighbor_allreduce #41 on rank 0"
std::string Title(const std::string& name, std::uint64_t sequence, int rank);

// The difference between another rank's operation and this one; empty if they
// match. The summaries of the leaves serve the text only.
std::string Difference(const OperationHeader& mine,
                       const OperationHeader& theirs);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_
