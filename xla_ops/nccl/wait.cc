// Completion of split operations: the handlers wait and poll.
#include "nccl/wait.h"

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "common/status.h"
#include "nccl/handles.h"

namespace jfog::nccl {
namespace {

using Number = ffi::BufferR1<ffi::U32>;  // two words
constexpr std::size_t kNumberBytes = 2 * sizeof(std::uint32_t);

ffi::Error Check(int code, const char* function, const char* name) {
  if (code == kCudaSuccess) return ffi::Error::Success();
  return MakeError(ffi::ErrorCode::kInternal, std::string(name) +
                                                  " failed in " + function +
                                                  ": " + CudaErrorText(code));
}

// Makes the device of a stream current, reads a handle there, and finds its
// operation; `take` closes the handle.
struct HandleLookup {
  std::optional<ContextGuard> guard;
  std::shared_ptr<Device> device;
  std::shared_ptr<Started> started;

  ffi::Error Find(CudaStream stream, const Number& number, bool take,
                  const char* name);
};

ffi::Error HandleLookup::Find(CudaStream stream, const Number& number,
                              bool take, const char* name) {
  CudaContext context = nullptr;
  JFOG_RETURN_IF_ERROR(Check(Cuda().stream_get_context(stream, &context),
                             "cuStreamGetCtx", name));
  device = Device::Of(context);
  if (device == nullptr) return HandleNotOpen("a handle", name);
  guard.emplace(context);
  JFOG_RETURN_IF_ERROR(Check(guard->code(), "cuCtxPushCurrent", name));
  Buffer copy;
  JFOG_RETURN_IF_ERROR(Check(device->pinned().Take(kNumberBytes, stream, &copy),
                             "cuMemAllocHost", name));
  ffi::Error error = Check(
      Cuda().copy_to_host(
          copy.host(), reinterpret_cast<DevicePointer>(number.untyped_data()),
          kNumberBytes, stream),
      "cuMemcpyDtoHAsync", name);
  if (error.success()) {
    error =
        Check(Cuda().stream_synchronize(stream), "cuStreamSynchronize", name);
  }
  if (error.failure()) {
    copy.Leak();
    return error;
  }
  std::uint32_t handle[2];
  std::memcpy(handle, copy.host(), sizeof(handle));
  JFOG_ASSIGN_OR_RETURN(open, Handles().Find(handle, take, name));
  started = std::move(open);
  return ffi::Error::Success();
}

// The first failure of the communicators that its operations are on.
ffi::Error RefusalOf(const Started& started) {
  for (const auto& operation : started.operations) {
    operation->comm().PollOldest(Clock::now());
    JFOG_RETURN_IF_ERROR(operation->comm().Refusal());
  }
  return started.comm->Refusal();
}

ffi::Error CheckResults(const Started& started, ffi::RemainingRets results) {
  bool is_equal = started.received.size() == results.size();
  for (std::size_t i = 0; is_equal && i < results.size(); ++i) {
    JFOG_ASSIGN_OR_RETURN(y, results.get<ffi::AnyBuffer>(i));
    is_equal = y->size_bytes() == started.received[i].bytes;
  }
  if (is_equal) return ffi::Error::Success();
  const std::string title = started.operations.empty()
                                ? "an operation"
                                : started.operations.back()->Title();
  return MakeError(ffi::ErrorCode::kInternal,
                   "wait for " + title + " with results of another structure");
}

ffi::Error WaitImpl(CudaStream stream, ffi::Token, Number number,
                    ffi::RemainingArgs, ffi::Result<ffi::Token>,
                    ffi::RemainingRets results, ffi::Dictionary) {
  constexpr const char* kName = "wait";
  HandleLookup found;
  JFOG_RETURN_IF_ERROR(found.Find(stream, number, /*take=*/true, kName));
  Started& started = *found.started;
  JFOG_RETURN_IF_ERROR(RefusalOf(started));
  JFOG_RETURN_IF_ERROR(CheckResults(started, results));
  const std::shared_ptr<Event> reached = found.device->MakeEvent();
  JFOG_RETURN_IF_ERROR(Check(reached->Record(stream), "cuEventRecord", kName));
  for (const auto& operation : started.operations) operation->Await(reached);
  JFOG_RETURN_IF_ERROR(
      Check(started.ended->Delay(stream), "cuStreamWaitEvent", kName));
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Started::Received& received = started.received[i];
    if (received.bytes == 0) continue;
    auto y = results.get<ffi::AnyBuffer>(i);
    JFOG_RETURN_IF_ERROR(
        Check(Cuda().copy_on_device(
                  reinterpret_cast<DevicePointer>((*y)->untyped_data()),
                  received.address, received.bytes, stream),
              "cuMemcpyDtoDAsync", kName));
  }
  started.last_use = found.device->MakeEvent();
  return Check(started.last_use->Record(stream), "cuEventRecord", kName);
}

ffi::Error PollImpl(CudaStream stream, ffi::Token, Number number,
                    ffi::Result<ffi::Token>,
                    ffi::Result<ffi::BufferR0<ffi::PRED>> ended,
                    ffi::Dictionary) {
  constexpr const char* kName = "poll";
  HandleLookup found;
  JFOG_RETURN_IF_ERROR(found.Find(stream, number, /*take=*/false, kName));
  // A failed operation has ended; its wait returns the error.
  const bool has_ended =
      RefusalOf(*found.started).failure() || found.started->ended->HasPassed();
  return Check(Cuda().copy_to_device(
                   reinterpret_cast<DevicePointer>(ended->untyped_data()),
                   found.device->bits() + (has_ended ? 1 : 0), 1, stream),
               "cuMemcpyHtoDAsync", kName);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclWait, WaitImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CudaStream>>()
                                  .Arg<ffi::Token>()  // order in
                                  .Arg<Number>()      // handle
                                  .RemainingArgs()    // those of its start
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets()    // its results
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(NcclPoll, PollImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<CudaStream>>()
                                  .Arg<ffi::Token>()                // order in
                                  .Arg<Number>()                    // handle
                                  .Ret<ffi::Token>()                // order out
                                  .Ret<ffi::BufferR0<ffi::PRED>>()  // ended
                                  .Attrs());

}  // namespace jfog::nccl
