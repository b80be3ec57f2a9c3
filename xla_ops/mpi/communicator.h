// Communicators of this process: who is there, what failed, what was counted.
#ifndef JFOG_XLA_OPS_MPI_COMMUNICATOR_H_
#define JFOG_XLA_OPS_MPI_COMMUNICATOR_H_

#include <mpi.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/failure.h"
#include "common/format.h"
#include "common/registry.h"
#include "common/status.h"
#include "common/traffic_counters.h"
#include "mpi/chunks_in_flight.h"
#include "mpi/duplicates.h"
#include "mpi/hang_detector.h"
#include "mpi/header_log.h"
#include "mpi/mailboxes.h"
#include "mpi/messages.h"
#include "mpi/shared_memory_channel.h"
#include "mpi/tag_numbers.h"

namespace jfog::mpi {

// The peers of one rank in an operation.
struct Pattern {
  std::vector<int> sources;
  std::vector<int> destinations;

  bool Sends(int rank) const;
  bool Receives(int rank) const;
};

// A duplicate of an MPI communicator with jfog's state: sequence numbers, known
// peers, failure, counters. After its first failure it refuses all further work
// with the text of that failure.
class Communicator {
 public:
  // Collective over `parent`. A communicator split off another one reads from
  // the control messages of that root which ranks have left, and uses its
  // shared-memory channels.
  Communicator(MPI_Comm parent, double timeout,
               std::shared_ptr<Channels> channels,
               std::shared_ptr<Communicator> root);
  // Not collective: leaves the duplicates to a later communicator.
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Carries the messages of operations.
  MPI_Comm comm() const { return duplicates_->comm(); }
  // Carries control messages and those of windows, outside the ordered chain.
  MPI_Comm control_comm() const { return duplicates_->control_comm(); }
  // For collectives of MPI: in the ordered chain, and outside of it.
  MPI_Comm collective_comm() const { return duplicates_->collective_comm(); }
  MPI_Comm agreement_comm() const { return duplicates_->agreement_comm(); }
  // Counts the messages.
  Duplicates& duplicates() const { return *duplicates_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }
  // The shared memory of its root, where there is any, which counts ranks in
  // the root.
  Channels* channels() const { return channels_.get(); }
  std::shared_ptr<Channels> shared_channels() const { return channels_; }
  // Null where no other rank shares memory with this one.
  Mailboxes* mailboxes() const { return mailboxes_.get(); }
  // Whether all ranks are on one machine; the same on all of them.
  bool shares_memory() const { return shares_memory_; }
  // Chunks of a long payload that an exchange between machines has in flight.
  std::size_t chunks_in_flight() const { return chunks_in_flight_; }
  // The ranks that share memory with this one, itself among them.
  std::vector<int> RanksOnMachine() const;
  int RankInRoot(int rank) const { return root_ ? root_ranks_[rank] : rank; }
  // 0 for a root, else the ordinal of the part, equal on all ranks of the root.
  int number() const { return number_; }

  // "the last operation started is allreduce #6", and the failure, if any;
  // empty before the first operation.
  std::string Position();
  std::uint64_t NextSequence() { return sequence_.fetch_add(1); }
  // Records the header of an operation of this rank for ranks that ask.
  void Log(const Header& header, const char* name) {
    log_.Record(header, name);
  }
  // Of operations whose further messages have tags of their own.
  TagOrder& tags() { return tags_; }
  // Of requests to other ranks' windows.
  RequestNumbers& requests() { return requests_; }

  // MPI wants collectives started in one order on all ranks. Each takes a
  // ticket when it is posted in program order, and starts when its turn comes.
  std::uint64_t TakeTicket() { return tickets_.fetch_add(1); }
  std::uint64_t turn() const { return turn_.load(std::memory_order_acquire); }
  void EndTurn() { turn_.fetch_add(1, std::memory_order_acq_rel); }

  // The ordinal of this graph, if no operation here has used it before.
  std::optional<std::uint64_t> IfNew(std::uint64_t graph);

  // From here on it refuses new operations.
  void Close() { closed_.store(true, std::memory_order_release); }
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  // The first failure's error, or success.
  ffi::Error Refusal() { return failure_.Refusal(); }
  // Records a failure unless there is one already.
  void Fail(ffi::ErrorCode code, const std::string& text) {
    failure_.Set(code, text);
  }
  bool failed() const { return failure_.failed(); }

  // Whether the job outlives its ranks; then the failed ones can be found.
  bool is_fault_tolerant() const { return is_fault_tolerant_; }
  // Whether averages with neighbors go on without those that have failed.
  bool reweights() const { return reweights_.load(std::memory_order_relaxed); }
  void SetReweights(bool reweights) { reweights_.store(reweights); }
  // Looks for ranks that have failed since the last look, and fails if another
  // rank has left this communicator for a recovery. Never waits.
  void FindGone();
  // The same with control messages, for operations that wait for no message: at
  // most once in a millisecond, and only in a fault-tolerant job.
  void LookForGone();
  void MarkGone(int rank);
  bool any_gone() const { return any_gone_.load(std::memory_order_acquire); }
  bool IsGone(int rank) const {
    return any_gone() && gone_[rank].load(std::memory_order_acquire);
  }
  std::vector<int> Gone() const;
  // Counts an operation that went on without a rank.
  void CountMissing(int rank) {
    missing_[rank].fetch_add(1, std::memory_order_relaxed);
  }
  std::vector<std::int64_t> Missing() const {
    return {missing_.begin(), missing_.end()};
  }
  void ResetMissing() {
    for (auto& count : missing_) count.store(0, std::memory_order_relaxed);
  }

