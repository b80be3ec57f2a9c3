// The FFI state of the calls that exchange along a graph.
#include "mpi/plan.h"

#include "mpi/consistency_check.h"

namespace jfog::mpi {

void Plan::Agree() {
  if (agreed_.load(std::memory_order_relaxed)) return;
  if (!agreed_.exchange(true) && graph != 0) AgreeOnGraph(comm, graph);
}

ffi::Error Plan::ReadCommon(const ffi::Dictionary& attributes,
                            const char* name) {
  const auto context = attributes.get<std::int64_t>("context");
  const auto mode_number = attributes.get<std::int64_t>("mode");
  const auto hash = attributes.get<std::int64_t>("graph");
  if (!(context && mode_number && hash)) return LacksAttributes(name);
  comm = Communicators().Find(*context);
  mode = *mode_number;
  graph = *hash;
  return ReadRounds(attributes, name, /*has_weights=*/true, &rounds);
}

}  // namespace jfog::mpi
