// Handlers of the host, run on operands of the device.
#include "nccl/host_fallback.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/cache_line.h"
#include "common/status.h"
#include "nccl/device.h"

namespace jfog::nccl {
namespace {

// Stands in for XLA_FFI_Future: a future created through the GPU runtime's API
// table cannot be awaited here. Both who
// completes it and who waits own it.
class HostFuture {
 public:
  void Complete(XLA_FFI_Error* error) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = error;
      is_complete_ = true;
      changed_.notify_all();
    }
    Drop();
  }
  XLA_FFI_Error* Wait() {
    XLA_FFI_Error* error;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return is_complete_; });
      error = error_;
    }
    Drop();
    return error;
  }

 private:
  void Drop() {
    if (owners_.fetch_sub(1) == 1) delete this;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  XLA_FFI_Error* error_ = nullptr;
  bool is_complete_ = false;
  std::atomic<int> owners_{2};
};

HostFuture* Of(XLA_FFI_Future* future) {
  return reinterpret_cast<HostFuture*>(future);
}

XLA_FFI_Error* CreateFuture(XLA_FFI_Future_Create_Args* args) {
  args->future = reinterpret_cast<XLA_FFI_Future*>(new HostFuture);
  return nullptr;
}

XLA_FFI_Error* SetAvailable(XLA_FFI_Future_SetAvailable_Args* args) {
  Of(args->future)->Complete(nullptr);
  return nullptr;
}

XLA_FFI_Error* SetError(XLA_FFI_Future_SetError_Args* args) {
  Of(args->future)->Complete(args->error);
  return nullptr;
}

// XLA's table with our futures. It stays, for handlers keep it.
const XLA_FFI_Api* HostApi(const XLA_FFI_Api* api) {
  static const XLA_FFI_Api* const made = [api] {
    auto* host = new XLA_FFI_Api(*api);
    host->struct_size = sizeof(*host);
    host->XLA_FFI_Future_Create = CreateFuture;
    host->XLA_FFI_Future_SetAvailable = SetAvailable;
    host->XLA_FFI_Future_SetError = SetError;
    return host;
  }();
  return made;
}

std::size_t BytesOf(const XLA_FFI_Buffer& buffer) {
  std::size_t bytes = ffi::ByteWidth(
      static_cast<ffi::DataType>(buffer.dtype));  // 0 for a token
  for (std::int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.dims[i];
  return bytes;
}

XLA_FFI_Error* ToXla(const XLA_FFI_Api* api, const ffi::Error& error) {
  return error.success() ? nullptr : ffi::internal::CreateError(api, error);
}

ffi::Error Check(int code, const char* function) {
  if (code == kCudaSuccess) return ffi::Error::Success();
  return MakeError(ffi::ErrorCode::kInternal,
                   std::string("an operation on windows failed in ") +
                       function + ": " + CudaErrorText(code));
}

// One side's buffers: those of the device, and their copies in the host's
// memory.
class Copies {
 public:
  Copies(void** buffers, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) {
      device_.push_back(static_cast<const XLA_FFI_Buffer*>(buffers[i]));
      host_.push_back(*device_.back());
      places_.push_back(bytes_);
      bytes_ += AlignUp(BytesOf(host_.back()));
    }
    for (XLA_FFI_Buffer& buffer : host_) pointers_.push_back(&buffer);
  }

  std::size_t bytes() const { return bytes_; }
  void** pointers() { return pointers_.data(); }
  void Place(std::byte* memory) {
    for (std::size_t i = 0; i < host_.size(); ++i) {
      if (BytesOf(host_[i]) > 0) host_[i].data = memory + places_[i];
    }
  }
  ffi::Error CopyIn(CudaStream stream) const {
    for (std::size_t i = 0; i < host_.size(); ++i) {
      const std::size_t bytes = BytesOf(host_[i]);
      if (bytes == 0) continue;
      JFOG_RETURN_IF_ERROR(Check(
          Cuda().copy_to_host(host_[i].data,
                              reinterpret_cast<DevicePointer>(device_[i]->data),
                              bytes, stream),
          "cuMemcpyDtoHAsync"));
    }
    return ffi::Error::Success();
  }
  ffi::Error CopyOut(CudaStream stream) const {
    for (std::size_t i = 0; i < host_.size(); ++i) {
      const std::size_t bytes = BytesOf(host_[i]);
      if (bytes == 0) continue;
      JFOG_RETURN_IF_ERROR(
          Check(Cuda().copy_to_device(
                    reinterpret_cast<DevicePointer>(device_[i]->data),
                    host_[i].data, bytes, stream),
                "cuMemcpyHtoDAsync"));
    }
    return ffi::Error::Success();
  }

 private:
  std::vector<const XLA_FFI_Buffer*> device_;
  std::vector<XLA_FFI_Buffer> host_;
  std::vector<std::size_t> places_;
  std::vector<void*> pointers_;
  std::size_t bytes_ = 0;
};

