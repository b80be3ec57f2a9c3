// Handles of the split operations in flight, and their memory.
#ifndef JFOG_XLA_OPS_NCCL_HANDLES_H_
#define JFOG_XLA_OPS_NCCL_HANDLES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/handle_table.h"
#include "nccl/operation.h"

namespace jfog::nccl {

// The operations of a started call, with their memory.
struct Started {
  struct Received {
    DevicePointer address;
    std::size_t bytes;
  };

  ~Started();

  std::shared_ptr<Communicator> comm;
  std::vector<std::shared_ptr<Operation>> operations;
  std::vector<Received> received;
  std::vector<Buffer> buffers;
  std::shared_ptr<Event> ended;
  std::shared_ptr<Event> last_use;  // of the memory; null: unknown
};

HandleTable<Started>& Handles();

// Opens a handle and returns the two words of its number.
std::array<std::uint32_t, 2> Insert(std::shared_ptr<Started> started);

// Closes the handles of a communicator; returns how many were open.
int ForgetHandles(const Communicator& comm);

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_HANDLES_H_
