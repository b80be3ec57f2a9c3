// The start of a program that communicates, see program_effect in _compat.py.
#include "mpi/program.h"

#include <atomic>
#include <cstdint>
#include <string>

#include "common/status.h"
#include "mpi/guarded_handler.h"

namespace jfog::mpi {
namespace {

// The device on which this process's programs communicate; -1 before the first.
std::atomic<int> program_device{-1};

ffi::Error BeginImpl(std::int32_t device, ffi::Token, ffi::Result<ffi::Token>,
                     ffi::Result<ffi::BufferR0<ffi::PRED>> branch,
                     ffi::Result<ffi::BufferR2<ffi::F32>>) {
  *branch->typed_data() = false;
  int first = -1;
  if (program_device.compare_exchange_strong(first, device) ||
      first == device) {
    return ffi::Error::Success();
  }
  return MakeError(
      ffi::ErrorCode::kFailedPrecondition,
      "a program that communicates runs on device " + std::to_string(device) +
          " of this process, and one before it ran on device " +
          std::to_string(first) +
          ". XLA orders programs on one device only: place their arguments on "
          "one device, or set JFOG_ORDER=strict");
}

ffi::Error ReadyImpl(ffi::Token, ffi::BufferR2<ffi::F32>,
                     ffi::Result<ffi::Token>) {
  return ffi::Error::Success();
}

}  // namespace

void ResetProgramDevice() { program_device.store(-1); }

JFOG_DEFINE_HANDLER(ProgramBegin, "a program", BeginImpl,
                    ffi::Ffi::Bind()
                        .Ctx<ffi::DeviceOrdinal>()
                        .Arg<ffi::Token>()
                        .Ret<ffi::Token>()
                        .Ret<ffi::BufferR0<ffi::PRED>>()
                        .Ret<ffi::BufferR2<ffi::F32>>());

JFOG_DEFINE_HANDLER(ProgramReady, "a program", ReadyImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()
                        .Arg<ffi::BufferR2<ffi::F32>>()
                        .Ret<ffi::Token>());

}  // namespace jfog::mpi
