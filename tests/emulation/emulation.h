// NCCL and the CUDA driver on a machine without a GPU, for tests: device memory
// is host memory, streams are threads, and ranks are processes with sockets.
//
// Functions for production have NVIDIA's names and nccl/api.h's types. Queries
// for tests are at the end of cuda.cc; the environment variables are
//
//   JFOG_EMULATION_STRICT=S      for wrong calls, which are counted in any
//   case:
//                                1 prints them (default), 2 aborts, 0 nothing
//   JFOG_EMULATION_VERSION=N     the result of ncclGetVersion
//   JFOG_EMULATION_DELAY_MS=N    each NCCL operation first sleeps
//   JFOG_EMULATION_HANG_INIT=R   communicators of rank R never connect
//   JFOG_EMULATION_MISMATCH=garbage   messages of unequal sizes end
//                                with garbage, as NCCL's small ones do, instead
//                                of hanging
//   JFOG_EMULATION_MEMORY=N      bytes of device memory
//   JFOG_EMULATION_FAIL=F:N:C    the N-th call of function F returns code C
#ifndef JFOG_TESTS_EMULATION_EMULATION_H_
#define JFOG_TESTS_EMULATION_EMULATION_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl/api.h"

// Opens every exported function: counts the call, and fails it on request.
#define JFOG_ENTER(type)                                         \
  do {                                                           \
    if (const int injected = ::jfog::emulation::Enter(__func__)) \
      return static_cast<type>(injected);                        \
  } while (false)

namespace jfog::emulation {

// The value of an environment variable, which may change between calls.
long Setting(const char* name, long otherwise);

int Enter(const char* function);

// Counts and prints a wrong call of production.
void Fault(const std::string& text);

// The objects behind handles. A handle's number is never used again, so that
// handles of ended objects are detected.
template <typename T>
class Registry {
 public:
  void* Add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    void* const handle = reinterpret_cast<void*>(next_ += 16);
    objects_[handle] = std::move(object);
    return handle;
  }
  std::shared_ptr<T> Find(const void* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }
  std::shared_ptr<T> Remove(const void* handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return nullptr;
    std::shared_ptr<T> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }
  std::size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return objects_.size();
  }

 private:
  std::mutex mutex_;
  std::uintptr_t next_ = 0x1000;
  std::map<const void*, std::shared_ptr<T>> objects_;
};

// Runs closures in their order on a thread of its own.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  static std::shared_ptr<Stream> Create();
  void Enqueue(std::function<void()> work);
  // Waits for the work that was enqueued before.
  void Synchronize();
  // The thread ends once the queue is empty.
  void End();

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::uint64_t enqueued_ = 0;
  std::uint64_t done_ = 0;
  bool ending_ = false;
};

// These three live as long as the process, whose threads may outlast main().
Registry<Stream>& Streams();

// XLA's stream.
nccl::CudaStream MainStream();

// The contexts that are current on this thread, the innermost last.
std::vector<nccl::CudaContext>& ContextStack();

// Whether a context is current; else a fault.
bool HasContext(const char* function);

enum class Memory { kDevice, kHost };

// Whether the bytes may be used as memory of that kind: they are not known to
// be of the other one, freed, or beyond the end of an allocation. Else a fault.
bool CheckMemory(const char* function, const void* begin, std::size_t bytes,
                 Memory memory);

// The number of NCCL groups that moved something, and of communicators.
long GroupCount();
std::size_t CommunicatorCount();

}  // namespace jfog::emulation

#endif  // JFOG_TESTS_EMULATION_EMULATION_H_
