// One operation in flight: its identity, its pending messages, its end.
#include "mpi/operation.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <thread>

#include "common/format.h"
#include "common/hash.h"
#include "common/out_of_memory.h"
#include "common/places.h"
#include "common/process_wide.h"
#include "mpi/fault_tolerance.h"

namespace jfog::mpi {
namespace {

// A thread that drives an operation to completion yields this long before it
// sleeps.
constexpr std::chrono::microseconds kAwaitYieldFor{500};
constexpr std::chrono::microseconds kAwaitNap{100};
// Attempts to lock an operation to describe it, a nap apart.
constexpr int kTries = 1000;
// Peers whose position a warning names.
constexpr int kMostNamed = 4;

// The operations that threads complete by themselves.
struct Blocked {
  std::mutex mutex;
  std::set<Operation*> operations;

  class Entry {
   public:
    explicit Entry(Operation* operation) : operation_(operation) {
      auto& blocked = ProcessWide<Blocked>();
      std::lock_guard<std::mutex> lock(blocked.mutex);
      blocked.operations.insert(operation_);
    }
    ~Entry() {
      auto& blocked = ProcessWide<Blocked>();
      std::lock_guard<std::mutex> lock(blocked.mutex);
      blocked.operations.erase(operation_);
    }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;

   private:
    Operation* operation_;
  };
};

Header HeaderOf(const char* name, std::uint64_t sequence, const Payload& leaves,
                std::uint64_t variant) {
  Header header =
      MakeHeader(name, sequence, leaves.Signature(), variant, leaves.summary);
  header.check = Mix(0, name);
  return header;
}

// Leaves the core's resources to its other hardware thread for a moment.
void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Operation::Operation(std::shared_ptr<Communicator> comm, const char* name,
                     Payload leaves, std::uint64_t variant)
    : comm_(std::move(comm)),
      name_(name),
      leaves_(std::move(leaves)),
      header_(HeaderOf(name, comm_->NextSequence(), leaves_, variant)),
      deadline_(comm_->timeout()) {
  comm_->CountOperation();
}

Operation::Operation(std::shared_ptr<Communicator> comm, const char* name,
                     std::uint64_t sequence)
    : comm_(std::move(comm)),
      name_(name),
      header_(jfog::MakeHeader(name, sequence, 0, 0, 0)),
      deadline_(comm_->timeout()) {}

Operation::Operation(std::shared_ptr<Communicator> comm, const Operation& other)
    : comm_(std::move(comm)),
      name_(other.name_),
      traced_name_("peer_agreement"),
      header_(other.header_),
      deadline_(comm_->timeout()) {}

std::string Operation::Title() const {
  return jfog::Title(name_, sequence(), comm_->rank());
}

std::uint64_t Operation::Fingerprint() const {
  return Mix(Mix(Mix(header_.sequence, header_.signature), header_.variant),
             name_);
}

void Operation::Resize(std::size_t slots) {
  requests_.assign(slots, MPI_REQUEST_NULL);
  is_open_.assign(slots, 0);
  lengths_.assign(slots, kNoReceive);
  statuses_.resize(slots);
  indices_.resize(slots);
}

ffi::Error Operation::Resume(bool* moved) {
  *moved = false;
  return ffi::Error::Success();
}

void Operation::Renew() {
  header_.sequence = comm_->NextSequence();
  comm_->CountOperation();
  finished_.store(false, std::memory_order_relaxed);
  awaited_since_.store(0, std::memory_order_relaxed);
  left_at_.reset();
  asked_at_ = asked_waiting_at_ = Clock::duration::zero();
  posted_.clear();
  deadline_.Reset();
}

void Operation::Start() {
  std::lock_guard<std::mutex> lock(advancing_);
  trace_.Begin(traced_name_, sequence(), leaves_.bytes, comm_->number());
  ffi::Error error = comm_->Refusal();
  if (error.success() && is_ordered()) comm_->Log(header_, name_);
  if (error.success()) error = Guard([this] { return Post(); });
  trace_.Record(TimelineEvent::kPosted);
  if (error.failure()) End(std::move(error));
}

bool Operation::Advance(int polls) {
  std::unique_lock<std::mutex> lock(advancing_, std::try_to_lock);
  if (!lock.owns_lock() || finished()) return false;
  bool moved = false;
  ffi::Error error = Guard([&] {
    ffi::Error error = Poll(&moved);
    while (--polls > 0 && !moved && error.success()) {
      Pause();
      error = Poll(&moved);
    }
    return error;
  });
  if (error.failure()) {
    End(std::move(error));
    return true;
  }
  // The deadline limits a standstill, so progress restarts it.
  if (moved && awaited_since_.load(std::memory_order_relaxed) != 0) Await();
  return moved;
}

ffi::Error Operation::Poll(bool* moved) {
  if (comm_->failed()) return comm_->Refusal();
  if (pending_ > 0) {
    int count = 0;
    const int code =
        MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(),
                     &count, indices_.data(), statuses_.data());
    if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) {
      return MpiFailure(code, "in MPI_Testsome");
    }
    if (count == MPI_UNDEFINED) count = 0;
    for (int i = 0; i < count; ++i) {
      --pending_;
      is_open_[indices_[i]] = 0;
      *moved = true;
      if (code == MPI_ERR_IN_STATUS && IsOfFailure(statuses_[i].MPI_ERROR)) {
        JFOG_RETURN_IF_ERROR(RequestFailed(indices_[i]));
        continue;
      }
      if (code == MPI_ERR_IN_STATUS && statuses_[i].MPI_ERROR != MPI_SUCCESS) {
        return MpiFailure(statuses_[i].MPI_ERROR,
                          "with " + RankList({statuses_[i].MPI_SOURCE}));
      }
      JFOG_RETURN_IF_ERROR(CheckReceived(indices_[i], statuses_[i]));
      JFOG_RETURN_IF_ERROR(Completed(indices_[i]));
    }
    if (code == MPI_ERR_IN_STATUS) JFOG_RETURN_IF_ERROR(TakeFreed());
  }
  JFOG_RETURN_IF_ERROR(Resume(moved));
  while (pending_ == 0 && !is_waiting()) {
    bool ended = false;
    JFOG_RETURN_IF_ERROR(Drained(&ended));
    *moved = true;
    if (ended) {
      End(ffi::Error::Success());
      break;
    }
  }
  return ffi::Error::Success();
}

