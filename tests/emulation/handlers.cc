// XLA FFI handlers for GPUs, made to run in XLA:CPU on the emulated stream.
#include <array>
#include <atomic>
#include <cstring>
#include <utility>

#include "emulation.h"
#include "xla/ffi/api/c_api.h"

namespace jfog::emulation {
namespace {

constexpr std::size_t kTrampolines = 128;

std::atomic<XLA_FFI_Handler*> handlers[kTrampolines];

XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* arguments) {
  arguments->stream = MainStream();
  return nullptr;
}

// XLA's table with our stream in it. Handlers may keep it.
const XLA_FFI_Api* ApiWithStream(const XLA_FFI_Api* api) {
  static std::mutex& mutex = *new std::mutex;
  static auto& copies = *new std::map<const XLA_FFI_Api*, XLA_FFI_Api*>;
  std::lock_guard<std::mutex> lock(mutex);
  XLA_FFI_Api*& copy = copies[api];
  if (!copy) {
    // XLA's may be longer than the header that this was built with.
    copy = static_cast<XLA_FFI_Api*>(::operator new(api->struct_size));
    std::memcpy(copy, api, api->struct_size);
    copy->XLA_FFI_Stream_Get = &GetStream;
  }
  return copy;
}

XLA_FFI_Error* Call(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start || frame->stage != XLA_FFI_ExecutionStage_EXECUTE)
    return handler(frame);
  XLA_FFI_CallFrame copy = *frame;
  copy.api = ApiWithStream(frame->api);
  // XLA:GPU promises no current context.
  std::vector<nccl::CudaContext> outer = std::exchange(ContextStack(), {});
  XLA_FFI_Error* const error = handler(&copy);
  if (!ContextStack().empty())
    Fault("a handler has left a context on the stack");
  ContextStack() = std::move(outer);
  // The buffers of XLA:CPU live until the call returns.
  Streams().Find(MainStream())->Synchronize();
  frame->future = copy.future;
  return error;
}

template <std::size_t i>
XLA_FFI_Error* Trampoline(XLA_FFI_CallFrame* frame) {
  return Call(handlers[i], frame);
}

template <std::size_t... i>
constexpr std::array<XLA_FFI_Handler*, sizeof...(i)> Trampolines(
    std::index_sequence<i...>) {
  return {&Trampoline<i>...};
}

}  // namespace

// A handler that does in XLA:CPU what the given one does in XLA:GPU; null if
// there are too many. The same handler gives the same one again.
extern "C" void* jfog_emulation_wrap(void* handler) {
  static constexpr auto trampolines =
      Trampolines(std::make_index_sequence<kTrampolines>());
  static std::mutex& mutex = *new std::mutex;
  std::lock_guard<std::mutex> lock(mutex);
  const auto wanted = reinterpret_cast<XLA_FFI_Handler*>(handler);
  for (std::size_t i = 0; i < kTrampolines; ++i) {
    if (!handlers[i]) handlers[i] = wanted;
    if (handlers[i] == wanted) return reinterpret_cast<void*>(trampolines[i]);
  }
  return nullptr;
}

}  // namespace jfog::emulation
