// Memory shared by the ranks of one machine.
#include "mpi/shared_memory.h"

#include <sys/statvfs.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/cache_line.h"

namespace jfog::mpi {
namespace {

// MPI's shared memory is a file here, whose pages are allocated on first
// access: a page that the file system does not have is a SIGBUS.
constexpr const char* kFileSystem = "/dev/shm";

bool HasRoom(std::uint64_t bytes) {
  struct statvfs system;
  if (statvfs(kFileSystem, &system) != 0) return true;  // another file system
  const std::uint64_t free = system.f_bavail * system.f_frsize;
  return free / 4 * 3 >= bytes;
}

bool IsEnabled() {
  const char* text = std::getenv("JFOG_SHARED_MEMORY");
  return text == nullptr || std::strcmp(text, "0") != 0;
}

// Logical and over the ranks of `machine`.
bool AllOf(bool value, MPI_Comm machine) {
  int all = value;
  MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, machine);
  return all != 0;
}

}  // namespace

std::unique_ptr<SharedMemory> SharedMemory::Make(MPI_Comm machine,
                                                 std::size_t bytes) {
  int ranks = 0;
  MPI_Comm_size(machine, &ranks);
  const std::size_t own_bytes = bytes + kCacheLine;
  std::uint64_t total = own_bytes;
  MPI_Allreduce(MPI_IN_PLACE, &total, 1, MPI_UINT64_T, MPI_SUM, machine);
  if (!AllOf(IsEnabled() && ranks > 1 && HasRoom(total), machine)) {
    return nullptr;
  }
  std::unique_ptr<SharedMemory> memory(new SharedMemory);
  void* own = nullptr;
  const bool allocated = MPI_Win_allocate_shared(
                             static_cast<MPI_Aint>(own_bytes), 1, MPI_INFO_NULL,
                             machine, &own, &memory->window_) == MPI_SUCCESS;
  if (!AllOf(allocated, machine)) return nullptr;
  for (int rank = 0; rank < ranks; ++rank) {
    MPI_Aint length = 0;
    int unit = 0;
    void* base = nullptr;
    MPI_Win_shared_query(memory->window_, rank, &length, &unit, &base);
    // The parts are contiguous and start at the same offset of a page in all
    // processes, so all of them skip the same bytes.
    const auto address = reinterpret_cast<std::uintptr_t>(base);
    const std::size_t skip = (kCacheLine - address % kCacheLine) % kCacheLine;
    memory->parts_.push_back(static_cast<std::byte*>(base) + skip);
  }
  return memory;
}

void SharedMemory::Free() {
  if (window_ != MPI_WIN_NULL) MPI_Win_free(&window_);
  parts_.clear();
}

std::vector<int> RanksIn(MPI_Comm comm, MPI_Comm part) {
  int size = 0;
  MPI_Comm_size(comm, &size);
  std::vector<int> ranks(size), part_ranks(size);
  for (int rank = 0; rank < size; ++rank) ranks[rank] = rank;
  MPI_Group all, some;
  MPI_Comm_group(comm, &all);
  MPI_Comm_group(part, &some);
  MPI_Group_translate_ranks(all, size, ranks.data(), some, part_ranks.data());
  MPI_Group_free(&all);
  MPI_Group_free(&some);
  for (int& rank : part_ranks) {
    if (rank == MPI_UNDEFINED) rank = -1;
  }
  return part_ranks;
}

}  // namespace jfog::mpi
