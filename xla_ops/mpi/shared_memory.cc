// Memory shared by the ranks of one machine.
#include "mpi/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "common/cache_line.h"
#include "mpi/collective_start.h"

namespace jfog::mpi {
namespace {

using Origin = SharedMemory::Origin;

bool IsEnabled() {
  const char* text = std::getenv("JFOG_SHARED_MEMORY");
  return text == nullptr || std::strcmp(text, "0") != 0;
}

// `value` of each rank. Collective over `comm`.
template <typename Value>
std::vector<Value> Gather(const Value& value, MPI_Comm comm) {
  std::vector<Value> values(SizeOfComm(comm));
  Require(MPI_Allgather(&value, sizeof(Value), MPI_BYTE, values.data(),
                        sizeof(Value), MPI_BYTE, comm),
          "MPI_Allgather");
  return values;
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

std::unique_ptr<SharedMemory> SharedMemory::Make(MPI_Comm comm,
                                                 const std::vector<int>& ranks,
                                                 std::size_t bytes) {
  auto memory = std::make_unique<SharedMemory>(bytes);
  const std::vector<Origin> origins = Gather(memory->origin(), comm);
  const std::int32_t is_open =
      ranks.size() > 1 && memory->Open(origins, ranks, bytes);
  const std::vector<std::int32_t> are_open = Gather(is_open, comm);
  memory->StopOffering();
  const bool usable = std::all_of(ranks.begin(), ranks.end(), [&](int rank) {
    return are_open[rank] != 0;
  });
  return usable ? std::move(memory) : nullptr;
}

SharedMemory::SharedMemory(std::size_t bytes) {
  if (!IsEnabled()) return;
  origin_.process = getpid();
  origin_.file = memfd_create("jfog", MFD_CLOEXEC);
  const std::size_t mapped = AlignUp(bytes) + kCacheLine;
  const int file = static_cast<int>(origin_.file);
  if (file < 0 || ftruncate(file, static_cast<off_t>(mapped)) != 0) return;
  own_ = {Map(file, mapped), mapped};
  if (own_.begin == nullptr) return;
  origin_.bytes = mapped;
  std::random_device random;
  origin_.token = (std::uint64_t{random()} << 32) | random();
  *TokenIn(own_.begin, mapped) = origin_.token;
}

SharedMemory::~SharedMemory() {
  StopOffering();
  for (const Part& part : parts_) {
    const bool is_own = part.begin == own_.begin;
    if (part.begin != nullptr && !is_own) munmap(part.begin, part.bytes);
  }
  if (own_.begin != nullptr) munmap(own_.begin, own_.bytes);
}

bool SharedMemory::Open(const std::vector<Origin>& origins,
                        const std::vector<int>& ranks, std::size_t least) {
  if (own_.begin == nullptr) return false;
  parts_.resize(ranks.size());
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const Origin& origin = origins[ranks[i]];
    if (origin.token == origin_.token) {
      parts_[i] = own_;
      continue;
    }
    parts_[i] = {MapOther(origin, least), origin.bytes};
    if (parts_[i].begin == nullptr) return false;
  }
  return true;
}

void SharedMemory::StopOffering() {
  if (origin_.file >= 0) close(static_cast<int>(origin_.file));
  origin_.file = -1;
}

std::vector<int> PlacesIn(const std::vector<int>& ranks, int size) {
  std::vector<int> places(size, -1);
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    places[ranks[i]] = static_cast<int>(i);
  }
  return places;
}

}  // namespace jfog::mpi