// With an error of one request Open MPI frees all that have failed, also those
// that it has not reported.
ffi::Error Operation::TakeFreed() {
  for (std::size_t slot = 0; slot < requests_.size(); ++slot) {
    if (is_open_[slot] == 0 || is_pending(slot)) continue;
    --pending_;
    is_open_[slot] = 0;
    JFOG_RETURN_IF_ERROR(RequestFailed(slot));
  }
  return ffi::Error::Success();
}

ffi::Error Operation::ExceptionError() {
  const Thrown thrown = Thrown::Current();
  comm_->FailAll(header_, thrown.code,
                 Title() + " (" + leaves_.Describe() + ") " + thrown.text);
  return comm_->Refusal();
}

void Operation::EndByException() {
  ffi::Error error = ExceptionError();
  std::lock_guard<std::mutex> lock(advancing_);
  if (!finished()) End(std::move(error));
}

void Operation::End(ffi::Error error) {
  if (error.failure()) {
    // MPI may still write to receive buffers and read from send buffers.
    Leak();
  }
  error_ = std::move(error);
  if (comm_->hangs().is_on() && is_ordered()) {
    comm_->hangs().CountEnd(Clock::now());
  }
  trace_.Record(TimelineEvent::kEnd, -1, error_.failure());
  Ended();
  finished_.store(true, std::memory_order_release);
}

ffi::Error Operation::Fail(ffi::ErrorCode code, const std::string& text) {
  // With several operations in flight another one may have failed before.
  comm_->Fail(code, Title() + " " + text);
  return comm_->Refusal();
}

ffi::Error Operation::FailWithout(const std::vector<int>& gone) {
  const std::vector<int> all = gone.empty() ? comm_->Gone() : gone;
  return Fail(ffi::ErrorCode::kUnavailable,
              (gone.empty() ? "stopped, because of " : "waits for ") +
                  RankList(all) + ", which has ended (" + leaves_.Describe() +
                  "); jfog.recover() goes on with the others");
}

