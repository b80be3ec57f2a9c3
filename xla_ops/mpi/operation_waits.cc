// Waits of an operation: how long they are, and reasons to end them.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/format.h"
#include "mpi/operation.h"

namespace jfog::mpi {
namespace {

constexpr std::chrono::milliseconds kStalledAfter{50};
// Messages that a rank sent before it left may still be in transit.
constexpr std::chrono::seconds kGrace{1};
// Fractions of the limit of a hang: the wait at the first question, the time to
// the next one, and the time without an answer that is a hang.
constexpr double kFirstQuestion = 1.0 / 4;
constexpr double kNextQuestion = 1.0 / 16;
constexpr double kUnanswered = 1.0 / 2;

std::string FormatSeconds(double seconds) {
  if (seconds < 1) {
    return std::to_string(static_cast<int>(1000 * seconds)) + " ms";
  }
  return Format(std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(seconds)));
}

}  // namespace

void Operation::CheckStall(Clock::time_point now) {
  const Clock::rep since = awaited_since_.load(std::memory_order_relaxed);
  const bool is_recent =
      since == 0 ||
      now.time_since_epoch() < Clock::duration(since) + kStalledAfter;
  if (!comm_->failed() && is_recent) return;
  std::lock_guard<std::mutex> lock(advancing_);
  if (finished()) return;
  ffi::Error error = Guard([&] { return FindStall(CountWait(now)); });
  if (error.failure()) End(std::move(error));
}

Clock::duration Operation::CountWait(Clock::time_point now) {
  const Clock::rep since = awaited_since_.load(std::memory_order_relaxed);
  if (since == 0) return Clock::duration::zero();
  Clock::time_point begin{Clock::duration(since)};
  const Clock::duration unseen = now - std::max(begin, looked_at_);
  if (unseen > kPause) {
    comm_->hangs().ForgetQuestions();
    begin += unseen;
    awaited_since_.store(begin.time_since_epoch().count(),
                         std::memory_order_relaxed);
  }
  looked_at_ = now;
  return now - begin;
}

void Operation::CountWaitUntil(Clock::time_point now) {
  const Clock::rep since = awaited_since_.load(std::memory_order_relaxed);
  if (since == 0) return;
  std::unique_lock<std::mutex> lock(advancing_, std::try_to_lock);
  if (!lock.owns_lock() || finished()) return;
  const Clock::time_point begin =
      std::max(Clock::time_point(Clock::duration(since)), counted_at_);
  counted_at_ = now;
  // A longer pause is one of this process.
  if (now <= begin || now - begin > kPause) return;
  std::vector<int> peers = WaitedFor();
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  comm_->traffic().CountWait(now - begin, peers);
}

ffi::Error Operation::FindStall(Clock::duration waited) {
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  comm_->ReadControlMessages();
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  // Messages that were sent before the control messages may have come with
  // them.
  bool moved = false;
  JFOG_RETURN_IF_ERROR(Poll(&moved));
  if (moved) {
    if (awaited_since_.load(std::memory_order_relaxed) != 0) Await();
    return ffi::Error::Success();
  }
  JFOG_RETURN_IF_ERROR(FindGone(&moved));
  if (moved) {
    if (awaited_since_.load(std::memory_order_relaxed) != 0) Await();
    return ffi::Error::Success();
  }
  const std::vector<int> missing = Missing();
  std::vector<int> left;
  for (int rank : missing) {
    if (comm_->HasLeft(rank)) left.push_back(rank);
  }
  if (left.empty() || !left_at_ || *left_at_ > waited) left_at_ = waited;
  if (!left.empty() && waited - *left_at_ > kGrace) {
    if (!comm_->is_fault_tolerant()) {
      return Fail(ffi::ErrorCode::kAborted, "waits for " + RankList(left) +
                                                ", which has already ended (" +
                                                leaves_.Describe() + ")");
    }
    for (int rank : left) comm_->MarkGone(rank);
    if (!comm_->reweights()) return FailWithout(left);
  }
  if (is_ordered()) {
    // The others compare this position with their own, and find a mismatch
    // long before the deadline.
    if (deadline_.TakeAnnouncement(waited)) {
      comm_->AnnounceArrival(header_);
    }
    JFOG_RETURN_IF_ERROR(CheckMail(missing));
    JFOG_RETURN_IF_ERROR(CheckControlMessages(missing, waited));
  }
  FindHangs(missing, waited);
  JFOG_RETURN_IF_ERROR(Stalled());
  if (deadline_.TakeWarning(waited)) {
    Deadline::Warn(waited, Title(), RankList(missing), Details(missing));
  }
  if (deadline_.HasExpired(waited)) {
    return Fail(
        ffi::ErrorCode::kDeadlineExceeded,
        Deadline::Expired(waited, RankList(missing), leaves_.Describe()));
  }
  return ffi::Error::Success();
}

