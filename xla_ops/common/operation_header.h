// The identity of an operation, as ranks exchange and compare it.
#ifndef JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_
#define JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace jfog {

// Travels in front of (MPI) or beside (NCCL) every payload, so that ranks that
// run different operations detect it.
struct OperationHeader {
  std::uint64_t magic = 0;
  std::uint64_t sequence = 0;   // ordinal of the operation on its communicator
  std::uint64_t signature = 0;  // dtypes and element counts of all leaves
  std::uint64_t variant = 0;    // graph and round, reduction, or root
  std::uint64_t bytes = 0;      // of the payload
  std::uint64_t stamp = 0;      // MPI: of the first chunk in shared memory
  std::uint64_t check = 0;      // NCCL: hash of all other fields; MPI: of name
  std::int32_t channel = 0;     // MPI: shared-memory channel
  char operation[36] = {};
};
static_assert(sizeof(OperationHeader) == 96, "keeps what follows aligned");

OperationHeader MakeHeader(std::string_view name, std::uint64_t sequence,
                           std::uint64_t signature, std::uint64_t variant,
                           std::size_t bytes);

// Whether the header has been written by jfog.
bool IsValid(const OperationHeader& header);

// The name of the operation.
std::string NameOf(const OperationHeader& header);

// "neighbor_allreduce #41 on rank 0"
std::string Title(const std::string& name, std::uint64_t sequence, int rank);

// The difference between another rank's operation and this one; empty if they
// match. Payload sizes serve the text only.
std::string Difference(const OperationHeader& mine,
                       const OperationHeader& theirs);

}  // namespace jfog

#endif  // JFOG_XLA_OPS_COMMON_OPERATION_HEADER_H_
