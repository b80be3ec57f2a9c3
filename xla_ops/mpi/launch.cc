// From an XLA call to an operation in flight, and its completion.
#include "mpi/launch.h"

#include <sched.h>

#include <atomic>
#include <string>
#include <utility>

#include "common/weighted_sum.h"
#include "mpi/handles.h"
#include "mpi/progress_engine.h"

namespace jfog::mpi {
namespace {

// A call first polls for its messages itself: without a pause, then yielding
// the core in between, as long as something arrives. After this time without
// progress it leaves the operation to the progress engine.
constexpr int kPolls = 64;
constexpr std::chrono::microseconds kSpinFor{100};
// With more ranks than cores the peers have to run first, so it yields early
// and spins longer.
constexpr int kPollsOversubscribed = 16;
constexpr std::chrono::microseconds kSpinForOversubscribed{1000};
// Of an operation that waits for memory a poll is a few loads: many of them
// pass in the time of one message.
constexpr int kPollsOfMemory = 1000;
constexpr int kPollsOfMemoryOversubscribed = 2;
std::atomic<bool> is_oversubscribed{false};

}  // namespace

Engine::Waiter Completer(ffi::Promise promise) {
  return [promise = std::move(promise)](const ffi::Error& error) mutable {
    if (error.success()) {
      promise.SetAvailable();
    } else {
      promise.SetError(error);
    }
  };
}

void SetOversubscribed(bool oversubscribed) {
  is_oversubscribed.store(oversubscribed, std::memory_order_relaxed);
}

bool EndsSoon(Operation& operation) {
  const bool oversubscribed = is_oversubscribed.load(std::memory_order_relaxed);
  const Clock::duration patience =
      oversubscribed ? kSpinForOversubscribed : kSpinFor;
  // Polls in one turn, and turns without progress before the first yield.
  int polls = 1, turns = oversubscribed ? kPollsOversubscribed : kPolls;
  if (operation.waits_for_memory()) {
    polls = oversubscribed ? kPollsOfMemoryOversubscribed : kPollsOfMemory;
    turns = 1;
  }
  int quiet = 0;
  Clock::time_point quiet_since;
  while (!operation.finished()) {
    if (operation.Advance(polls)) {
      quiet = 0;
      continue;
    }
    if (++quiet < turns) continue;
    const Clock::time_point now = Clock::now();
    if (quiet == turns) quiet_since = now;
    if (now - quiet_since > patience) return operation.finished();
    sched_yield();
  }
  return true;
}

ffi::ErrorOr<Payload> ReadCall(ffi::RemainingArgs args, std::size_t first,
                               ffi::RemainingRets results, std::int64_t mode) {
  return ReadLeaves(args, first, mode == kWhole ? &results : nullptr);
}

ffi::Error CheckWeighable(const Payload& leaves, const char* name) {
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
    operation->trace().Record(TimelineEvent::kStarted);
    auto id = results.get<ffi::BufferR1<ffi::U32>>(0);
    if (!id) return id.error();
    Handles().Insert(operation, (*id)->typed_data());
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

}  // namespace jfog::mpi
