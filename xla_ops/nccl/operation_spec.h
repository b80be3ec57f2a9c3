// The identity and the edges of an operation before its launch.
#ifndef JFOG_XLA_OPS_NCCL_OPERATION_SPEC_H_
#define JFOG_XLA_OPS_NCCL_OPERATION_SPEC_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace jfog::nccl {

// An edge to or from another rank, and the bytes that travel on it.
struct Edge {
  int rank;
  std::size_t bytes;
};

struct OperationSpec {
  std::string name;
  std::uint64_t signature = 0;
  std::uint64_t variant = 0;
  std::string leaves;  // for texts
  // Of an exchange. A collective has all ranks as its peers.
  std::vector<Edge> sources = {};
  std::vector<Edge> destinations = {};
  bool is_collective = false;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_OPERATION_SPEC_H_
