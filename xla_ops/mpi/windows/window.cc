// Windows of this process: a value that each rank exposes, and slots that its
// in-neighbors write.
#include "mpi/windows/window.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <random>
#include <utility>

#include "common/deadline.h"
#include "common/fork.h"
#include "common/process_wide.h"
#include "common/registry.h"
#include "common/weighted_sum.h"
#include "mpi/collective.h"

namespace jfog::mpi {
namespace {

constexpr std::chrono::microseconds kWindowNap{100};

// The windows of this process.
struct Windows {
  // Handles start at random, so that a handle of an earlier process, for
  // instance in a checkpoint, does not match a window of this one.
  Registry<Window, std::uint32_t> open{std::random_device()()};
  std::mutex mutex;  // guards all below
  // The numbers of windows that communicators have made so far.
  std::map<const Communicator*, std::uint64_t> made;
  bool ended = false;
};

}  // namespace

ffi::ErrorOr<std::shared_ptr<Window>> Window::Make(
    const std::shared_ptr<Communicator>& comm, WindowPlan plan,
    Payload payload) {
  for (const Leaf& leaf : payload) {
    if (!HasSum(leaf.type)) {
      return ffi::Unexpected(MakeError(
          ffi::ErrorCode::kInvalidArgument,
          std::string(kCreate) + " has no sums of " + NameOf(leaf.type)));
    }
  }
  Payload described;
  described.leaves = payload.leaves;
  described.ComputeOffsets();

  std::shared_ptr<Window> window(new Window);
  window->comm_ = comm;
  window->plan_ = std::move(plan);

  // p starts as 1, in the dtype that follows the arithmetic of the data.
  alignas(8) std::byte one[8];
  Leaf p{window->plan_.p_type, 1, 1, one, nullptr, 0};
  if (p.type == DataType::F64) {
    const double value = 1;
    std::memcpy(one, &value, sizeof(value));
  } else {
    const float value = 1;
    std::memcpy(one, &value, sizeof(value));
  }
  if (window->has_p()) payload.leaves.push_back(p);
  payload.ComputeOffsets();
  window->layout_.leaves = payload.leaves;
  window->layout_.ComputeOffsets();

  ffi::Error error = window->Expose(payload, std::move(described));
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return window;
}

// All ranks first agree that they make the same window. Then a rank opens the
// memory of the others on its machine, and makes its own known in this process.
// No rank writes before all have done both.
ffi::Error Window::Expose(const Payload& payload, Payload described) {
  const int records = 1 + static_cast<int>(plan_.sources.size());
  const std::size_t bytes = WindowMemory::Bytes(layout_.payload_bytes, records);
  shared_ = std::make_unique<SharedMemory>(bytes);
  JFOG_ASSIGN_OR_RETURN(origins,
                        CheckedGather(comm_, kCreate, std::move(described),
                                      plan_.variant, shared_->origin()));
  const std::vector<int> ranks = comm_->RanksOnMachine();
  const std::int32_t is_open =
      ranks.size() > 1 &&
      shared_->Open(origins, ranks,
                    WindowMemory::Bytes(layout_.payload_bytes, 1));
  std::byte* memory = shared_->own();
  if (memory == nullptr) {
    try {
      private_ = Buffer(bytes);
    } catch (const std::bad_alloc&) {
      comm_->FailAll(
          comm_->NextHeader(kCreate), ffi::ErrorCode::kResourceExhausted,
          std::string(kCreate) + " on rank " + std::to_string(comm_->rank()) +
              " has no memory for " + std::to_string(bytes) + " bytes");
      return comm_->Refusal();
    }
    memory = private_.get();
  }
  own_ = WindowMemory(memory, layout_.payload_bytes);
  own_.Initialize(records);
  FillRecords(payload);
  parts_.resize(comm_->size());
  parts_[comm_->rank()] = own_;
  Windows& windows = ProcessWide<Windows>();
  {
    std::lock_guard<std::mutex> lock(windows.mutex);
    global_id_ = windows.made[comm_.get()]++;
  }
  local_handle_ = windows.open.Add(shared_from_this());
  JFOG_ASSIGN_OR_RETURN(
      are_open, CheckedGather(comm_, kCreate, Payload(), global_id_, is_open));
  shared_->StopOffering();
  const bool is_shared = std::all_of(ranks.begin(), ranks.end(), [&](int rank) {
    return are_open[rank] != 0;
  });
  return is_shared ? UseParts(ranks) : ffi::Error::Success();
}

// Accesses the memory of these ranks, which is mapped here.
ffi::Error Window::UseParts(const std::vector<int>& ranks) {
  const std::size_t payload = layout_.payload_bytes;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const int rank = ranks[i];
    const std::size_t found = shared_->bytes(static_cast<int>(i));
    const std::size_t needed = WindowMemory::Bytes(payload, 1 + RecordAt(rank));
    if (found < needed) {
      comm_->FailAll(
          comm_->NextHeader(kCreate), ffi::ErrorCode::kFailedPrecondition,
          std::string(kCreate) + " on rank " + std::to_string(comm_->rank()) +
              " finds " + std::to_string(found) + " bytes on rank " +
              std::to_string(rank) + ", and needs " + std::to_string(needed));
      return comm_->Refusal();
    }
    parts_[rank] = WindowMemory(shared_->of(static_cast<int>(i)), payload);
  }
  return ffi::Error::Success();
}

