// Neighbor averaging in plain MPI: what jfog's exchange is measured against.
//
// A shared library for ctypes, so that it runs inside of the job that jfog runs
// in. The rounds of a graph come in compressed rows: those of round t lie at
// [begin[t], begin[t + 1]).
#include <mpi.h>

#include <vector>

namespace {

MPI_Comm communicator = MPI_COMM_NULL;
std::vector<std::vector<float>> received;  // scratch, one for each in-neighbor

void Grow(std::size_t slots, std::size_t count) {
  if (received.size() < slots) received.resize(slots);
  for (auto& slot : received) {
    if (slot.size() < count) slot.resize(count);
  }
}

// x + sum_k w_k (x_k - x) in one pass over x, for the degrees that occur.
void Mix(float* __restrict x, std::size_t count, int terms, const float* w) {
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

// Averages x in place `iterations` times, beginning at round 0, and returns the
// seconds from a barrier to the end, or -1 if MPI reports an error.
extern "C" double raw_run(float* x, long count, int period,
                          const int* source_begin, const int* sources,
                          const float* weights, const int* destination_begin,
                          const int* destinations, long iterations) {
  if (communicator == MPI_COMM_NULL &&
      MPI_Comm_dup(MPI_COMM_WORLD, &communicator) != MPI_SUCCESS) {
    return -1;
  }
  int slots = 0;
  for (int t = 0; t < period; ++t) {
    const int degree = source_begin[t + 1] - source_begin[t];
    if (degree > slots) slots = degree;
  }
  Grow(slots, count);
  std::vector<MPI_Request> requests(source_begin[period] +
                                    destination_begin[period]);
  if (MPI_Barrier(communicator) != MPI_SUCCESS) return -1;
  const double start = MPI_Wtime();
  for (long i = 0, t = 0; i < iterations; ++i) {
    int pending = 0, status = MPI_SUCCESS;
    const int first = source_begin[t], terms = source_begin[t + 1] - first;
    for (int k = 0; k < terms; ++k) {
      status |=
          MPI_Irecv(received[k].data(), count, MPI_FLOAT, sources[first + k], 0,
                    communicator, &requests[pending++]);
    }
    for (int k = destination_begin[t]; k < destination_begin[t + 1]; ++k) {
      status |= MPI_Isend(x, count, MPI_FLOAT, destinations[k], 0, communicator,
                          &requests[pending++]);
    }
    status |= MPI_Waitall(pending, requests.data(), MPI_STATUSES_IGNORE);
    if (status != MPI_SUCCESS) return -1;
    Mix(x, count, terms, weights + first);
    t = t + 1 == period ? 0 : t + 1;
  }
  return MPI_Wtime() - start;
}
