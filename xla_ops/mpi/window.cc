// Windows: what a rank exposes, and slots that its in-neighbors write.
#include "mpi/window.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <random>

#include "common/weighted_sum.h"
#include "mpi/collectives.h"
#include "mpi/window_service.h"
#include "mpi/window_transfer.h"

namespace jfog::mpi {
namespace {

constexpr std::chrono::microseconds kNap{100};

// What the windows of a communicator share.
struct Group {
  MPI_Comm machine = MPI_COMM_NULL;  // of ranks that share memory
  std::vector<int> local;            // of each rank its number there, or -1
  std::uint64_t windows = 0;         // made so far
};

struct Registry {
  std::mutex mutex;
  std::map<const Communicator*, Group> groups;
  std::map<std::uint32_t, std::shared_ptr<Window>> by_number;
  // A number of an earlier process, as a checkpoint may hold it, should not be
  // that of a window of this one.
  std::uint32_t next = std::random_device()();
  bool ended = false;
};

// Never destroyed: programs may still run while the process ends.
Registry& TheRegistry() {
  static Registry* registry = new Registry;
  return *registry;
}

// Collective, in the first window of a communicator.
Group MakeGroup(const Communicator& comm) {
  int lowest = comm.rank();
  for (int rank = comm.size() - 1; rank >= 0 && comm.lanes(); --rank) {
    if (comm.lanes()->Reaches(comm.RankInRoot(rank))) lowest = rank;
  }
  Group group;
  MPI_Comm_split(comm.comm(), lowest, comm.rank(), &group.machine);
  MPI_Comm_set_errhandler(group.machine, MPI_ERRORS_RETURN);
  group.local = RanksIn(comm.comm(), group.machine);
  return group;
}

}  // namespace

ffi::ErrorOr<std::shared_ptr<Window>> Window::Make(
    std::shared_ptr<Communicator> comm, WindowPlan plan, Leaves leaves) {
  static const char* const kName = "win_create";
  for (const Leaf& leaf : leaves) {
    if (!HasSum(leaf.type)) {
      return ffi::Unexpected(MakeError(
          ffi::ErrorCode::kInvalidArgument,
          std::string(kName) + " has no sums of " + NameOf(leaf.type)));
    }
  }
  Leaves described;
  described.leaves = leaves.leaves;
  described.ComputeOffsets();
  ffi::Error error =
      CheckedBarrier(comm, kName, std::move(described), plan.variant);
  if (error.failure()) return ffi::Unexpected(std::move(error));

  std::shared_ptr<Window> window(new Window);
  window->comm_ = comm;
  window->plan_ = std::move(plan);
  Registry& registry = TheRegistry();
  Group group;
  {
    std::lock_guard<std::mutex> lock(registry.mutex);
    group = registry.groups[comm.get()];
  }
  if (group.machine == MPI_COMM_NULL) group = MakeGroup(*comm);
  window->id_ = group.windows++;

  // p starts as 1, in the dtype in which it undergoes the data's arithmetic.
  alignas(8) std::byte one[8];
  Leaf p{window->plan_.p_type, 1, 1, one, nullptr, 0};
  if (p.type == DataType::F64) {
    const double value = 1;
    std::memcpy(one, &value, sizeof(value));
  } else {
    const float value = 1;
    std::memcpy(one, &value, sizeof(value));
  }
  if (window->has_p()) leaves.leaves.push_back(p);
  leaves.ComputeOffsets();
  window->layout_.leaves = leaves.leaves;
  window->layout_.ComputeOffsets();

  const std::size_t payload = leaves.payload_bytes;
  const int records = 1 + static_cast<int>(window->plan_.sources.size());
  const std::size_t bytes = WindowMemory::Bytes(payload, records);
  window->parts_.resize(comm->size());
  window->shared_ = SharedMemory::Make(group.machine, bytes);
  if (window->shared_ != nullptr) {
    for (int rank = 0; rank < comm->size(); ++rank) {
      if (group.local[rank] < 0) continue;
      window->parts_[rank] =
          WindowMemory(window->shared_->of(group.local[rank]), payload);
    }
  } else {
    try {
      window->private_ = Buffer(bytes);
    } catch (const std::bad_alloc&) {
      comm->Fail(ffi::ErrorCode::kResourceExhausted,
                 "win_create on rank " + std::to_string(comm->rank()) +
                     " has no memory for " + std::to_string(bytes) + " bytes");
      return ffi::Unexpected(comm->Refusal());
    }
    window->parts_[comm->rank()] =
        WindowMemory(window->private_.get(), payload);
  }
  window->own_ = window->parts_[comm->rank()];
  window->own_.Initialize(records);
  for (int record = 0; record < records; ++record) {
    if (record > 0 && window->plan_.zero_init) {
      std::memset(window->own_.payload(record), 0, payload);
    } else {
      WriteScaled(leaves, 1, window->own_.payload(record));
    }
  }
  {
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.groups[comm.get()] = group;
    window->number_ = registry.next++;
    registry.by_number.emplace(window->number_, window);
  }
  const bool all_near =
      std::all_of(window->parts_.begin(), window->parts_.end(),
                  [](const WindowMemory& part) { return bool(part); });
  if (!all_near) ServeWindows(comm);
  // Nobody writes before all can read.
  error = CheckedBarrier(comm, kName, Leaves(), window->id_);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return window;
}

Leaves Window::At(const std::byte* payload) const {
  Leaves leaves;
  leaves.leaves = layout_.leaves;
  leaves.ComputeOffsets();
  for (Leaf& leaf : leaves.leaves) leaf.input = payload + leaf.offset;
  return leaves;
}

ffi::Error Window::Complete(Leaves* leaves, const char* name) const {
  const std::size_t size = layout_.size() - has_p();
  bool alike = leaves->size() == size;
  for (std::size_t i = 0; alike && i < size; ++i) {
    alike = (*leaves)[i].type == layout_[i].type &&
            (*leaves)[i].count == layout_[i].count;
  }
  if (!alike) {
    return MakeError(ffi::ErrorCode::kInvalidArgument,
                     std::string(name) + " of " + leaves->Describe() +
                         " on a window of " + layout_.Describe());
  }
  if (has_p()) {
    // Only this rank's updates write it, and operations run one by one.
    Leaf p = layout_[size];
    p.input = own_.payload(0) + p.offset;
    leaves->leaves.push_back(p);
    leaves->ComputeOffsets();
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
                           const std::string& title) {
  const Clock::time_point start = Clock::now();
  const auto may_wait = [&] {
    const std::chrono::duration<double> waited = Clock::now() - start;
    return !comm_->failed() && waited.count() < comm_->timeout();
  };
  if (lock.Acquire(may_wait)) return ffi::Error::Success();
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  comm_->Fail(ffi::ErrorCode::kDeadlineExceeded,
              title + " waited for what another rank has locked on rank " +
                  std::to_string(rank) +
                  "; has it died, or does it keep a win_mutex? (the limit is "
                  "jfog.init(timeout=...))");
  return comm_->Refusal();
}

ffi::Error Window::LockOne(int rank) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto held = held_.find(rank);
    if (held != held_.end() && held->second == std::this_thread::get_id()) {
      return MakeError(ffi::ErrorCode::kFailedPrecondition,
                       "win_mutex of rank " + std::to_string(rank) +
                           " inside of one that has taken it already");
    }
  }
  if (const WindowMemory& there = part(rank)) {
    JFOG_RETURN_IF_ERROR(Acquire(there.head().mutex, rank, "win_mutex"));
  } else {
    JFOG_RETURN_IF_ERROR(
        AskFor(shared_from_this(), WindowRequest::kLock, rank));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  held_[rank] = std::this_thread::get_id();
  return ffi::Error::Success();
}

ffi::Error Window::UnlockOne(int rank) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    held_.erase(rank);
  }
  if (const WindowMemory& there = part(rank)) {
    there.head().mutex.Release();
    return ffi::Error::Success();
  }
  return AskFor(shared_from_this(), WindowRequest::kUnlock, rank);
}

