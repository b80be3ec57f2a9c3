// Mutexes of windows, for jfog.win_mutex.
#include "mpi/windows/mutex.h"

#include <memory>
#include <stdexcept>
#include <string>

#include "mpi/windows/service.h"
#include "mpi/windows/transfer.h"
#include "mpi/windows/window.h"

namespace jfog::mpi {
namespace {

constexpr const char* kWinMutex = "win_mutex";

ffi::Error Lock(const std::shared_ptr<Window>& window, int rank) {
  // A second acquisition by the same thread would wait for itself.
  if (window->IsHeldByThisThread(rank)) {
    return MakeError(ffi::ErrorCode::kFailedPrecondition,
                     "win_mutex of rank " + std::to_string(rank) +
                         " inside of one that has taken it already");
  }
  const auto title = [&window] {
    return std::string(kWinMutex) + " on rank " +
           std::to_string(window->comm()->rank());
  };
  Communicator& comm = *window->comm();
  comm.LookForGone();
  if (comm.IsGone(rank)) return window->LeaveOut(title(), {rank});
  if (const WindowMemory& there = window->part(rank)) {
    ffi::Error error = window->Acquire(there.head().mutex, rank, title);
    if (error.failure() && comm.IsGone(rank)) {
      return window->LeaveOut(title(), {rank});
    }
    JFOG_RETURN_IF_ERROR(std::move(error));
  } else {
    JFOG_RETURN_IF_ERROR(RequestMutex(window, WindowRequest::kLock, rank));
    if (comm.IsGone(rank)) return ffi::Error::Success();
  }
  window->SetHolder(rank);
  return ffi::Error::Success();
}

ffi::Error Unlock(const std::shared_ptr<Window>& window, int rank) {
  // The mutex of a rank that has failed was not locked, or is left as it is.
  if (!window->ClearHolder(rank)) return ffi::Error::Success();
  if (const WindowMemory& there = window->part(rank)) {
    there.head().mutex.Release();
    return ffi::Error::Success();
  }
  if (window->comm()->IsGone(rank)) return ffi::Error::Success();
  return RequestMutex(window, WindowRequest::kUnlock, rank);
}

// All ranks take mutexes in ascending order, so no cycle of waits arises.
ffi::Error LockAll(const std::shared_ptr<Window>& window,
                   const std::vector<int>& ranks) {
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    ffi::Error error = Lock(window, ranks[i]);
    if (error.success()) continue;
    while (i > 0) Unlock(window, ranks[--i]);
    return error;
  }
  return ffi::Error::Success();
}

// Unlocks all of them, and returns the first error.
ffi::Error UnlockAll(const std::shared_ptr<Window>& window,
                     const std::vector<int>& ranks) {
  ffi::Error first;
  for (int rank : ranks) {
    ffi::Error error = Unlock(window, rank);
    if (first.success()) first = std::move(error);
  }
  return first;
}

// An exception with the text of the JaxRuntimeError of a handler's error.
void ThrowIf(const ffi::Error& error) {
  if (error.success()) return;
  throw std::runtime_error(StatusText(error));
}

}  // namespace

void LockWindow(std::uint32_t handle, const std::vector<int>& ranks) {
  auto window = FindWindow(&handle, kWinMutex);
  if (!window) return ThrowIf(window.error());
  ThrowIf(LockAll(*window, ranks));
}

void UnlockWindow(std::uint32_t handle, const std::vector<int>& ranks) {
  auto window = FindWindow(&handle, kWinMutex);
  if (!window) return ThrowIf(window.error());
  ThrowIf(UnlockAll(*window, ranks));
}

}  // namespace jfog::mpi