  HangDetector& hangs() { return hangs_; }
  // Asks a rank, perhaps this one, whether it waits in an operation.
  void AskWhetherWaiting(int rank);
  // Answers those who have asked, if this rank waits or an operation has ended
  // since; otherwise leaves their questions for later.
  void AnswerQuestions(bool is_waiting);
  bool HasQuestions();
  // Has the process of a stuck rank ended, and prints why; the first time.
  void EndStuck(int rank, const std::string& reason);
  // Asks ranks that others take for stuck, and ends those that do not answer.
  void CheckSuspects();

  // Fails this rank and, as soon as they wait for it, the others.
  void FailAll(const Header& header, ffi::ErrorCode code,
               const std::string& text);
  // The header of an operation that has not been made.
  Header NextHeader(const char* name) const;

  // Control messages are sent only if an operation stalls, ends, or is new.
  void AnnounceArrival(const Header& header);
  void AnnounceLeave();
  // Reports to all ranks that an operation does not match that of `rank`, or
  // that a message of that rank is malformed.
  void AnnounceFailure(const Header& header, int rank,
                       ControlMessage::Kind kind = ControlMessage::kFailed);
  // Fails after a malformed message outside of an operation, and reports it.
  void FailMalformed(int source, const std::string& wrong);
  // Reads and answers the control messages that have arrived; never waits.
  void ReadControlMessages();

  // Records the peers of an operation for later queries. Returns whether to
  // query them: if `check` comes with that pattern for the first time.
  bool RecordPattern(std::uint64_t sequence, const Pattern& pattern,
                     bool check);
  // Queries a rank whether its pattern in an operation matches.
  void Ask(int rank, const Header& header, const Pattern& pattern);
  // Its answer, once.
  std::optional<ControlMessage> TakeAnswer(int rank, std::uint64_t sequence);

  // Asks a rank for the header of its operation of that number.
  void AskPosted(int rank, const Header& header);
  // Its answer, once; none comes before it has started that operation.
  std::optional<Header> TakePosted(int rank, std::uint64_t sequence);

  // The last position that a rank has announced.
  std::optional<Header> LastControlMessage(int rank);
  bool HasLeft(int rank);

  TrafficCounters& traffic() { return traffic_; }
  void CountSent(int peer, std::size_t bytes) {
    traffic_.CountSent(peer, bytes);
  }
  void CountReceived(int peer, std::size_t bytes) {
    traffic_.CountReceived(peer, bytes);
  }
  void CountOperation() { traffic_.CountOperation(); }
  void CountAgreement() { traffic_.CountAgreement(); }

 private:
  // The peers of an earlier operation, for answers to queries.
  struct Past {
    std::uint64_t sequence = 0;
    std::shared_ptr<const Pattern> pattern;
  };
  static constexpr std::size_t kPast = 4096;
  struct Known {
    std::shared_ptr<const Pattern> pattern;
    bool asked = false;
  };

  void SendControlMessage(int peer, const ControlMessage& message);
  // Receives a message that a probe has found; returns what is wrong with it.
  std::string ReceiveControlMessage(MPI_Message matched,
                                    const MPI_Status& found,
                                    ControlMessage* message);
  // The answer to a query; nullopt if this rank has not come to the operation.
  std::optional<ControlMessage> Answer(int rank, const ControlMessage& query);

  std::unique_ptr<Duplicates> duplicates_;
  int rank_ = 0;
  int size_ = 1;
  double timeout_;
  std::shared_ptr<Channels> channels_;  // null: there are none
  std::unique_ptr<Mailboxes> mailboxes_;
  std::shared_ptr<Communicator> root_;  // null for a root itself
  std::vector<int> root_ranks_;  // this communicator's ranks, in the root
  int number_ = 0;
  std::atomic<int> parts_{0};  // made of it
  bool shares_memory_ = false;
  std::size_t chunks_in_flight_ = kFewestInFlight;
  const bool is_fault_tolerant_;
  std::atomic<bool> reweights_{false};
  std::atomic<bool> any_gone_{false};
  std::atomic<Clock::rep> looked_at_{0};  // the last look for failed ranks
  std::vector<std::atomic<bool>> gone_;   // by rank
  std::vector<std::atomic<std::int64_t>> missing_;  // operations, by rank
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<std::uint64_t> tickets_{0};
  std::atomic<std::uint64_t> turn_{0};
  std::atomic<bool> closed_{false};
  HeaderLog log_;
  TagOrder tags_;
  RequestNumbers requests_;
  FirstFailure failure_;
  TrafficCounters traffic_;
  HangDetector hangs_;

  std::mutex mutex_;  // guards all below
  std::vector<std::optional<Header>> last_messages_;
  std::vector<bool> left_;
  std::set<std::uint64_t> graphs_;
  std::map<std::pair<std::vector<int>, std::vector<int>>, Known> patterns_;
  std::vector<Past> past_;  // by sequence, modulo its length
  std::vector<std::pair<int, ControlMessage>> queries_;
  // The ranks that have asked whether this one waits, and the operations that
  // had ended then.
  std::map<int, std::uint64_t> questions_;
  std::map<std::pair<int, std::uint64_t>, ControlMessage> answers_;
  // Headers that ranks have sent on a question; the last ones.
  static constexpr std::size_t kPosted = 4096;
  std::map<std::pair<std::uint64_t, int>, Header> posted_;
};

// The difference between two ranks' edges to each other; empty if they match.
std::string Disagreement(int a, bool a_sends, bool a_receives, int b,
                         bool b_sends, bool b_receives);

// Fails the communicator (null: there is none) and its peers with the exception
// that is being handled, which `name` has thrown; returns the error.
ffi::Error FailByException(Communicator* comm, const char* name);

// The communicators of this process, by the context number of operations.
Registry<Communicator>& Communicators();

// The text of an MPI return code.
std::string ErrorText(int code);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COMMUNICATOR_H_