// A rank that waits itself is not stuck, but waits for one that is, or for one
// that waits for that one. Ranks answer from another thread than the program's.
void Operation::FindHangs(const std::vector<int>& missing,
                          Clock::duration waited) {
  HangDetector& hangs = comm_->hangs();
  if (!hangs.is_on()) return;
  const auto pace = hangs.FindPace();
  if (!pace) return;
  const double seconds = Seconds(waited);
  if (asked_waiting_at_ > waited) asked_waiting_at_ = Clock::duration::zero();
  if (seconds < pace->limit * kFirstQuestion) return;
  const bool asks =
      seconds - Seconds(asked_waiting_at_) > pace->limit * kNextQuestion;
  if (asks) asked_waiting_at_ = waited;
  for (int rank : missing) {
    if (rank == comm_->rank() || comm_->IsGone(rank) || comm_->HasLeft(rank)) {
      continue;
    }
    if (asks) comm_->AskWhetherWaiting(rank);
    if (seconds > pace->limit &&
        hangs.Unanswered(rank) > pace->limit * kUnanswered) {
      comm_->EndStuck(rank,
                      Title() + " has waited " + Format(waited) +
                          " for it, while it waits in no operation; from one "
                          "operation to the next it took " +
                          FormatSeconds(pace->median) +
                          " in the median, with a deviation "
                          "of " +
                          FormatSeconds(pace->deviation) +
                          " (the limit is jfog.init(hang_timeout=...))");
    }
  }
}

// A peer that waits for a message of another kind than it has sent finds out by
// this rank's announcement.
ffi::Error Operation::CheckMail(const std::vector<int>& missing) {
  if (comm_->mailboxes() == nullptr) return ffi::Error::Success();
  for (int rank : missing) {
    if (!comm_->mailboxes()->Reaches(rank)) continue;
    const std::optional<Header> header = comm_->mailboxes()->Peek(rank);
    if (!header || header->sequence != sequence() || Matches(*header)) continue;
    comm_->AnnounceArrival(header_);
    return CheckHeader(rank, *header);
  }
  return ffi::Error::Success();
}

ffi::Error Operation::CheckControlMessages(const std::vector<int>& missing,
                                           Clock::duration waited) {
  std::vector<int> later;
  for (int rank : missing) {
    const std::optional<Header> message = comm_->LastControlMessage(rank);
    if (!message || message->sequence < sequence()) continue;
    // The peer waits, too: in the same operation, or in a later one.
    if (message->sequence == sequence()) {
      JFOG_RETURN_IF_ERROR(CheckHeader(rank, *message));
    } else if (deadline_.IsLong(waited) && !HasPosted(rank)) {
      later.push_back(rank);
    }
  }
  return CompareWithPosted(later, waited);
}

// A later number proves nothing by itself: handles are waited on in any order,
// and a third rank may hold up the messages of this operation.
ffi::Error Operation::CompareWithPosted(const std::vector<int>& later,
                                        Clock::duration waited) {
  if (asked_at_ > waited) asked_at_ = Clock::duration::zero();
  const bool asks = waited >= 2 * asked_at_;
  if (asks && !later.empty()) asked_at_ = waited;
  for (int rank : later) {
    if (const auto theirs = comm_->TakePosted(rank, sequence())) {
      JFOG_RETURN_IF_ERROR(CheckHeader(rank, *theirs));
      posted_.push_back(rank);
    } else if (asks) {
      comm_->AskPosted(rank, header_);
    }
  }
  return ffi::Error::Success();
}

bool Operation::HasPosted(int rank) const {
  return std::count(posted_.begin(), posted_.end(), rank) > 0;
}

}  // namespace jfog::mpi
