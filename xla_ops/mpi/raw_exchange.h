// Averages in plain MPI: the limit that jfog's operations are measured against.
#ifndef JFOG_XLA_OPS_MPI_RAW_EXCHANGE_H_
#define JFOG_XLA_OPS_MPI_RAW_EXCHANGE_H_

#include <cstdint>
#include <vector>

namespace jfog::mpi {

// Averages the floats at an address in place over the neighbors, so many times,
// beginning at round 0, and returns the seconds from a barrier to the end. The
// rounds of a graph come in compressed rows: those of round t lie at
// [begin[t], begin[t + 1]). It checks nothing and never times out. Throws
// std::runtime_error if MPI reports an error.
double RawNeighborAllreduce(std::uintptr_t address, std::int64_t count,
                            const std::vector<int>& source_begin,
                            const std::vector<int>& sources,
                            const std::vector<float>& weights,
                            const std::vector<int>& destination_begin,
                            const std::vector<int>& destinations,
                            std::int64_t iterations);

// The same for the mean over all ranks, by MPI_Allreduce.
double RawAllreduce(std::uintptr_t address, std::int64_t count,
                    std::int64_t iterations);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_RAW_EXCHANGE_H_
