// From an XLA call to an operation in flight, and its completion.
#ifndef JFOG_XLA_OPS_MPI_LAUNCH_H_
#define JFOG_XLA_OPS_MPI_LAUNCH_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>

#include "common/call_plan.h"
#include "common/status.h"
#include "mpi/communicator.h"
#include "mpi/operation.h"
#include "mpi/progress_engine.h"

namespace jfog::mpi {

// The end of a call: an error or success now, or a future.
using Completion = std::variant<ffi::Error, ffi::Future>;

// The leaves of a call; staged, unless they are used and filled within it.
ffi::ErrorOr<Payload> ReadCall(ffi::RemainingArgs args, std::size_t first,
                               ffi::RemainingRets results, std::int64_t mode);

// An error, if the values of some leaf cannot be weighted and summed.
ffi::Error CheckWeighable(const Payload& leaves, const char* name);

// Starts the operation. A blocking call completes it: at once if its messages
// arrive within the spin time, or else through the progress engine.
Completion Launch(std::shared_ptr<Operation> operation,
                  ffi::RemainingRets results, std::int64_t mode);

// Spins briefly. Returns true if the operation completed; the caller may then
// reuse it.
bool EndsSoon(Operation& operation);
// Declares more ranks than cores: a call then yields its core whenever a poll
// finds nothing.
void SetOversubscribed(bool oversubscribed);
// Submits a started operation to the progress engine.
ffi::Future HandOver(std::shared_ptr<Operation> operation);
// Completes the promise of a call when its operation ends.
Engine::Waiter Completer(ffi::Promise promise);

}  // namespace jfog::mpi

namespace xla::ffi {

template <ExecutionStage stage>
struct ResultEncoding<stage, jfog::mpi::Completion> {
  static std::variant<XLA_FFI_Error*, XLA_FFI_Future*> Encode(
      const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* ctx,
      jfog::mpi::Completion completion) {
    if (auto* error = std::get_if<Error>(&completion)) {
      return ResultEncoding<stage, Error>::Encode(api, ctx, std::move(*error));
    }
    return ResultEncoding<stage, Future>::Encode(
        api, ctx, std::get<Future>(std::move(completion)));
  }
};

}  // namespace xla::ffi

#endif  // JFOG_XLA_OPS_MPI_LAUNCH_H_
