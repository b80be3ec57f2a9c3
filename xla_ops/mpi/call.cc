// From a call of XLA's to an operation and back: every handler ends here.
#include "mpi/call.h"

#include <sched.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/progress_engine.h"

namespace jfog::mpi {
namespace {

// A call first looks for its messages itself: without a pause, then letting
// others run in between, and as long as something comes. When nothing has come
// for this long it waits for somebody, which is the engine's work.
constexpr int kPolls = 64;
constexpr std::chrono::microseconds kSpinFor{100};
// With more ranks than cores the others have to run first, and giving a core
// away costs nothing.
constexpr int kPollsOversubscribed = 16;
constexpr std::chrono::microseconds kSpinForOversubscribed{1000};
std::atomic<bool> is_oversubscribed{false};
// That many handles nobody waits for are likely to be a mistake.
constexpr std::size_t kManyHandles = 1000;

Engine::Waiter Completer(ffi::Promise promise) {
  return [promise = std::move(promise)](const ffi::Error& error) mutable {
    if (error.success()) {
      promise.SetAvailable();
    } else {
      promise.SetError(error);
    }
  };
}

struct Handles {
  std::mutex mutex;
  std::map<std::uint32_t, std::shared_ptr<Operation>> open;
  std::uint32_t next = 1;
  bool warned = false;
};

// Never destroyed: programs may still run while the process ends.
Handles& TheHandles() {
  static Handles* handles = new Handles;
  return *handles;
}

// The number is written and read under the lock: XLA passes it from one thread
// to another, and ThreadSanitizer knows nothing of how.
void Insert(std::shared_ptr<Operation> operation, std::uint32_t* id) {
  Handles& handles = TheHandles();
  std::lock_guard<std::mutex> lock(handles.mutex);
  if (handles.open.size() >= kManyHandles && !handles.warned) {
    handles.warned = true;
    std::fprintf(stderr,
                 "jfog: %zu operations were started and not waited on; each "
                 "keeps a copy of its leaves until jfog.wait\n",
                 handles.open.size());
  }
  *id = handles.next++;
  handles.open.emplace(*id, std::move(operation));
}

// The operation of a handle; with `take` the handle ends.
ffi::ErrorOr<std::shared_ptr<Operation>> Find(const std::uint32_t* id,
                                              bool take, const char* name) {
  Handles& handles = TheHandles();
  std::lock_guard<std::mutex> lock(handles.mutex);
  const auto found = handles.open.find(*id);
  if (found == handles.open.end()) {
    return ffi::Unexpected(MakeError(
        ffi::ErrorCode::kFailedPrecondition,
        std::string(name) + " on handle " + std::to_string(*id) +
            ", which is not open: a handle is waited on once, before the "
            "shutdown of its communicator"));
  }
  std::shared_ptr<Operation> operation = found->second;
  if (take) handles.open.erase(found);
  return operation;
}

// Copies the results of a started operation to those of the call.
void CopyResults(const Leaves& from, const Leaves& to) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    const std::size_t bytes = to[i].output_bytes();
    if (bytes > 0) std::memcpy(to[i].output, from[i].output, bytes);
  }
}

