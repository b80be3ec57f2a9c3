// Memory shared by the ranks of one machine.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_

#include <mpi.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace jfog::mpi {

// Anonymous memory of each rank, mapped by all of them. A page takes memory
// from its first access on, a part lives until the last process has unmapped
// it, and a process that is killed leaves nothing behind.
class SharedMemory {
 public:
  // Collective over `machine`, whose ranks are on one machine; each allocates
  // `bytes`, filled with zeros. Null on all ranks if the environment variable
  // JFOG_SHARED_MEMORY is 0 on some rank, if some rank cannot map the memory of
  // another, or finds less than `least` bytes there, or if there is only one
  // rank.
  static std::unique_ptr<SharedMemory> Make(MPI_Comm machine, std::size_t bytes,
                                            std::size_t least);
  // Not collective: unmaps the memory in this process.
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // The memory of a rank of `machine`, aligned to a page.
  std::byte* of(int rank) const { return parts_[rank].begin; }
  // Its length, at least what that rank asked for.
  std::size_t bytes(int rank) const { return parts_[rank].bytes; }

 private:
  struct Part {
    std::byte* begin = nullptr;
    std::size_t bytes = 0;  // mapped
  };

  SharedMemory() = default;

  std::vector<Part> parts_;
};

// Of each rank of `comm` its rank in `part`, or -1.
std::vector<int> RanksIn(MPI_Comm comm, MPI_Comm part);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
