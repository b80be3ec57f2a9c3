// From a call of XLA's to an operation and back: every handler ends here.
#ifndef JFOG_XLA_OPS_MPI_CALL_H_
#define JFOG_XLA_OPS_MPI_CALL_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>

#include "common/status.h"
#include "mpi/communicator.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// How a call ended: with an error or success now, or in the future.
using Completion = std::variant<ffi::Error, ffi::Future>;

// What a handler does with its operation.
enum Mode : std::int64_t {
  kWhole = 0,  // its results are those of the call
  kStart = 1,  // the result is a handle, a number to wait for the operation by
};

// An error, if the communicator (null: it is gone) is not ready for work.
ffi::Error CheckReady(Communicator* comm, const char* name);
// The communicator of a call, ready for work.
ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const char* name);

// The leaves of a call; staged, unless they are used and filled within it.
ffi::ErrorOr<Leaves> ReadCall(ffi::RemainingArgs args, std::size_t first,
                              ffi::RemainingRets results, std::int64_t mode);

// An error, if the values of some leaf cannot be weighted and summed.
ffi::Error CheckWeighable(const Leaves& leaves, const char* name);

// Starts the operation and, in a whole call, completes it: at once if its
// messages come at once, or else by the engine.
Completion Launch(std::shared_ptr<Operation> operation,
                  ffi::RemainingRets results, std::int64_t mode);

XLA_FFI_DECLARE_HANDLER_SYMBOL(Wait);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Poll);

// The outcome of a started operation if it ends within the call's patience.
// Whoever gets `true` may use the operation again.
bool EndsSoon(Operation& operation);
// Says that there are more ranks than cores: a call then lets others run
// whenever it finds nothing.
void SetOversubscribed(bool oversubscribed);
// Leaves an operation that was started and has not ended to the engine.
ffi::Future HandOver(std::shared_ptr<Operation> operation);

// Forgets the handles of a communicator; returns how many were open.
int ForgetHandles(const Communicator& comm);

#define JFOG_ASSIGN_OR_RETURN(variable, expression)             \
  auto variable##_or = (expression);                            \
  if (!variable##_or) return Completion(variable##_or.error()); \
  auto& variable = *variable##_or

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

#endif  // JFOG_XLA_OPS_MPI_CALL_H_