ffi::Error CheckResults(const Operation& operation, const Leaves& results) {
  const Leaves& own = operation.leaves();
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

ffi::Error ReadResults(ffi::RemainingRets rets, Leaves* results) {
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

Completion WaitImpl(ffi::Token, ffi::BufferR0<ffi::U32> id, ffi::RemainingArgs,
                    ffi::Result<ffi::Token>, ffi::RemainingRets rets) {
  JFOG_ASSIGN_OR_RETURN(operation, Find(id.typed_data(), true, "wait"));
  Leaves results;
  JFOG_RETURN_IF_ERROR(ReadResults(rets, &results));
  JFOG_RETURN_IF_ERROR(CheckResults(*operation, results));
  operation->Await();
  if (!EndsSoon(*operation)) {
    ffi::Promise promise;
    ffi::Future future(promise);
    auto shared = std::make_shared<Leaves>(std::move(results));
    Engine::Waiter waiter =
        [operation = operation.get(), shared,
         fulfil = Completer(std::move(promise))](const ffi::Error& error) {
          if (error.success()) CopyResults(operation->leaves(), *shared);
          fulfil(error);
        };
    if (Engine::Get().Attach(operation, waiter)) return future;
    results = std::move(*shared);
  }
  if (operation->error().failure()) return operation->error();
  CopyResults(operation->leaves(), results);
  return ffi::Error::Success();
}

ffi::Error PollImpl(ffi::Token, ffi::BufferR0<ffi::U32> id,
                    ffi::Result<ffi::Token>,
                    ffi::Result<ffi::BufferR0<ffi::PRED>> ended) {
  auto operation = Find(id.typed_data(), false, "poll");
  if (!operation) return operation.error();
  (*operation)->Advance();
  *ended->typed_data() = (*operation)->finished();
  return ffi::Error::Success();
}

}  // namespace

void SetOversubscribed(bool oversubscribed) {
  is_oversubscribed.store(oversubscribed, std::memory_order_relaxed);
}

bool EndsSoon(Operation& operation) {
  const bool oversubscribed = is_oversubscribed.load(std::memory_order_relaxed);
  const int limit = oversubscribed ? kPollsOversubscribed : kPolls;
  const Clock::duration patience =
      oversubscribed ? kSpinForOversubscribed : kSpinFor;
  int polls = 0;
  Clock::time_point quiet_since;
  while (!operation.finished()) {
    if (operation.Advance()) {
      polls = 0;
      continue;
    }
    if (++polls < limit) continue;
    const Clock::time_point now = Clock::now();
    if (polls == limit) quiet_since = now;
    if (now - quiet_since > patience) return operation.finished();
    sched_yield();
  }
  return true;
}

ffi::Error CheckReady(Communicator* comm, const char* name) {
  if (comm == nullptr || comm->closed()) {
    return MakeError(
        ffi::ErrorCode::kFailedPrecondition,
        std::string(name) + " on a communicator that was shut down");
  }
  return comm->Refusal();
}

ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const char* name) {
  std::shared_ptr<Communicator> comm = Lookup(context);
  ffi::Error error = CheckReady(comm.get(), name);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return comm;
}

ffi::ErrorOr<Leaves> ReadCall(ffi::RemainingArgs args, std::size_t first,
                              ffi::RemainingRets results, std::int64_t mode) {
  return ReadLeaves(args, first, mode == kWhole ? &results : nullptr);
}

ffi::Error CheckWeighable(const Leaves& leaves, const char* name) {
  for (const Leaf& leaf : leaves) {
    if (!HasWeightedSum(leaf.type)) {
      return MakeError(
          ffi::ErrorCode::kInvalidArgument,
          std::string(name) + " has no weighted sum of " + NameOf(leaf.type));
    }
  }
  return ffi::Error::Success();
}

Completion Launch(std::shared_ptr<Operation> operation,
                  ffi::RemainingRets results, std::int64_t mode) {
  operation->Start();
  if (mode == kStart) {
    auto id = results.get<ffi::BufferR0<ffi::U32>>(0);
    if (!id) return id.error();
    Insert(operation, (*id)->typed_data());
    Engine::Get().Submit(std::move(operation), nullptr);
    return ffi::Error::Success();
  }
  if (EndsSoon(*operation)) return operation->error();
  return HandOver(std::move(operation));
}

ffi::Future HandOver(std::shared_ptr<Operation> operation) {
  operation->Await();
  ffi::Promise promise;
  ffi::Future future(promise);
  Engine::Get().Submit(std::move(operation), Completer(std::move(promise)));
  return future;
}

int ForgetHandles(const Communicator& comm) {
  Handles& handles = TheHandles();
  std::lock_guard<std::mutex> lock(handles.mutex);
  int forgotten = 0;
  for (auto it = handles.open.begin(); it != handles.open.end();) {
    if (it->second->IsOn(comm)) {
      it = handles.open.erase(it);
      ++forgotten;
    } else {
      ++it;
    }
  }
  return forgotten;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Wait, WaitImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()               // order in
                                  .Arg<ffi::BufferR0<ffi::U32>>()  // handle
                                  .RemainingArgs()    // those of its start
                                  .Ret<ffi::Token>()  // order out
                                  .RemainingRets());  // its results

XLA_FFI_DEFINE_HANDLER_SYMBOL(Poll, PollImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Token>()               // order in
                                  .Arg<ffi::BufferR0<ffi::U32>>()  // handle
                                  .Ret<ffi::Token>()               // order out
                                  .Ret<ffi::BufferR0<ffi::PRED>>());  // ended

}  // namespace jfog::mpi