ffi::Error Operation::GoOnWithout(const std::vector<int>& gone) {
  return FailWithout(gone);
}

ffi::Error Operation::RequestFailed(std::size_t) {
  comm_->FindGone();
  return FailWithout({});
}

bool Operation::IsOfFailure(int code) {
  if (code != MPI_SUCCESS) comm_->FindGone();
  // Nonblocking collectives of Open MPI end with an internal code, below 0.
  return IsRankFailure(code) || (code < 0 && comm_->any_gone());
}

ffi::Error Operation::Started(int code, const char* what, std::size_t slot) {
  if (code == MPI_SUCCESS) return ffi::Error::Success();
  if (!IsOfFailure(code)) return MpiFailure(code, what);
  --pending_;
  is_open_[slot] = 0;
  requests_[slot] = MPI_REQUEST_NULL;
  return RequestFailed(slot);
}

ffi::Error Operation::FindGone(bool* moved) {
  if (!comm_->is_fault_tolerant()) return ffi::Error::Success();
  comm_->FindGone();
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  if (!comm_->any_gone()) return ffi::Error::Success();
  // Messages that a rank sent before its end have arrived by now.
  JFOG_RETURN_IF_ERROR(Poll(moved));
  if (*moved) return ffi::Error::Success();
  std::vector<int> gone;
  for (int rank : Missing()) {
    if (comm_->IsGone(rank)) gone.push_back(rank);
  }
  if (!gone.empty()) return GoOnWithout(gone);
  // The rank that this one waits for has failed with an error of its own.
  return comm_->reweights() ? ffi::Error::Success() : FailWithout({});
}

ffi::Error Operation::MpiFailure(int code, const std::string& what) {
  if (IsOfFailure(code)) return FailWithout({});
  return Fail(ffi::ErrorCode::kInternal,
              "failed " + what + ": " + ErrorText(code));
}

ffi::Error Operation::Send(const void* bytes, std::size_t count, int rank,
                           int tag, std::size_t slot) {
  comm().duplicates().CountSent(rank);
  return Started(MPI_Isend(bytes, static_cast<int>(count), MPI_BYTE, rank, tag,
                           comm().comm(), Slot(slot)),
                 "in MPI_Isend", slot);
}

ffi::Error Operation::Receive(void* bytes, std::size_t count, int rank, int tag,
                              std::size_t slot, bool has_header) {
  return Started(
      MPI_Irecv(bytes, static_cast<int>(count), MPI_BYTE, rank, tag,
                comm().comm(), Slot(slot, has_header ? kAnyLength : count)),
      "in MPI_Irecv", slot);
}

// MPI reports a message that is too long as an error, and a short one as the
// length alone.
ffi::Error Operation::CheckReceived(std::size_t slot,
                                    const MPI_Status& status) {
  const std::size_t expected = lengths_[slot];
  if (expected == kNoReceive) return ffi::Error::Success();
  comm().duplicates().CountReceived(status.MPI_SOURCE);
  MPI_Count bytes = 0;
  JFOG_MPI_RETURN_IF_ERROR(MPI_Get_elements_x(&status, MPI_BYTE, &bytes));
  lengths_[slot] = static_cast<std::size_t>(bytes);
  if (lengths_[slot] == expected || expected == kAnyLength) {
    return ffi::Error::Success();
  }
  return CheckMessage(status.MPI_SOURCE, CheckLength(lengths_[slot], expected));
}

// Reads one cache line of the header, which the sender has just written.
bool Operation::Matches(const Header& theirs) const {
  return theirs.magic == header_.magic && theirs.sequence == header_.sequence &&
         theirs.signature == header_.signature &&
         theirs.variant == header_.variant &&
         theirs.check == (theirs.stamp == 0
                              ? header_.check
                              : CheckWithClaim(header_.check, theirs));
}

