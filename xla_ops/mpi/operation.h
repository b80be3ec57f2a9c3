// One operation in flight: its identity, its pending messages, its end.
#ifndef JFOG_XLA_OPS_MPI_OPERATION_H_
#define JFOG_XLA_OPS_MPI_OPERATION_H_

#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/deadline.h"
#include "common/status.h"
#include "mpi/communicator.h"
#include "mpi/payload.h"
#include "mpi/timeline.h"

namespace jfog::mpi {

// An operation is posted once, in program order, and then advanced by polling:
// briefly by the calling thread, then by the progress engine. It ends with its
// results in the outputs of its leaves, or with an error that fails the
// communicator.
class Operation {
 public:
  // All ranks must bring the same name, leaves and variant.
  Operation(std::shared_ptr<Communicator> comm, const char* name,
            Payload leaves, std::uint64_t variant);
  // Outside the ordered chain, with a sequence number of the caller.
  Operation(std::shared_ptr<Communicator> comm, const char* name,
            std::uint64_t sequence);
  // A check under the identity of another operation that has not started.
  Operation(std::shared_ptr<Communicator> comm, const Operation& other);
  virtual ~Operation() = default;
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  // Posts what goes out and comes in first.
  void Start();
  // Reuses a successful operation as the next one of its kind, on other memory.
  void Renew();
  // Advances without waiting; returns whether anything moved. Looks up to
  // `polls` times for something that moves. Safe on any thread: returns false
  // while another thread advances it.
  bool Advance(int polls = 1);
  // Whether it has ended; then `error` says how.
  bool finished() const { return finished_.load(std::memory_order_acquire); }
  const ffi::Error& error() const { return error_; }

  // Starts the clock of the deadline: a caller waits from now on.
  void Await();
  // Whether one does.
  bool is_awaited() const {
    return awaited_since_.load(std::memory_order_relaxed) != 0 && !finished();
  }
  // Whether threads wait in operations that they complete by themselves.
  static bool AnyBlocked();
  // Ends the operation if there is a reason to: a failed communicator, a peer
  // that has left or runs another operation, or the deadline.
  void CheckStall(Clock::time_point now);
  // Whether it sends and receives through mailboxes alone, of which a poll is a
  // few loads.
  virtual bool waits_for_memory() const { return false; }
  // Counts the wait since the last look or progress, if a caller waits.
  void CountWaitUntil(Clock::time_point now);
  // "neighbor_allreduce #41 on rank 0 has waited 2.5 s for rank 1 (1 leaf,
  // float32 x 3; train.py:12)". Tries for a moment, since another thread may
  // advance it.
  std::string State(Clock::time_point now);
  // The states of the operations that threads complete by themselves.
  static std::vector<std::string> StatesOfBlocked(Clock::time_point now);
  // Advances it to its end on the calling thread.
  ffi::Error Complete();

  // Ends it because of the exception that is being handled, which also fails
  // the communicator.
  void EndByException();

  const Payload& leaves() const { return leaves_; }
  bool IsOn(const Communicator& comm) const { return comm_.get() == &comm; }
  // "neighbor_allreduce #41 on rank 0"
  std::string Title() const;
  std::uint64_t sequence() const { return header_.sequence; }
  // The header of this rank's messages.
  const Header& header() const { return header_; }
  // Its record in the timeline.
  Trace& trace() { return trace_; }

 protected:
  // The steps of a kind of operation. One runs at a time; the first error ends
  // the operation.
  virtual ffi::Error Post() = 0;
  // Advances work that does not depend on a pending request.
  virtual ffi::Error Resume(bool* moved);
  // Whether such things are still to do.
  virtual bool is_waiting() const { return false; }
  virtual ffi::Error Completed(std::size_t slot) = 0;
  // Called when all requests have completed and no other work is left: sets
  // `ended`, or posts more.
  virtual ffi::Error Drained(bool* ended) {
    *ended = true;
    return ffi::Error::Success();
  }
  // The ranks that are waited for, ascending.
  virtual std::vector<int> Missing() const = 0;
  // The ranks to which time of waiting is counted.
  virtual std::vector<int> WaitedFor() const { return Missing(); }
  static std::vector<int> WaitedFor(const Operation& other) {
    return other.WaitedFor();
  }
  // Leaks the buffers of messages that will never complete.
  virtual void Leak() = 0;
  // Called once at the end.
  virtual void Ended() {}
  // Whether other ranks come to the same operation, in the same order.
  virtual bool is_ordered() const { return true; }
  // Called if it waits for ranks that have failed: fails, or moves on without
  // them. A message with one of them, by its slot, ends by itself.
  virtual ffi::Error GoOnWithout(const std::vector<int>& gone);
  virtual ffi::Error RequestFailed(std::size_t slot);
  // Called now and then while nothing moves: looks for reasons of its own.
  virtual ffi::Error Stalled() { return ffi::Error::Success(); }

  // Start a message with a rank. What is received must have `count` bytes, or
  // up to so many if `has_header`: then `Completed` checks its length.
  ffi::Error Send(const void* bytes, std::size_t count, int rank, int tag,
                  std::size_t slot);
  ffi::Error Receive(void* bytes, std::size_t count, int rank, int tag,
                     std::size_t slot, bool has_header = false);

  // Takes the code of the start of a message.
  ffi::Error Started(int code, const char* what, std::size_t slot);

