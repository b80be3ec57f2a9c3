// Averages in plain MPI: the limit that jfog's operations are measured against.
#include "mpi/raw_exchange.h"

#include <mpi.h>

#include <algorithm>

#include "mpi/collective_start.h"

namespace jfog::mpi {
namespace {

MPI_Comm TheComm() {
  static const MPI_Comm comm = [] {
    MPI_Comm made = MPI_COMM_NULL;
    MPI_Comm_dup(MPI_COMM_WORLD, &made);
    return made;
  }();
  return comm;
}

// x + sum_k w_k (x_k - x) in one pass over x, for the degrees that occur.
void AddDifferences(float* __restrict x, std::size_t count, int terms,
                    const float* w,
                    const std::vector<std::vector<float>>& received) {
  if (terms == 1) {
    const float* __restrict a = received[0].data();
    const float wa = w[0];
    for (std::size_t i = 0; i < count; ++i) x[i] += wa * (a[i] - x[i]);
  } else if (terms == 2) {
    const float* __restrict a = received[0].data();
    const float* __restrict b = received[1].data();
    const float wa = w[0], wb = w[1];
    for (std::size_t i = 0; i < count; ++i) {
      x[i] += wa * (a[i] - x[i]) + wb * (b[i] - x[i]);
    }
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      float sum = x[i];
      for (int k = 0; k < terms; ++k) sum += w[k] * (received[k][i] - x[i]);
      x[i] = sum;
    }
  }
}

}  // namespace

double RawNeighborAllreduce(std::uintptr_t address, std::int64_t count,
                            const std::vector<int>& source_begin,
                            const std::vector<int>& sources,
                            const std::vector<float>& weights,
                            const std::vector<int>& destination_begin,
                            const std::vector<int>& destinations,
                            std::int64_t iterations) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has the array.
  auto* const x = reinterpret_cast<float*>(address);
  const MPI_Comm comm = TheComm();
  const auto elements = static_cast<int>(count);
  const auto period = source_begin.size() - 1;
  int slots = 0;
  for (std::size_t t = 0; t < period; ++t) {
    slots = std::max(slots, source_begin[t + 1] - source_begin[t]);
  }
  std::vector<std::vector<float>> received(slots);
  for (auto& slot : received) slot.resize(count);
  std::vector<MPI_Request> requests(sources.size() + destinations.size());
  Require(MPI_Barrier(comm), "MPI_Barrier");
  const double start = MPI_Wtime();
  std::size_t t = 0;
  for (std::int64_t i = 0; i < iterations; ++i) {
    int pending = 0, status = MPI_SUCCESS;
    const int first = source_begin[t], terms = source_begin[t + 1] - first;
    for (int k = 0; k < terms; ++k) {
      status |= MPI_Irecv(received[k].data(), elements, MPI_FLOAT,
                          sources[first + k], 0, comm, &requests[pending++]);
    }
    for (int k = destination_begin[t]; k < destination_begin[t + 1]; ++k) {
      status |= MPI_Isend(x, elements, MPI_FLOAT, destinations[k], 0, comm,
                          &requests[pending++]);
    }
    status |= MPI_Waitall(pending, requests.data(), MPI_STATUSES_IGNORE);
    Require(status, "a raw exchange");
    AddDifferences(x, count, terms, weights.data() + first, received);
    t = t + 1 == period ? 0 : t + 1;
  }
  return MPI_Wtime() - start;
}

double RawAllreduce(std::uintptr_t address, std::int64_t count,
                    std::int64_t iterations) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has the array.
  auto* const x = reinterpret_cast<float*>(address);
  const MPI_Comm comm = TheComm();
  int size = 1;
  MPI_Comm_size(comm, &size);
  const float scale = 1.0f / static_cast<float>(size);
  Require(MPI_Barrier(comm), "MPI_Barrier");
  const double start = MPI_Wtime();
  for (std::int64_t i = 0; i < iterations; ++i) {
    Require(MPI_Allreduce(MPI_IN_PLACE, x, static_cast<int>(count), MPI_FLOAT,
                          MPI_SUM, comm),
            "MPI_Allreduce");
    for (std::int64_t k = 0; k < count; ++k) x[k] *= scale;
  }
  return MPI_Wtime() - start;
}

}  // namespace jfog::mpi
