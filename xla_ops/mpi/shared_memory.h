// Memory that the ranks of one machine share.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_

#include <mpi.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace jfog::mpi {

// A window of MPI's that all its ranks read and write like memory of their own.
class SharedMemory {
 public:
  // Collective over `machine`, whose ranks are on one machine; every rank names
  // the bytes that it brings. Null on all of them where shared memory is
  // unwanted (the environment variable JFOG_SHARED_MEMORY is 0 on some rank) or
  // short, or nobody is there to share it with.
  static std::unique_ptr<SharedMemory> Make(MPI_Comm machine,
                                            std::size_t bytes);
  // Whoever does not call `Free` leaves the memory to the process.
  ~SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // What a rank of `machine` has brought, at a cache line.
  std::byte* of(int rank) const { return parts_[rank]; }

  // Collective: gives the memory back.
  void Free();

 private:
  SharedMemory() = default;

  MPI_Win window_ = MPI_WIN_NULL;
  std::vector<std::byte*> parts_;
};

// The ranks of `comm` by their numbers in `part`, or -1.
std::vector<int> RanksIn(MPI_Comm comm, MPI_Comm part);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
