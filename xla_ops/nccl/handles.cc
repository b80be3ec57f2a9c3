// Handles of the split operations in flight, and their memory.
#include "nccl/handles.h"

#include <algorithm>
#include <utility>

#include "common/process_wide.h"

namespace jfog::nccl {

HandleTable<Started>& Handles() { return ProcessWide<HandleTable<Started>>(); }

Started::~Started() {
  for (Buffer& buffer : buffers) {
    if (last_use == nullptr) {
      buffer.Leak();
    } else {
      buffer.UsedUntil(last_use);
    }
  }
}

std::array<std::uint32_t, 2> Insert(std::shared_ptr<Started> started) {
  std::array<std::uint32_t, 2> handle;
  Handles().Insert(std::move(started), handle.data());
  return handle;
}

int ForgetHandles(const Communicator& comm) {
  return Handles().Forget([&](const Started& started) {
    return started.comm.get() == &comm ||
           std::any_of(started.operations.begin(), started.operations.end(),
                       [&](const std::shared_ptr<Operation>& operation) {
                         return &operation->comm() == &comm;
                       });
  });
}

}  // namespace jfog::nccl