  // The slot for a request, which the caller starts at once: of a receive of
  // `bytes` bytes, or of something else.
  MPI_Request* Slot(std::size_t slot, std::size_t bytes = kNoReceive) {
    ++pending_;
    is_open_[slot] = 1;
    lengths_[slot] = bytes;
    return &requests_[slot];
  }
  static constexpr std::size_t kNoReceive = ~std::size_t{0};
  static constexpr std::size_t kAnyLength = kNoReceive - 1;
  // The length of a message that has been received.
  std::size_t length(std::size_t slot) const { return lengths_[slot]; }
  void Resize(std::size_t slots);
  // Leaves all pending requests to MPI for good.
  void DropRequests() {
    pending_ = 0;
    std::fill(is_open_.begin(), is_open_.end(), 0);
    std::fill(requests_.begin(), requests_.end(), MPI_REQUEST_NULL);
  }
  std::size_t slots() const { return requests_.size(); }
  bool is_pending(std::size_t slot) const {
    return requests_[slot] != MPI_REQUEST_NULL;
  }

  // The value to compare between ranks in place of the leaves.
  void SetSignature(std::uint64_t signature) { header_.signature = signature; }
  // A hash of the values that must be equal on all ranks.
  std::uint64_t Fingerprint() const;
  // Whether that is of the same operation.
  bool Matches(const Header& theirs) const;
  // Whether that rank has answered that it has started the same operation.
  bool HasPosted(int rank) const;
  // An error, if this rank and that one are not in the same operation.
  ffi::Error CheckHeader(int source, const Header& theirs);
  // Reads the header of a message, and checks it and the message's length.
  ffi::Error ReadHeader(int source, const std::byte* bytes, std::size_t count,
                        std::size_t expected, Header* theirs);
  // An error if a message of a rank has something `wrong`; fails all ranks.
  ffi::Error CheckMessage(int source, const std::string& wrong);
  // Count a message with a rank, and its payload.
  void CountSent(int rank, std::size_t bytes) {
    comm_->CountSent(rank, bytes);
    trace_.Record(TimelineEvent::kSent, comm_->RankInRoot(rank), bytes);
  }
  void CountReceived(int rank, std::size_t bytes) {
    comm_->CountReceived(rank, bytes);
    trace_.Record(TimelineEvent::kReceived, comm_->RankInRoot(rank), bytes);
  }
  // Turns an MPI return code into a failure.
  ffi::Error Check(int code, const char* expression) {
    if (code == MPI_SUCCESS) return ffi::Error::Success();
    return MpiFailure(code, expression);
  }
  // Fails the communicator.
  ffi::Error Fail(ffi::ErrorCode code, const std::string& text);

  Payload& mutable_leaves() { return leaves_; }
  Communicator& comm() const { return *comm_; }
  const std::shared_ptr<Communicator>& shared_comm() const { return comm_; }

 private:
  ffi::Error MpiFailure(int code, const std::string& what);
  // Whether an MPI return code comes from the failure of a rank.
  bool IsOfFailure(int code);
  // Looks for ranks that have failed.
  ffi::Error FindGone(bool* moved);
  ffi::Error FailWithout(const std::vector<int>& gone);
  // Compares the length of a completed message, if it is a received one.
  ffi::Error CheckReceived(std::size_t slot, const MPI_Status& status);
  ffi::Error Poll(bool* moved);
  // Handles the requests that have failed without a report.
  ffi::Error TakeFreed();
  // Runs a step; an exception is an error.
  template <typename Step>
  ffi::Error Guard(Step step) {
    try {
      return step();
    } catch (...) {
      return ExceptionError();
    }
  }
  ffi::Error ExceptionError();
  // The time that this rank has waited and looked. Time without a look is left
  // out: a process that is suspended does not wait.
  Clock::duration CountWait(Clock::time_point now);
  ffi::Error FindStall(Clock::duration waited);
  // Looks for stuck ranks among those that are waited for.
  void FindHangs(const std::vector<int>& missing, Clock::duration waited);
  // The texts after a wait: the place of the call, and operations in which
  // the missing ranks have announced to wait themselves.
  std::string Details(const std::vector<int>& missing) const;
  // Compares with the mail of ranks that are in another operation now.
  ffi::Error CheckMail(const std::vector<int>& missing);
  ffi::Error CheckControlMessages(const std::vector<int>& missing,
                                  Clock::duration waited);
  // Asks ranks that wait in later operations what they have started as this
  // one, less often the longer the wait.
  ffi::Error CompareWithPosted(const std::vector<int>& later,
                               Clock::duration waited);
  void End(ffi::Error error);

  std::shared_ptr<Communicator> comm_;
  const char* name_;
  const char* traced_name_ = name_;
  Trace trace_;
  Payload leaves_;
  Header header_;  // but for the length and the channel of a message
  std::vector<MPI_Request> requests_;
  std::vector<char> is_open_;         // started, and its end not handled
  std::vector<std::size_t> lengths_;  // of receives: expected, then received
  std::vector<MPI_Status> statuses_;
  std::vector<int> indices_;
  int pending_ = 0;
  std::mutex advancing_;
  std::atomic<bool> finished_{false};
  ffi::Error error_;
  std::atomic<Clock::rep> awaited_since_{0};  // 0: no caller waits
  Clock::time_point looked_at_;
  Clock::time_point counted_at_;  // up to here waits are counted
  // The wait at the last look by which no missing rank had left.
  std::optional<Clock::duration> left_at_;
  Clock::duration asked_at_{0};  // the wait at the last question
  // The wait at the last question whether ranks wait as well.
  Clock::duration asked_waiting_at_{0};
  std::vector<int> posted_;  // the ranks that are in it, too
  Deadline deadline_;
};

#define JFOG_MPI_RETURN_IF_ERROR(expression) \
  JFOG_RETURN_IF_ERROR(Check((expression), #expression))

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_OPERATION_H_
