// The CUDA device of a process: its context, and owners of streams, events and
// memory. Functions that can fail return the driver's code.
#ifndef JFOG_XLA_OPS_NCCL_DEVICE_H_
#define JFOG_XLA_OPS_NCCL_DEVICE_H_

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl/dynamic_library.h"

namespace jfog::nccl {

// "CUDA_ERROR_OUT_OF_MEMORY (2)".
std::string CudaErrorText(int code);

// Makes a context the current one of this thread, for as long as it lives.
class ContextGuard {
 public:
  explicit ContextGuard(CudaContext context)
      : code_(Cuda().push_context(context)) {}
  ~ContextGuard() {
    CudaContext popped;
    if (code_ == kCudaSuccess) Cuda().pop_context(&popped);
  }
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  int code() const { return code_; }

 private:
  int code_;
};

class Device;

// Must not outlive its device.
class Event {
 public:
  explicit Event(Device* device) : device_(device) {}
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  int Record(CudaStream stream);
  // Lets what comes on the stream from now on wait for what was recorded.
  int Delay(CudaStream stream) const;
  // kCudaNotReady until what was recorded has passed.
  int Query() const;
  bool HasPassed() const { return Query() == kCudaSuccess; }

 private:
  Device* const device_;
  CudaEvent event_ = nullptr;
};

// A piece of a pool's memory, which goes back there at its end.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { Release(); }

  explicit operator bool() const { return pool_ != nullptr; }
  DevicePointer device() const { return address_; }
  std::byte* host() const { return reinterpret_cast<std::byte*>(address_); }

  // Its last use ends with this event: who gets the memory next waits for it.
  void UsedUntil(std::shared_ptr<Event> event) { until_ = std::move(event); }
  // The memory may be in use for ever: it is not reused.
  void Leak() { pool_ = nullptr; }
  void Release();

 private:
  friend class Pool;

  class Pool* pool_ = nullptr;
  DevicePointer address_ = 0;
  std::size_t bytes_ = 0;
  std::shared_ptr<Event> until_;
};

// Memory of the device, or of the host where copies to and from the device can
// be asynchronous. It grows, and is never waited for.
class Pool {
 public:
  enum Kind { kDevice, kHost };

  Pool(Kind kind, CudaContext context) : kind_(kind), context_(context) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Memory that is used on a stream first, or if it is the host's, at once.
  int Take(std::size_t bytes, CudaStream stream, Buffer* buffer);

 private:
  friend class Buffer;

  struct Piece {
    DevicePointer address;
    std::shared_ptr<Event> until;
  };

  int Allocate(std::size_t bytes, DevicePointer* address);
  int Grow(std::size_t bytes);
  void Free(DevicePointer address);
  // Returns unused memory to the driver.
  void Trim();

  const Kind kind_;
  const CudaContext context_;
  std::mutex mutex_;
  std::map<std::size_t, std::vector<Piece>> free_;  // by their bytes
  std::vector<DevicePointer> slabs_;                // of small pieces
};

// A device with its primary context, which it retains.
class Device {
 public:
  // The one of this ordinal; nullptr and an error's text if there is none.
  static std::shared_ptr<Device> Open(int ordinal, std::string* error);
  // The open one of a context, or nullptr.
  static std::shared_ptr<Device> Of(CudaContext context);

  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CudaContext context() const { return context_; }
  Pool& memory() { return *memory_; }
  Pool& pinned() { return *pinned_; }
  // For small copies beside everything else.
  CudaStream header_stream() const { return header_stream_; }
  std::shared_ptr<Event> MakeEvent() { return std::make_shared<Event>(this); }
  // A zero and a one in the host's memory, for ever.
  const std::byte* bits() const { return bits_.host(); }

 private:
  friend class Event;

  Device(int ordinal, CudaContext context)
      : ordinal_(ordinal),
        context_(context),
        memory_(std::make_unique<Pool>(Pool::kDevice, context)),
        pinned_(std::make_unique<Pool>(Pool::kHost, context)) {}

  int TakeEvent(CudaEvent* event);
  void KeepEvent(CudaEvent event);

  const int ordinal_;
  const CudaContext context_;
  std::unique_ptr<Pool> memory_;
  std::unique_ptr<Pool> pinned_;
  Buffer bits_;
  CudaStream header_stream_ = nullptr;
  std::mutex mutex_;
  std::vector<CudaEvent> events_;  // to be reused
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_DEVICE_H_
