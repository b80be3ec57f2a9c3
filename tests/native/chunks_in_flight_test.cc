// The number of chunks in flight keeps a link with a delay full, within bounds.
#include "mpi/chunks_in_flight.h"

#include <doctest/doctest.h>

#include <cstddef>

#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

TEST_CASE("chunks in flight cover rate times the delay of both ways") {
  CHECK(ChunksFor(0) == kFewestInFlight);
  CHECK(ChunksFor(1e-6) == kFewestInFlight);
  CHECK(ChunksFor(1) == kMostInFlight);
  std::size_t before = 0;
  for (double delay = 1e-6; delay < 0.1; delay *= 1.3) {
    const std::size_t chunks = ChunksFor(delay);
    CHECK(chunks >= before);
    const double bytes = static_cast<double>(chunks) * kChunk;
    CHECK((bytes >= 2 * delay * 1.25e9 || chunks == kMostInFlight));
    before = chunks;
  }
}

}  // namespace
}  // namespace jfog::mpi
