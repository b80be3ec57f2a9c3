// Memory that MPI sends from and receives into, reused between operations.
#ifndef JFOG_XLA_OPS_MPI_BUFFER_POOL_H_
#define JFOG_XLA_OPS_MPI_BUFFER_POOL_H_

#include <cstddef>
#include <utility>

namespace jfog::mpi {

// Memory aligned to a cache line that returns to a pool. MPI never gets a
// buffer of XLA: an operation that fails with messages in flight leaks its
// buffers, and XLA may reuse its own at once.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        size_class_(other.size_class_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_class_, other.size_class_);
    return *this;
  }

  std::byte* get() const { return memory_; }
  explicit operator bool() const { return memory_ != nullptr; }
  // Leaks the memory deliberately: it lives as long as the process.
  void Leak() { memory_ = nullptr; }

 private:
  std::byte* memory_ = nullptr;
  int size_class_ = 0;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_BUFFER_POOL_H_
