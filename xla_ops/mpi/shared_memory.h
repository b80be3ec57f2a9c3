// Memory shared by the ranks of one machine.
#ifndef JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
#define JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace jfog::mpi {

// Anonymous memory of each rank, mapped by all of them. A page takes memory
// from its first access on, a part lives until the last process has unmapped
// it, and a process that is killed leaves nothing behind.
//
// It is made in steps, between which the caller gathers what the ranks tell
// each other: a rank allocates its own part, `Open`s those of the others by
// their origins, and stops to offer its own when all have opened it.
class SharedMemory {
 public:
  // A part, as another process opens it.
  struct Origin {
    std::int64_t process = 0;
    std::int64_t file = -1;
    std::uint64_t bytes = 0;  // 0: none
    // Lies at the end of the memory. Where processes count in namespaces of
    // their own, the same numbers can name the file of a stranger.
    std::uint64_t token = 0;
  };

  // Collective over `comm`, of which `ranks` are on the machine of this one,
  // itself among them. Null on all ranks of the machine if one of them has no
  // part, or does not open that of another, or if there is only one.
  static std::unique_ptr<SharedMemory> Make(MPI_Comm comm,
                                            const std::vector<int>& ranks,
                                            std::size_t bytes);

  // Not collective. Allocates `bytes`, filled with zeros; none if the
  // environment variable JFOG_SHARED_MEMORY is 0, or if the system has none.
  explicit SharedMemory(std::size_t bytes);
  // Unmaps the memory in this process.
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // This rank's part, aligned to a page; null if there is none.
  std::byte* own() const { return own_.begin; }
  const Origin& origin() const { return origin_; }
  // Maps the parts of `ranks`, of at least so many bytes, given the origins of
  // all ranks; whether all are mapped.
  bool Open(const std::vector<Origin>& origins, const std::vector<int>& ranks,
            std::size_t least);
  void StopOffering();

  // The memory of the rank at a place in `ranks`, aligned to a page.
  std::byte* of(int place) const { return parts_[place].begin; }
  // Its length, at least what that rank asked for.
  std::size_t bytes(int place) const { return parts_[place].bytes; }

 private:
  struct Part {
    std::byte* begin = nullptr;
    std::size_t bytes = 0;  // mapped
  };

  Part own_;
  Origin origin_;
  std::vector<Part> parts_;
};

// Of each rank of a communicator of `size` its place in `ranks`, or -1.
std::vector<int> PlacesIn(const std::vector<int>& ranks, int size);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SHARED_MEMORY_H_
