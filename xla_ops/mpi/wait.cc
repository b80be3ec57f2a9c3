// Completion of split operations: the handlers wait and poll.
#include "mpi/wait.h"

#include <cstring>
#include <memory>
#include <utility>

#include "common/fork.h"
#include "mpi/guarded_handler.h"
#include "mpi/handles.h"
#include "mpi/launch.h"
#include "mpi/progress_engine.h"

namespace jfog::mpi {
namespace {

// Copies the results of a started operation to those of the call.
void CopyResults(const Payload& from, const Payload& to) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    const std::size_t bytes = to[i].output_bytes();
    if (bytes > 0) std::memcpy(to[i].output, from[i].output, bytes);
  }
}

ffi::Error CheckResults(const Operation& operation, const Payload& results) {
  const Payload& own = operation.leaves();
  bool equal = own.size() == results.size();
  for (std::size_t i = 0; equal && i < own.size(); ++i) {
    equal = own[i].type == results[i].type &&
            own[i].output_count == results[i].output_count;
  }
  if (equal) return ffi::Error::Success();
  return MakeError(ffi::ErrorCode::kInvalidArgument,
                   "wait for " + operation.Title() + " (" + own.Describe() +
                       ") with results of another structure (" +
                       results.Describe() + ")");
}

ffi::Error ReadResults(ffi::RemainingRets rets, Payload* results) {
  for (std::size_t i = 0; i < rets.size(); ++i) {
    auto y = rets.get<ffi::AnyBuffer>(i);
    if (!y) return y.error();
    Leaf leaf{};
    leaf.type = (*y)->element_type();
    leaf.count = leaf.output_count = (*y)->element_count();
    leaf.output = static_cast<std::byte*>((*y)->untyped_data());
    results->leaves.push_back(leaf);
  }
  return ffi::Error::Success();
}

Completion WaitImpl(ffi::Token, ffi::BufferR1<ffi::U32> id, ffi::RemainingArgs,
                    ffi::Result<ffi::Token>, ffi::RemainingRets rets) {
  if (IsForked()) return ForkedError("wait");
  JFOG_ASSIGN_OR_RETURN(operation,
                        Handles().Find(id.typed_data(), true, "wait"));
  Payload results;
  JFOG_RETURN_IF_ERROR(ReadResults(rets, &results));
  JFOG_RETURN_IF_ERROR(CheckResults(*operation, results));
  operation->trace().Record(TimelineEvent::kAwaited);
  operation->Await();
  if (!EndsSoon(*operation)) {
    ffi::Promise promise;
    ffi::Future future(promise);
    auto shared = std::make_shared<Payload>(std::move(results));
    Engine::Waiter waiter =
        [operation = operation.get(), shared,
         complete = Completer(std::move(promise))](const ffi::Error& error) {
          if (error.success()) CopyResults(operation->leaves(), *shared);
          complete(error);
        };
    // The operation may end in between; then the waiter was not kept.
    if (Engine::Get().Attach(operation, waiter)) return future;
    results = std::move(*shared);
  }
  if (operation->error().failure()) return operation->error();
  CopyResults(operation->leaves(), results);
  return ffi::Error::Success();
}

ffi::Error PollImpl(ffi::Token, ffi::BufferR1<ffi::U32> id,
                    ffi::Result<ffi::Token>,
                    ffi::Result<ffi::BufferR0<ffi::PRED>> ended) {
  if (IsForked()) return ForkedError("poll");
  JFOG_ASSIGN_OR_RETURN(operation,
                        Handles().Find(id.typed_data(), false, "poll"));
  operation->Advance();
  *ended->typed_data() = operation->finished();
  return ffi::Error::Success();
}

}  // namespace

JFOG_DEFINE_HANDLER(Wait, "wait", WaitImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()               // order in
                        .Arg<ffi::BufferR1<ffi::U32>>()  // handle
                        .RemainingArgs()                 // those of its start
                        .Ret<ffi::Token>()               // order out
                        .RemainingRets());               // its results

JFOG_DEFINE_HANDLER(Poll, "poll", PollImpl,
                    ffi::Ffi::Bind()
                        .Arg<ffi::Token>()                  // order in
                        .Arg<ffi::BufferR1<ffi::U32>>()     // handle
                        .Ret<ffi::Token>()                  // order out
                        .Ret<ffi::BufferR0<ffi::PRED>>());  // ended

}  // namespace jfog::mpi
