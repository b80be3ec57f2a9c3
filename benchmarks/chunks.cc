// The measurement behind kChunk of xla_ops/mpi/exchange.cc: a ring average in
// plain MPI with whole messages, and in chunks of several lengths through two
// or four sets of buffers.
//
//   mpicxx -O3 benchmarks/chunks.cc -o chunks
//   mpirun -np 2 --mca btl_sm_eager_limit 65536 ./chunks
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

struct Ring {
  int left, right;
};

void Sum(float* x, const float* a, const float* b, std::size_t count) {
  constexpr float kThird = 1.0f / 3;
  for (std::size_t i = 0; i < count; ++i) {
    const float own = x[i];
    x[i] = own + kThird * (a[i] - own) + kThird * (b[i] - own);
  }
}

struct Buffers {
  explicit Buffers(std::size_t count)
      : x(count, 1.0f), a(count), b(count), copy(count) {}
  std::vector<float> x, a, b, copy;
};

void Exchange(const Ring& ring, const float* x, float* a, float* b,
              std::size_t count, MPI_Request* requests) {
  const int n = static_cast<int>(count);
  MPI_Irecv(a, n, MPI_FLOAT, ring.left, 0, MPI_COMM_WORLD, requests);
  MPI_Irecv(b, n, MPI_FLOAT, ring.right, 1, MPI_COMM_WORLD, requests + 1);
  MPI_Isend(x, n, MPI_FLOAT, ring.right, 0, MPI_COMM_WORLD, requests + 2);
  MPI_Isend(x, n, MPI_FLOAT, ring.left, 1, MPI_COMM_WORLD, requests + 3);
}

// One average; with `copies` the sends go out from a copy.
void Whole(const Ring& ring, Buffers& m, bool copies) {
  MPI_Request requests[4];
  const std::size_t count = m.x.size();
  if (copies) std::memcpy(m.copy.data(), m.x.data(), 4 * count);
  Exchange(ring, copies ? m.copy.data() : m.x.data(), m.a.data(), m.b.data(),
           count, requests);
  MPI_Waitall(4, requests, MPI_STATUSES_IGNORE);
  Sum(m.x.data(), m.a.data(), m.b.data(), count);
}

void Chunked(const Ring& ring, Buffers& m, std::size_t chunk, std::size_t depth,
             bool copies) {
  const std::size_t count = m.x.size();
  const std::size_t chunks = (count + chunk - 1) / chunk;
  std::vector<MPI_Request> requests(4 * depth, MPI_REQUEST_NULL);
  const auto length = [&](std::size_t k) {
    return std::min(chunk, count - k * chunk);
  };
  const auto post = [&](std::size_t k) {
    const std::size_t at = k % depth * chunk;
    const float* x = m.x.data() + k * chunk;
    if (copies) {
      std::memcpy(m.copy.data() + at, x, 4 * length(k));
      x = m.copy.data() + at;
    }
    Exchange(ring, x, m.a.data() + at, m.b.data() + at, length(k),
             &requests[4 * (k % depth)]);
  };
  for (std::size_t k = 0; k < std::min(chunks, depth); ++k) post(k);
  for (std::size_t k = 0; k < chunks; ++k) {
    const std::size_t at = k % depth * chunk;
    MPI_Waitall(4, &requests[4 * (k % depth)], MPI_STATUSES_IGNORE);
    Sum(m.x.data() + k * chunk, m.a.data() + at, m.b.data() + at, length(k));
    if (k + depth < chunks) post(k + depth);
  }
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const Ring ring{(rank + size - 1) % size, (rank + 1) % size};
  for (std::size_t bytes : {262144, 1000000, 4000000, 40000000}) {
    Buffers memory(bytes / 4);
    struct Form {
      std::string name;
      std::function<void()> run;
      std::vector<double> seconds;
    };
    std::vector<Form> forms;
    forms.push_back({"whole", [&] { Whole(ring, memory, false); }, {}});
    forms.push_back({"whole, copied", [&] { Whole(ring, memory, true); }, {}});
    for (std::size_t chunk : {16000, 31744, 61440, 131072, 262144, 1048576}) {
      for (std::size_t depth : {2, 4}) {
        if (chunk * depth > bytes) continue;
        for (bool copies : {false, true}) {
          forms.push_back({std::to_string(chunk) + " B, " +
                               std::to_string(depth) + " sets" +
                               (copies ? ", copied" : ""),
                           [&memory, ring, chunk, depth, copies] {
                             Chunked(ring, memory, chunk / 4, depth, copies);
                           },
                           {}});
        }
      }
    }
    const std::size_t repeats = std::max<std::size_t>(
        5, std::min<std::size_t>(2000, 100000000 / bytes));
    for (int round = 0; round < 9; ++round) {
      for (Form& form : forms) {
        MPI_Barrier(MPI_COMM_WORLD);
        const double start = MPI_Wtime();
        for (std::size_t k = 0; k < repeats; ++k) form.run();
        form.seconds.push_back((MPI_Wtime() - start) /
                               static_cast<double>(repeats));
      }
    }
    if (rank != 0) continue;
    std::printf("%zu bytes, %d ranks\n", bytes, size);
    double whole = 0;
    for (Form& form : forms) {
      std::sort(form.seconds.begin(), form.seconds.end());
      const double median = form.seconds[form.seconds.size() / 2];
      if (whole == 0) whole = median;
      std::printf("  %-28s %10.1f us  %.2f\n", form.name.c_str(), 1e6 * median,
                  median / whole);
    }
  }
  MPI_Finalize();
}