// Every record starts as this rank's own value, or a slot as zero.
void Window::FillRecords(const Payload& payload) {
  WriteScaled(payload, 1, own_.payload(0));
  for (std::size_t k = 0; k < plan_.sources.size(); ++k) {
    std::byte* slot = own_.payload(1 + static_cast<int>(k));
    if (plan_.zero_init) {
      std::memset(slot, 0, payload.payload_bytes);
    } else {
      WriteScaled(payload, 1, slot);
    }
  }
}

bool Window::has_remote_parts() const {
  return !std::all_of(parts_.begin(), parts_.end(),
                      [](const WindowMemory& part) { return bool(part); });
}

Payload Window::PayloadAt(const std::byte* bytes) const {
  Payload payload;
  payload.leaves = layout_.leaves;
  payload.ComputeOffsets();
  for (Leaf& leaf : payload.leaves) leaf.input = bytes + leaf.offset;
  return payload;
}

ffi::Error Window::BindPayload(Payload* payload, const char* name) const {
  const std::size_t size = layout_.size() - has_p();
  bool matches = payload->size() == size;
  for (std::size_t i = 0; matches && i < size; ++i) {
    matches = (*payload)[i].type == layout_[i].type &&
              (*payload)[i].count == layout_[i].count;
  }
  if (!matches) {
    return MakeError(ffi::ErrorCode::kInvalidArgument,
                     std::string(name) + " of " + payload->Describe() +
                         " on a window of " + layout_.Describe());
  }
  if (has_p()) {
    // Read without the record's lock: only updates of this rank write its p,
    // and XLA runs this rank's window operations one after the other.
    Leaf p = layout_[size];
    p.input = own_.payload(0) + p.offset;
    payload->leaves.push_back(p);
    payload->ComputeOffsets();
  }
  return ffi::Error::Success();
}

int Window::RecordOf(int source) const {
  const auto& sources = plan_.sources;
  const auto found = std::find(sources.begin(), sources.end(), source);
  return found == sources.end() ? 0
                                : 1 + static_cast<int>(found - sources.begin());
}

int Window::RecordAt(int destination) const {
  const auto& all = plan_.destinations;
  const auto found = std::find(all.begin(), all.end(), destination);
  return found == all.end() ? 0 : 1 + plan_.slots[found - all.begin()];
}

ffi::Error Window::Acquire(TicketLock& lock, int rank,
                           const std::function<std::string()>& title) {
  std::optional<WaitTime> wait;  // a long one
  LockLook look;
  const auto may_wait = [&] {
    if (!wait) wait.emplace();
    comm_->LookForGone();
    if (comm_->IsGone(rank)) return false;
    FreeFromGone(lock, &look);
    return !comm_->failed() && Seconds(wait->Look()) < comm_->timeout();
  };
  if (lock.Acquire(comm_->rank(), may_wait)) return ffi::Error::Success();
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  if (comm_->IsGone(rank)) {
    // The caller looks for this reason, and leaves the rank out.
    return MakeError(ffi::ErrorCode::kUnavailable, title());
  }
  const std::int32_t holder = lock.holder();
  comm_->Fail(
      ffi::ErrorCode::kDeadlineExceeded,
      title() + " waited for a lock of the window of rank " +
          std::to_string(rank) + " that " +
          (holder == TicketLock::kNobody ? std::string("another rank")
                                         : "rank " + std::to_string(holder)) +
          " holds; has it died, or does it keep a win_mutex? (the "
          "limit is jfog.init(timeout=...))");
  return comm_->Refusal();
}

