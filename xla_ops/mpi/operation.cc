// One operation in flight: its identity, its pending messages, its end.
#include "mpi/operation.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "common/text.h"

namespace jfog::mpi {
namespace {

constexpr std::uint64_t kMagic = 0x6a666f6731303032u;
constexpr std::chrono::milliseconds kStalledAfter{50};
// What a rank that left has sent before may still be on its way.
constexpr std::chrono::seconds kGrace{1};
// Who completes an operation by himself first lets others run.
constexpr std::chrono::microseconds kYieldFor{500};
constexpr std::chrono::microseconds kNap{100};

Identity IdentityOf(const Header& header) {
  const std::size_t length =
      strnlen(header.operation, sizeof(header.operation));
  return {std::string(header.operation, length), header.sequence,
          header.signature, header.variant, header.bytes};
}

}  // namespace

Operation::Operation(std::shared_ptr<Communicator> comm, const char* name,
                     Leaves leaves, std::uint64_t variant)
    : comm_(std::move(comm)),
      name_(name),
      leaves_(std::move(leaves)),
      sequence_(comm_->NextSequence()),
      signature_(leaves_.Signature()),
      variant_(variant) {
  comm_->CountOperation();
}

Operation::Operation(std::shared_ptr<Communicator> comm, const char* name,
                     std::uint64_t sequence)
    : comm_(std::move(comm)),
      name_(name),
      sequence_(sequence),
      signature_(0),
      variant_(0) {}

Operation::Operation(std::shared_ptr<Communicator> comm, const Operation& other)
    : comm_(std::move(comm)),
      name_(other.name_),
      sequence_(other.sequence_),
      signature_(other.signature_),
      variant_(other.variant_) {}

std::string Operation::Title() const {
  return std::string(name_) + " #" + std::to_string(sequence_) + " on rank " +
         std::to_string(comm_->rank());
}

Header Operation::MakeHeader(std::size_t bytes) const {
  Header header;
  header.magic = kMagic;
  header.sequence = sequence_;
  header.signature = signature_;
  header.variant = variant_;
  header.bytes = bytes;
  std::strncpy(header.operation, name_, sizeof(header.operation) - 1);
  return header;
}

std::uint64_t Operation::Fingerprint() const {
  std::uint64_t own = Mix(Mix(sequence_, signature_), variant_);
  for (const char* c = name_; *c != 0; ++c) own = Mix(own, *c);
  return own;
}

void Operation::Resize(std::size_t slots) {
  requests_.assign(slots, MPI_REQUEST_NULL);
  statuses_.resize(slots);
  indices_.resize(slots);
}

ffi::Error Operation::Resume(bool* moved) {
  *moved = false;
  return ffi::Error::Success();
}

void Operation::Renew() {
  sequence_ = comm_->NextSequence();
  comm_->CountOperation();
  finished_.store(false, std::memory_order_relaxed);
  awaited_since_.store(0, std::memory_order_relaxed);
  warned_ = false;
  announced_ = false;
}

void Operation::Start() {
  std::lock_guard<std::mutex> lock(advancing_);
  ffi::Error error = comm_->Refusal();
  if (error.success()) error = Post();
  if (error.failure()) End(std::move(error));
}

bool Operation::Advance() {
  std::unique_lock<std::mutex> lock(advancing_, std::try_to_lock);
  if (!lock.owns_lock() || finished()) return false;
  bool moved = false;
  ffi::Error error = Poll(&moved);
  if (error.failure()) {
    End(std::move(error));
    return true;
  }
  // The deadline is for a standstill.
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
      *moved = true;
      if (code == MPI_ERR_IN_STATUS && statuses_[i].MPI_ERROR != MPI_SUCCESS) {
        return MpiFailure(statuses_[i].MPI_ERROR,
                          "with " + RankList({statuses_[i].MPI_SOURCE}));
      }
      JFOG_RETURN_IF_ERROR(Completed(indices_[i]));
    }
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

void Operation::End(ffi::Error error) {
  if (error.failure()) {
    // MPI may still write into receive buffers and read the others.
    Leak();
  }
  error_ = std::move(error);
  Ended();
  finished_.store(true, std::memory_order_release);
}

ffi::Error Operation::Fail(ffi::ErrorCode code, const std::string& text) {
  // With several operations in flight another one may have failed before.
  comm_->Fail(code, Title() + " " + text);
  return comm_->Refusal();
}

ffi::Error Operation::MpiFailure(int code, const std::string& what) {
  return Fail(ffi::ErrorCode::kInternal,
              "failed " + what + ": " + ErrorText(code));
}

bool Operation::Matches(const Header& theirs) const {
  const Header mine = MakeHeader(0);
  return theirs.magic == mine.magic && theirs.sequence == mine.sequence &&
         theirs.signature == mine.signature && theirs.variant == mine.variant &&
         std::memcmp(theirs.operation, mine.operation,
                     sizeof(mine.operation)) == 0;
}

ffi::Error Operation::CheckHeader(int source, const Header& theirs) {
  const auto mismatch = [&](const std::string& what) {
    return Fail(ffi::ErrorCode::kFailedPrecondition,
                "(" + leaves_.Describe() + ") does not match rank " +
                    std::to_string(source) + ": " + what);
  };
  if (theirs.magic != kMagic) return mismatch("not a message of jfog");
  const std::string difference =
      Difference(IdentityOf(MakeHeader(0)), IdentityOf(theirs));
  if (!difference.empty()) return mismatch(difference);
  return ffi::Error::Success();
}

void Operation::Await() {
  awaited_since_.store(Clock::now().time_since_epoch().count(),
                       std::memory_order_relaxed);
}

ffi::Error Operation::Complete() {
  Await();
  Clock::time_point moved_at = Clock::now();
  while (!finished()) {
    const bool moved = Advance();
    const Clock::time_point now = Clock::now();
    if (moved) {
      moved_at = now;
    } else if (now - moved_at < kYieldFor) {
      sched_yield();
    } else {
      CheckStall(now);
      std::this_thread::sleep_for(kNap);
    }
  }
  return error_;
}

void Operation::CheckStall(Clock::time_point now) {
  const Clock::rep since = awaited_since_.load(std::memory_order_relaxed);
  const Clock::duration waited =
      since == 0 ? Clock::duration::zero()
                 : now.time_since_epoch() - Clock::duration(since);
  if (!comm_->failed() && waited < kStalledAfter) return;
  std::lock_guard<std::mutex> lock(advancing_);
  if (finished()) return;
  ffi::Error error = FindStall(waited);
  if (error.failure()) End(std::move(error));
}

ffi::Error Operation::FindStall(Clock::duration waited) {
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  comm_->ReadControlMessages();
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  const std::vector<int> missing = Missing();
  std::vector<int> left;
  for (int rank : missing) {
    if (comm_->HasLeft(rank)) left.push_back(rank);
  }
  if (!left.empty() && waited > kGrace) {
    return Fail(ffi::ErrorCode::kAborted, "waits for " + RankList(left) +
                                              ", which has already ended (" +
                                              leaves_.Describe() + ")");
  }
  const double limit = comm_->timeout();
  if (is_ordered()) {
    if (!announced_ && Seconds(waited) > 0.05 * limit) {
      announced_ = true;
      comm_->AnnounceArrival(MakeHeader(leaves_.payload_bytes));
    }
    JFOG_RETURN_IF_ERROR(CheckControlMessages(missing, waited));
  }
  JFOG_RETURN_IF_ERROR(Stalled());
  if (!warned_ && Seconds(waited) > 0.1 * limit) {
    warned_ = true;
    std::fprintf(stderr, "jfog: %s has waited %s for %s\n", Title().c_str(),
                 Format(waited).c_str(), RankList(missing).c_str());
    std::fflush(stderr);
  }
  if (Seconds(waited) > limit) {
    return Fail(ffi::ErrorCode::kDeadlineExceeded,
                "waited " + Format(waited) + " for " + RankList(missing) +
                    "; is it dead, slow, or in another operation? (" +
                    leaves_.Describe() +
                    "; the limit is jfog.init(timeout=...))");
  }
  return ffi::Error::Success();
}

ffi::Error Operation::CheckControlMessages(const std::vector<int>& missing,
                                           Clock::duration waited) {
  for (int rank : missing) {
    const std::optional<Header> message = comm_->LastControlMessage(rank);
    if (!message || message->sequence < sequence_) continue;
    // It waits, too: here with us, or it has gone on without the message that
    // we wait for. That one would have come long before the message.
    if (message->sequence == sequence_ ||
        Seconds(waited) > 0.1 * comm_->timeout()) {
      JFOG_RETURN_IF_ERROR(CheckHeader(rank, *message));
    }
  }
  return ffi::Error::Success();
}

}  // namespace jfog::mpi
