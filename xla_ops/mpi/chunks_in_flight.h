// The number of chunks in flight between machines.
#ifndef JFOG_XLA_OPS_MPI_CHUNKS_IN_FLIGHT_H_
#define JFOG_XLA_OPS_MPI_CHUNKS_IN_FLIGHT_H_

#include <mpi.h>

#include <algorithm>
#include <cstddef>

#include "mpi/wire_format.h"

namespace jfog::mpi {

constexpr std::size_t kFewestInFlight = 2;
constexpr std::size_t kMostInFlight = 64;

// The next chunk of a long payload is sent when one has arrived, so fewer
// chunks than rate times delay leave a link idle, and more only fill queues and
// caches. For a delay in seconds, of one way, and a link of 10 Gbit/s.
inline std::size_t ChunksFor(double delay) {
  constexpr double kRate = 1.25e9;  // bytes per second
  // A chunk leaves when the end of one before it is known.
  const double chunks = 2 * delay * kRate / static_cast<double>(kChunk);
  if (!(chunks < kMostInFlight)) return kMostInFlight;
  return std::max(kFewestInFlight, static_cast<std::size_t>(chunks) + 1);
}

// Collective over `comm`, of which some ranks share no memory: measures the
// delay of a message between them; the same on all ranks. The environment
// variable JFOG_CHUNKS_IN_FLIGHT takes its place.
std::size_t MeasureChunksInFlight(MPI_Comm comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_CHUNKS_IN_FLIGHT_H_