void Window::FreeFromGone(TicketLock& lock, LockLook* look) const {
  if (!comm_->any_gone()) return;
  look->Free(lock, [this](int rank) { return comm_->IsGone(rank); });
}

ffi::Error Window::LeaveOut(const std::string& title,
                            const std::vector<int>& gone) {
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  if (!comm_->reweights()) {
    comm_->Fail(ffi::ErrorCode::kUnavailable,
                title + " accesses the windows of " + RankList(gone) +
                    ", which has ended; jfog.recover() goes on with the "
                    "others");
    return comm_->Refusal();
  }
  for (int rank : gone) comm_->CountMissing(rank);
  return ffi::Error::Success();
}

bool Window::IsHeldByThisThread(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto holder = holders_.find(rank);
  return holder != holders_.end() &&
         holder->second == std::this_thread::get_id();
}

void Window::SetHolder(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  holders_[rank] = std::this_thread::get_id();
}

bool Window::ClearHolder(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return holders_.erase(rank) > 0;
}

ffi::Error Window::Free() {
  ProcessWide<Windows>().open.Remove(local_handle_);
  own_.head().state.store(WindowMemory::kFreed, std::memory_order_release);
  // Operations that this rank started still use the memory of other ranks.
  WaitTime wait;
  while (active_.load(std::memory_order_acquire) > 0) {
    JFOG_RETURN_IF_ERROR(comm_->Refusal());
    if (Seconds(wait.Look()) > comm_->timeout()) {
      comm_->Fail(ffi::ErrorCode::kDeadlineExceeded,
                  "win_free on rank " + std::to_string(comm_->rank()) +
                      " waited for operations that were started on the window "
                      "and do not end; has another rank died?");
    }
    std::this_thread::sleep_for(kWindowNap);
  }
  // After this barrier no rank has an operation in flight on any part.
  JFOG_RETURN_IF_ERROR(
      CheckedBarrier(comm_, "win_free", Payload(), global_id_));
  std::fill(parts_.begin(), parts_.end(), WindowMemory());
  own_ = WindowMemory();
  shared_ = nullptr;
  private_ = Buffer();
  return ffi::Error::Success();
}

ffi::ErrorOr<std::shared_ptr<Window>> FindWindow(const std::uint32_t* handle,
                                                 const char* name) {
  if (IsForked()) return ffi::Unexpected(ForkedError(name));
  const std::shared_ptr<Window> window =
      ProcessWide<Windows>().open.Find(handle);
  if (window == nullptr) {
    return ffi::Unexpected(
        MakeError(ffi::ErrorCode::kFailedPrecondition,
                  std::string(name) +
                      " on a window that is not open: it was freed, or its "
                      "communicator was shut down, or it was made in another "
                      "process; make one with jfog.win_create"));
  }
  ffi::Error error = window->comm()->Refusal();
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return window;
}

void WriteHandle(const Window& window, std::uint32_t* handle) {
  ProcessWide<Windows>().open.Write(window.local_handle(), handle);
}

std::shared_ptr<Window> FindWindow(const Communicator& comm,
                                   std::uint64_t global_id) {
  return ProcessWide<Windows>().open.FindIf([&](const Window& window) {
    return window.comm().get() == &comm && window.global_id() == global_id;
  });
}

WindowMemory::State GoneState(const Communicator& comm) {
  Windows& windows = ProcessWide<Windows>();
  std::lock_guard<std::mutex> lock(windows.mutex);
  const bool ended = windows.ended || comm.closed();
  return ended ? WindowMemory::kEnded : WindowMemory::kFreed;
}

void LeaveWindows(const Communicator* comm) {
  Windows& windows = ProcessWide<Windows>();
  {
    // Before the windows are removed: the service that finds none then reads
    // the reason here.
    std::lock_guard<std::mutex> lock(windows.mutex);
    if (comm == nullptr) {
      windows.ended = true;
    } else {
      windows.made.erase(comm);
    }
  }
  windows.open.RemoveIf([comm](const Window& window) {
    if (comm != nullptr && window.comm().get() != comm) return false;
    // Ranks that share the memory read the state there; remote ranks get it
    // from the service.
    window.own().head().state.store(WindowMemory::kEnded,
                                    std::memory_order_release);
    return true;
  });
}

}  // namespace jfog::mpi
