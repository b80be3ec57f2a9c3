// Handles of the split operations in flight.
#include "mpi/handles.h"

#include "common/process_wide.h"

namespace jfog::mpi {

HandleTable<Operation>& Handles() {
  return ProcessWide<HandleTable<Operation>>();
}

int ForgetHandles(const Communicator& comm) {
  return Handles().Forget(
      [&](const Operation& operation) { return operation.IsOn(comm); });
}

}  // namespace jfog::mpi
