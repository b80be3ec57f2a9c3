// Handles of the split operations in flight.
#include "mpi/handles.h"

namespace jfog::mpi {

// Never destroyed: programs may still run while the process ends.
HandleTable<Operation>& Handles() {
  static auto* handles = new HandleTable<Operation>;
  return *handles;
}

int ForgetHandles(const Communicator& comm) {
  return Handles().Forget(
      [&](const Operation& operation) { return operation.IsOn(comm); });
}

}  // namespace jfog::mpi
