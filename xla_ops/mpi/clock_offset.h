// The difference between the clocks of two ranks, measured by messages.
#ifndef JFOG_XLA_OPS_MPI_CLOCK_OFFSET_H_
#define JFOG_XLA_OPS_MPI_CLOCK_OFFSET_H_

#include <cstdint>
#include <tuple>

namespace jfog::mpi {

// Collective over the communicator of a context number. Every rank in turn
// sends rank 0 messages, which rank 0 answers with the time of its steady
// clock: that lies between the times at which the message was sent and its
// answer received. The difference is in the intersection of these intervals.
//
// Returns the least and the largest difference, rank 0's clock minus this
// one's, and this rank's time in the middle of the measurement; in ns. Throws
// std::runtime_error if a rank does not come in time, or has ended.
std::tuple<std::int64_t, std::int64_t, std::int64_t> MeasureClock(
    std::int64_t context);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_CLOCK_OFFSET_H_