// Calls the handler of the host with copies of the buffers, and waits for its
// completion.
XLA_FFI_Error* CallHost(XLA_FFI_Handler* host, const XLA_FFI_CallFrame& frame,
                        Copies& operands, Copies& results) {
  XLA_FFI_CallFrame call = frame;
  call.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  call.api = HostApi(frame.api);
  call.args.args = operands.pointers();
  call.rets.rets = results.pointers();
  call.future = nullptr;
  XLA_FFI_Error* error = host(&call);
  if (error != nullptr || call.future == nullptr) return error;
  return Of(call.future)->Wait();
}

XLA_FFI_Error* Run(XLA_FFI_Handler* host, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr ||
      frame->stage != XLA_FFI_ExecutionStage_EXECUTE) {
    return host(frame);
  }
  const XLA_FFI_Api* api = frame->api;
  XLA_FFI_Stream_Get_Args get{};
  get.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
  get.ctx = frame->ctx;
  if (XLA_FFI_Error* error = api->XLA_FFI_Stream_Get(&get)) return error;
  const auto stream = static_cast<CudaStream>(get.stream);

  CudaContext context = nullptr;
  ffi::Error error =
      Check(Cuda().stream_get_context(stream, &context), "cuStreamGetCtx");
  if (error.failure()) return ToXla(api, error);
  const std::shared_ptr<Device> device = Device::Of(context);
  if (device == nullptr) {
    return ToXla(api, MakeError(ffi::ErrorCode::kFailedPrecondition,
                                "an operation on windows on a communicator "
                                "that was shut down"));
  }
  const ContextGuard guard(context);
  Copies operands(frame->args.args, frame->args.size);
  Copies results(frame->rets.rets, frame->rets.size);
  Buffer memory;
  error = Check(guard.code(), "cuCtxPushCurrent");
  if (error.success()) {
    error = Check(device->pinned().Take(operands.bytes() + results.bytes(),
                                        stream, &memory),
                  "cuMemAllocHost");
  }
  if (error.failure()) return ToXla(api, error);
  operands.Place(memory.host());
  results.Place(memory.host() + operands.bytes());
  const auto synchronize = [&](ffi::Error copied) {
    if (copied.success()) {
      copied = Check(Cuda().stream_synchronize(stream), "cuStreamSynchronize");
    }
    // The device may still write there.
    if (copied.failure()) memory.Leak();
    return copied;
  };
  error = synchronize(operands.CopyIn(stream));
  if (error.failure()) return ToXla(api, error);
  if (XLA_FFI_Error* failed = CallHost(host, *frame, operands, results)) {
    return failed;
  }
  return ToXla(api, synchronize(results.CopyOut(stream)));
}

// XLA takes plain functions, so every handler gets one of these.
constexpr std::size_t kTrampolines = 32;
std::array<XLA_FFI_Handler*, kTrampolines> hosts{};

template <std::size_t kIndex>
XLA_FFI_Error* Trampoline(XLA_FFI_CallFrame* frame) {
  return Run(hosts[kIndex], frame);
}

template <std::size_t... kIndices>
constexpr std::array<XLA_FFI_Handler*, kTrampolines> MakeTrampolines(
    std::index_sequence<kIndices...>) {
  return {&Trampoline<kIndices>...};
}

constexpr auto kAll = MakeTrampolines(std::make_index_sequence<kTrampolines>());

}  // namespace

XLA_FFI_Handler* Staged(XLA_FFI_Handler* host) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  for (std::size_t i = 0; i < kTrampolines; ++i) {
    if (hosts[i] != nullptr && hosts[i] != host) continue;
    hosts[i] = host;
    return kAll[i];
  }
  return nullptr;
}

}  // namespace jfog::nccl
