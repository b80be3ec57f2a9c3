// The CUDA device of a process: its context, and owners of streams, events and
// memory. Functions that can fail return the driver's code.
#include "nccl/device.h"

#include <algorithm>
#include <utility>

#include "common/process_wide.h"

namespace jfog::nccl {
namespace {

constexpr std::size_t kSmallest = 256;
// Pieces up to this size are allocated together.
constexpr std::size_t kSmall = 4096;
constexpr std::size_t kPieces = 32;

// Eight sizes between a power of two and the next, so that lengths that differ
// a little share their memory.
std::size_t SizeClass(std::size_t bytes) {
  std::size_t step = kSmallest;
  while (step * 16 <= bytes) step *= 2;
  return std::max(kSmallest, (bytes + step - 1) / step * step);
}

struct Devices {
  std::mutex mutex;
  std::map<int, std::weak_ptr<Device>> devices;
};

}  // namespace

std::string CudaErrorText(int code) {
  const char* name = nullptr;
  if (Cuda().get_error_name(code, &name) != kCudaSuccess || name == nullptr) {
    name = "error";
  }
  return std::string(name) + " (" + std::to_string(code) + ")";
}

Event::~Event() {
  if (event_ != nullptr) device_->KeepEvent(event_);
}

int Event::Record(CudaStream stream) {
  if (event_ == nullptr) {
    const int code = device_->TakeEvent(&event_);
    if (code != kCudaSuccess) return code;
  }
  return Cuda().event_record(event_, stream);
}

int Event::Delay(CudaStream stream) const {
  return event_ == nullptr ? kCudaSuccess
                           : Cuda().stream_wait_event(stream, event_, 0);
}

int Event::Query() const {
  return event_ == nullptr ? kCudaNotReady : Cuda().event_query(event_);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  Release();
  pool_ = std::exchange(other.pool_, nullptr);
  address_ = other.address_;
  bytes_ = other.bytes_;
  until_ = std::move(other.until_);
  return *this;
}

void Buffer::Release() {
  if (pool_ == nullptr) return;
  std::lock_guard<std::mutex> lock(pool_->mutex_);
  pool_->free_[bytes_].push_back({address_, std::move(until_)});
  pool_ = nullptr;
}

Pool::~Pool() {
  const ContextGuard guard(context_);
  for (const auto& [bytes, pieces] : free_) {
    if (bytes <= kSmall) continue;
    for (const Piece& piece : pieces) Free(piece.address);
  }
  for (DevicePointer slab : slabs_) Free(slab);
}

int Pool::Take(std::size_t bytes, CudaStream stream, Buffer* buffer) {
  const std::size_t size = SizeClass(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Piece>& pieces = free_[size];
  const auto is_idle = [](const Piece& piece) {
    return piece.until == nullptr || piece.until->HasPassed();
  };
  auto found = std::find_if(pieces.begin(), pieces.end(), is_idle);
  // A stream can wait for the last use of others' memory, but not the host.
  const bool waits =
      found == pieces.end() && kind_ == kDevice && !pieces.empty();
  if (waits) found = pieces.begin();
  if (found == pieces.end()) {
    int code = Grow(size);
    if (code != kCudaSuccess) {
      Trim();
      code = Grow(size);
    }
    if (code != kCudaSuccess) return code;
    found = pieces.end() - 1;
  }
  if (waits) {
    const int code = found->until->Delay(stream);
    if (code != kCudaSuccess) return code;
  }
  *buffer = Buffer();
  buffer->pool_ = this;
  buffer->address_ = found->address;
  buffer->bytes_ = size;
  pieces.erase(found);
  return kCudaSuccess;
}

int Pool::Allocate(std::size_t bytes, DevicePointer* address) {
  if (kind_ == kDevice) return Cuda().memory_allocate(address, bytes);
  void* host = nullptr;
  const int code = Cuda().host_allocate(&host, bytes);
  *address = reinterpret_cast<DevicePointer>(host);
  return code;
}

int Pool::Grow(std::size_t bytes) {
  const std::size_t count = bytes <= kSmall ? kPieces : 1;
  DevicePointer address = 0;
  const int code = Allocate(count * bytes, &address);
  if (code != kCudaSuccess) return code;
  if (count > 1) slabs_.push_back(address);
  for (std::size_t i = 0; i < count; ++i) {
    free_[bytes].push_back({address + i * bytes, nullptr});
  }
  return kCudaSuccess;
}

void Pool::Free(DevicePointer address) {
  if (kind_ == kDevice) {
    Cuda().memory_free(address);
  } else {
    Cuda().host_free(reinterpret_cast<void*>(address));
  }
}

void Pool::Trim() {
  for (auto& [bytes, pieces] : free_) {
    if (bytes <= kSmall) continue;
    const auto idle =
        std::partition(pieces.begin(), pieces.end(), [](const Piece& piece) {
          return piece.until != nullptr && !piece.until->HasPassed();
        });
    std::for_each(idle, pieces.end(),
                  [this](const Piece& piece) { Free(piece.address); });
    pieces.erase(idle, pieces.end());
  }
}

std::shared_ptr<Device> Device::Open(int ordinal, std::string* error) {
  Devices& devices = ProcessWide<Devices>();
  std::lock_guard<std::mutex> lock(devices.mutex);
  std::weak_ptr<Device>& kept = devices.devices[ordinal];
  if (std::shared_ptr<Device> device = kept.lock()) return device;
  int handle = 0;
  int code = Cuda().device_get(&handle, ordinal);
  const auto fail = [&](const char* function) {
    *error = std::string("failed in ") + function + " of CUDA device " +
             std::to_string(ordinal) + ": " + CudaErrorText(code);
    return nullptr;
  };
  if (code != kCudaSuccess) return fail("cuDeviceGet");
  CudaContext context = nullptr;
  code = Cuda().retain_primary_context(&context, handle);
  if (code != kCudaSuccess) return fail("cuDevicePrimaryCtxRetain");
  std::shared_ptr<Device> device(new Device(handle, context));
  const ContextGuard guard(context);
  code = guard.code();
  if (code != kCudaSuccess) return fail("cuCtxPushCurrent");
  code = Cuda().stream_create(&device->header_stream_, kStreamNonBlocking);
  if (code != kCudaSuccess) return fail("cuStreamCreate");
  code = device->pinned().Take(2, nullptr, &device->bits_);
  if (code != kCudaSuccess) return fail("cuMemAllocHost");
  device->bits_.host()[0] = std::byte{0};
  device->bits_.host()[1] = std::byte{1};
  kept = device;
  return device;
}

std::shared_ptr<Device> Device::Of(CudaContext context) {
  Devices& devices = ProcessWide<Devices>();
  std::lock_guard<std::mutex> lock(devices.mutex);
  for (const auto& [ordinal, kept] : devices.devices) {
    std::shared_ptr<Device> device = kept.lock();
    if (device != nullptr && device->context() == context) return device;
  }
  return nullptr;
}

Device::~Device() {
  {
    const ContextGuard guard(context_);
    bits_.Release();
    memory_.reset();
    pinned_.reset();
    for (CudaEvent event : events_) Cuda().event_destroy(event);
    if (header_stream_ != nullptr) Cuda().stream_destroy(header_stream_);
  }
  Cuda().release_primary_context(ordinal_);
}

int Device::TakeEvent(CudaEvent* event) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!events_.empty()) {
      *event = events_.back();
      events_.pop_back();
      return kCudaSuccess;
    }
  }
  return Cuda().event_create(event, kEventDisableTiming);
}

void Device::KeepEvent(CudaEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  events_.push_back(event);
}

}  // namespace jfog::nccl
