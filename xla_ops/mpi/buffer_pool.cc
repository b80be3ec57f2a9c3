// Memory that MPI sends from and receives into, reused between operations.
#include "mpi/buffer_pool.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common/cache_line.h"
#include "common/process_wide.h"

namespace jfog::mpi {
namespace {

constexpr int kSmallestClass = 8;  // 256 bytes
constexpr int kClasses = 48;
// Fresh pages cost more than the copy into them, so even large pieces are kept;
// what the pool holds beyond this goes back to the system.
constexpr std::size_t kKeep = std::size_t{256} << 20;

struct Pool {
  std::mutex mutex;
  std::array<std::vector<std::byte*>, kClasses> free;
  std::size_t kept = 0;
};

std::size_t BytesOf(int size_class) { return std::size_t{1} << size_class; }

int ClassOf(std::size_t bytes) {
  int size_class = kSmallestClass;
  while (BytesOf(size_class) < bytes) ++size_class;
  return size_class;
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
  memory_ = static_cast<std::byte*>(
      std::aligned_alloc(kCacheLine, BytesOf(size_class_)));
  if (memory_ == nullptr) throw std::bad_alloc();
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