ffi::Error Window::Lock(const std::vector<int>& ranks) {
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    ffi::Error error = LockOne(ranks[i]);
    if (error.success()) continue;
    while (i > 0) UnlockOne(ranks[--i]);
    return error;
  }
  return ffi::Error::Success();
}

ffi::Error Window::Unlock(const std::vector<int>& ranks) {
  ffi::Error first;
  for (int rank : ranks) {
    ffi::Error error = UnlockOne(rank);
    if (first.success()) first = std::move(error);
  }
  return first;
}

ffi::Error Window::Free() {
  Registry& registry = TheRegistry();
  {
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.by_number.erase(number_);
  }
  own_.head().state.store(WindowMemory::kFreed, std::memory_order_release);
  // What was started has to end.
  const Clock::time_point start = Clock::now();
  while (active_.load(std::memory_order_acquire) > 0) {
    JFOG_RETURN_IF_ERROR(comm_->Refusal());
    const std::chrono::duration<double> waited = Clock::now() - start;
    if (waited.count() > comm_->timeout()) {
      comm_->Fail(ffi::ErrorCode::kDeadlineExceeded,
                  "win_free on rank " + std::to_string(comm_->rank()) +
                      " waited for operations that were started on the window "
                      "and do not end; has another rank died?");
    }
    std::this_thread::sleep_for(kNap);
  }
  // When all have come here nobody reaches for anybody's part any more.
  JFOG_RETURN_IF_ERROR(CheckedBarrier(comm_, "win_free", Leaves(), id_));
  std::fill(parts_.begin(), parts_.end(), WindowMemory());
  own_ = WindowMemory();
  if (shared_ != nullptr) shared_->Free();
  shared_ = nullptr;
  private_ = Buffer();
  return ffi::Error::Success();
}

ffi::ErrorOr<std::shared_ptr<Window>> FindWindow(const std::uint32_t* number,
                                                 const char* name) {
  Registry& registry = TheRegistry();
  std::shared_ptr<Window> window;
  {
    // ThreadSanitizer knows nothing of how XLA passes the number on.
    std::lock_guard<std::mutex> lock(registry.mutex);
    const auto found = registry.by_number.find(*number);
    if (found != registry.by_number.end()) window = found->second;
  }
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

void WriteNumber(const Window& window, std::uint32_t* number) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  *number = window.number();
}

std::shared_ptr<Window> FindWindow(const Communicator& comm, std::uint64_t id) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& [number, window] : registry.by_number) {
    if (window->comm().get() == &comm && window->id() == id) return window;
  }
  return nullptr;
}

WindowMemory::State GoneState(const Communicator& comm) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const bool ended = registry.ended || comm.closed();
  return ended ? WindowMemory::kEnded : WindowMemory::kFreed;
}

void LeaveWindows(const Communicator* comm) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  if (comm == nullptr) registry.ended = true;
  for (auto it = registry.by_number.begin(); it != registry.by_number.end();) {
    const Window& window = *it->second;
    if (comm != nullptr && window.comm().get() != comm) {
      ++it;
      continue;
    }
    window.own().head().state.store(WindowMemory::kEnded,
                                    std::memory_order_release);
    it = registry.by_number.erase(it);
  }
  if (comm != nullptr) registry.groups.erase(comm);
}

}  // namespace jfog::mpi
