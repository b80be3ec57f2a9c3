// Memory shared by the ranks of one machine.
#include "mpi/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "common/cache_line.h"
#include "mpi/collective_start.h"

namespace jfog::mpi {
namespace {

// The memory of one process, as another opens it.
struct Origin {
  std::int64_t process = 0;
  std::int64_t file = -1;
  std::uint64_t bytes = 0;
  // Lies at the end of the memory. Where processes count in namespaces of their
  // own, the same numbers can name the file of a stranger.
  std::uint64_t token = 0;
};

bool IsEnabled() {
  const char* text = std::getenv("JFOG_SHARED_MEMORY");
  return text == nullptr || std::strcmp(text, "0") != 0;
}

// Logical and over the ranks of `machine`.
bool AllOf(bool value, MPI_Comm machine) {
  int all = value;
  Require(MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, machine),
          "MPI_Allreduce");
  return all != 0;
}

std::byte* Map(int file, std::size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<std::byte*>(memory);
}

std::uint64_t* TokenIn(std::byte* memory, std::size_t bytes) {
  return reinterpret_cast<std::uint64_t*>(memory + bytes - kCacheLine);
}

// The memory of another process, if it has `least` bytes and a token.
std::byte* MapOther(const Origin& origin, std::size_t least) {
  if (origin.bytes < AlignUp(least) + kCacheLine ||
      origin.bytes % kCacheLine != 0)
    return nullptr;
  const std::string path = "/proc/" + std::to_string(origin.process) + "/fd/" +
                           std::to_string(origin.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  // An access behind the end of a file is a SIGBUS.
  const bool fits =
      lseek(file, 0, SEEK_END) == static_cast<off_t>(origin.bytes);
  std::byte* memory = fits ? Map(file, origin.bytes) : nullptr;
  close(file);
  if (memory == nullptr) return nullptr;
  if (*TokenIn(memory, origin.bytes) == origin.token) return memory;
  munmap(memory, origin.bytes);
  return nullptr;
}

}  // namespace

std::unique_ptr<SharedMemory> SharedMemory::Make(MPI_Comm machine,
                                                 std::size_t bytes,
                                                 std::size_t least) {
  int ranks = 0, me = 0;
  MPI_Comm_size(machine, &ranks);
  MPI_Comm_rank(machine, &me);
  if (!AllOf(IsEnabled() && ranks > 1, machine)) return nullptr;

  std::unique_ptr<SharedMemory> memory(new SharedMemory);
  memory->parts_.resize(ranks);
  std::vector<Origin> origins(ranks);
  Origin& own = origins[me];
  own.process = getpid();
  own.bytes = AlignUp(bytes) + kCacheLine;
  const int file = memfd_create("jfog", MFD_CLOEXEC);
  own.file = file;
  bool usable =
      file >= 0 && ftruncate(file, static_cast<off_t>(own.bytes)) == 0;
  if (usable) {
    memory->parts_[me] = {Map(file, own.bytes), own.bytes};
    usable = memory->of(me) != nullptr;
  }
  if (usable) {
    std::random_device random;
    own.token = (std::uint64_t{random()} << 32) | random();
    *TokenIn(memory->of(me), own.bytes) = own.token;
  }
  Require(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, origins.data(),
                        sizeof(Origin), MPI_BYTE, machine),
          "MPI_Allgather");
  for (int rank = 0; rank < ranks && usable; ++rank) {
    if (rank == me) continue;
    memory->parts_[rank] = {MapOther(origins[rank], least),
                            origins[rank].bytes};
    usable = memory->of(rank) != nullptr;
  }
  usable = AllOf(usable, machine);  // and all have opened this rank's file
  if (file >= 0) close(file);
  return usable ? std::move(memory) : nullptr;
}

SharedMemory::~SharedMemory() {
  for (const Part& part : parts_) {
    if (part.begin != nullptr) munmap(part.begin, part.bytes);
  }
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
