// The number of chunks in flight between machines.
#include "mpi/chunks_in_flight.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "mpi/collective_start.h"

namespace jfog::mpi {
namespace {

using Clock = std::chrono::steady_clock;

// The first barrier connects the ranks. The fastest of a few batches counts,
// since a core may be busy with something else meanwhile.
constexpr int kBatches = 3;
constexpr int kBarriers = 2;  // of a batch

// The seconds of a message, one way: a barrier takes log2(ranks) of them, one
// after another.
double MeasureDelay(MPI_Comm comm) {
  Require(MPI_Barrier(comm), "MPI_Barrier");
  double least = std::numeric_limits<double>::infinity();
  for (int batch = 0; batch < kBatches; ++batch) {
    const Clock::time_point begin = Clock::now();
    for (int i = 0; i < kBarriers; ++i) {
      Require(MPI_Barrier(comm), "MPI_Barrier");
    }
    const std::chrono::duration<double> took = Clock::now() - begin;
    least = std::min(least, took.count() / kBarriers);
  }
  Require(MPI_Allreduce(MPI_IN_PLACE, &least, 1, MPI_DOUBLE, MPI_MIN, comm),
          "MPI_Allreduce");
  return least / std::max(1.0, std::ceil(std::log2(SizeOfComm(comm))));
}

}  // namespace

std::size_t MeasureChunksInFlight(MPI_Comm comm) {
  // The variable may differ between ranks, and the measurement is collective.
  const double delay = MeasureDelay(comm);
  const char* text = std::getenv("JFOG_CHUNKS_IN_FLIGHT");
  // jfog.init has checked it.
  if (text == nullptr) return ChunksFor(delay);
  return std::max(kFewestInFlight, static_cast<std::size_t>(std::atoi(text)));
}

}  // namespace jfog::mpi
