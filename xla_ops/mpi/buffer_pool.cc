// Memory that MPI sends from and receives into, reused between operations.
#include "mpi/buffer_pool.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "common/cache_line.h"
#include "common/out_of_memory.h"
#include "common/process_wide.h"

namespace jfog::mpi {
namespace {

// Eight sizes for each power of two, so that at most an eighth is unused.
constexpr int kSmallest = 8;  // 256 bytes
constexpr int kLargest = 47;
constexpr int kSteps = 8;
constexpr int kClasses = (kLargest - kSmallest) * kSteps + 1;
// Fresh pages cost more than the copy into them, so even large pieces are kept;
// what the pool holds beyond this goes back to the system.
constexpr std::size_t kKeep = std::size_t{256} << 20;

struct Pool {
  std::mutex mutex;
  std::array<std::vector<std::byte*>, kClasses> free;
  std::size_t kept = 0;
};

std::size_t BytesOf(int size_class) {
  const std::size_t below = std::size_t{1} << (kSmallest + size_class / kSteps);
  return AlignUp(below + below / kSteps * (size_class % kSteps));
}

int ClassOf(std::size_t bytes) {
  if (bytes > std::size_t{1} << kLargest) throw OutOfMemory(bytes);
  int size_class = 0;
  while (BytesOf(size_class + kSteps) < bytes) size_class += kSteps;
  while (BytesOf(size_class) < bytes) ++size_class;
  return size_class;
}

// Returns all free memory to the system.
void Empty(Pool& pool) {
  std::lock_guard<std::mutex> lock(pool.mutex);
  for (auto& free : pool.free) {
    for (std::byte* memory : free) std::free(memory);
    free.clear();
  }
  pool.kept = 0;
}

std::byte* Allocate(std::size_t bytes) {
  return static_cast<std::byte*>(std::aligned_alloc(kCacheLine, bytes));
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : size_class_(ClassOf(bytes)) {
  Pool& pool = ProcessWide<Pool>();
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    auto& free = pool.free[size_class_];
    if (!free.empty()) {
      memory_ = free.back();
      free.pop_back();
      pool.kept -= BytesOf(size_class_);
      return;
    }
  }
  memory_ = Allocate(BytesOf(size_class_));
  if (memory_ != nullptr) return;
  Empty(pool);
  memory_ = Allocate(BytesOf(size_class_));
  if (memory_ == nullptr) throw OutOfMemory(bytes);
}

Buffer::~Buffer() {
  if (memory_ == nullptr) return;
  Pool& pool = ProcessWide<Pool>();
  const std::size_t bytes = BytesOf(size_class_);
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.kept + bytes <= kKeep) {
      pool.free[size_class_].push_back(memory_);
      pool.kept += bytes;
      return;
    }
  }
  std::free(memory_);
}

}  // namespace jfog::mpi
