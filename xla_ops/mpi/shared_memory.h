// Memory shared by the ranks of one machine.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_

#include <mpi.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace jfog::mpi {

// An MPI shared-memory window, which its ranks access with plain loads and
// stores.
class SharedMemory {
 public:
  // Collective over `machine`, whose ranks are on one machine; each allocates
  // `bytes`. Null on all ranks if the environment variable JFOG_SHARED_MEMORY
  // is 0 on some rank, if memory is short, or if there is only one rank.
  static std::unique_ptr<SharedMemory> Make(MPI_Comm machine,
                                            std::size_t bytes);
  // Without `Free`, which is collective, the memory lives as long as the
  // process.
  ~SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // The memory of a rank of `machine`, aligned to a cache line.
  std::byte* of(int rank) const { return parts_[rank]; }

  // Collective: releases the memory.
  void Free();

 private:
  SharedMemory() = default;

  MPI_Win window_ = MPI_WIN_NULL;
  std::vector<std::byte*> parts_;
};

// Of each rank of `comm` its rank in `part`, or -1.
std::vector<int> RanksIn(MPI_Comm comm, MPI_Comm part);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