ffi::Error Operation::CheckHeader(int source, const Header& theirs) {
  if (Matches(theirs)) return ffi::Error::Success();
  const std::string difference = Difference(header_, theirs);
  if (difference.empty()) {
    return CheckMessage(source, "check=" + std::to_string(theirs.check) +
                                    ", which does not fit the other fields");
  }
  return Fail(ffi::ErrorCode::kFailedPrecondition,
              "(" + leaves_.Describe() + ") does not match rank " +
                  std::to_string(source) + ": " + difference +
                  leaves_.DescribeOther(name_, theirs));
}

ffi::Error Operation::ReadHeader(int source, const std::byte* bytes,
                                 std::size_t count, std::size_t expected,
                                 Header* theirs) {
  if (count < sizeof(Header)) {
    return CheckMessage(source, CheckLength(count, expected));
  }
  std::memcpy(theirs, bytes, sizeof(Header));
  JFOG_RETURN_IF_ERROR(CheckHeader(source, *theirs));
  if (count == expected) return ffi::Error::Success();
  return CheckMessage(source, CheckLength(count, expected));
}

ffi::Error Operation::CheckMessage(int source, const std::string& wrong) {
  if (wrong.empty()) return ffi::Error::Success();
  comm_->AnnounceFailure(header_, source, ControlMessage::kMalformed);
  return Fail(ffi::ErrorCode::kFailedPrecondition,
              "(" + leaves_.Describe() +
                  ") got a malformed message from rank " +
                  std::to_string(source) + ": " + wrong);
}

void Operation::Await() {
  awaited_since_.store(Clock::now().time_since_epoch().count(),
                       std::memory_order_relaxed);
}

std::vector<std::string> Operation::StatesOfBlocked(Clock::time_point now) {
  auto& blocked = ProcessWide<Blocked>();
  std::lock_guard<std::mutex> lock(blocked.mutex);
  std::vector<std::string> states;
  for (Operation* operation : blocked.operations) {
    states.push_back(operation->State(now));
  }
  return states;
}

bool Operation::AnyBlocked() {
  auto& blocked = ProcessWide<Blocked>();
  std::lock_guard<std::mutex> lock(blocked.mutex);
  return !blocked.operations.empty();
}

ffi::Error Operation::Complete() {
  const Blocked::Entry entry(this);
  Await();
  Clock::time_point moved_at = Clock::now();
  while (!finished()) {
    const bool moved = Advance();
    const Clock::time_point now = Clock::now();
    if (moved) {
      moved_at = now;
    } else if (now - moved_at < kAwaitYieldFor) {
      sched_yield();
    } else {
      CheckStall(now);
      std::this_thread::sleep_for(kAwaitNap);
    }
  }
  return error_;
}

std::string Operation::State(Clock::time_point now) {
  std::unique_lock<std::mutex> lock(advancing_, std::try_to_lock);
  for (int i = 0; i < kTries && !lock.owns_lock(); ++i) {
    std::this_thread::sleep_for(kAwaitNap);
    lock.try_lock();
  }
  std::string text = Title();
  if (!lock.owns_lock()) return text + " is busy";
  if (finished()) return text + " has ended";
  const Clock::rep since = awaited_since_.load(std::memory_order_relaxed);
  const std::vector<int> missing = Missing();
  if (since == 0) {
    text += ", which is not waited on, lacks messages of ";
  } else {
    const Clock::time_point begin{Clock::duration(since)};
    text += " has waited " + Format(now - begin) + " for ";
  }
  return text + RankList(missing) + " (" + leaves_.Describe() + ")" +
         Details(missing);
}

std::string Operation::Details(const std::vector<int>& missing) const {
  std::string text;
  std::size_t bytes = 0;
  for (const Leaf& leaf : leaves_) bytes += leaf.bytes();
  const std::string place = PlaceOf(name_, bytes);
  if (!place.empty()) text += ", called at " + place;
  if (!is_ordered()) return text;
  int named = 0;
  for (int rank : missing) {
    const std::optional<Header> last = comm_->LastControlMessage(rank);
    if (!last || last->sequence == sequence() || ++named > kMostNamed) continue;
    text += "; rank " + std::to_string(rank) + " has waited in " +
            NameOf(*last) + " #" + std::to_string(last->sequence);
  }
  return text;
}

}  // namespace jfog::mpi
