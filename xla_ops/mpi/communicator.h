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

#include "common/status.h"
#include "common/text.h"
#include "mpi/shared_memory_channel.h"

namespace jfog::mpi {

// What one rank says of the operation it is in; the first bytes of every
// point-to-point exchange, so that ranks that disagree find out.
struct Header {
  std::uint64_t magic = 0;
  std::uint64_t sequence = 0;   // the how-manieth operation of the communicator
  std::uint64_t signature = 0;  // dtypes and element counts of all leaves
  std::uint64_t variant =
      0;                    // the graph and its round, the reduction, the root
  std::uint64_t bytes = 0;  // of the payload
  std::uint64_t stamp = 0;  // of the first chunk in a lane; 0: none will come
  std::int32_t lane = 0;
  char operation[44] = {};
};
static_assert(sizeof(Header) == 96, "keeps what follows aligned");

// What one rank names in an operation with peers.
struct Pattern {
  std::vector<int> sources;
  std::vector<int> destinations;

  bool Sends(int rank) const;
  bool Receives(int rank) const;
};

// A short message outside the ordered chain.
struct ControlMessage {
  enum Kind : std::int32_t {
    kArrival,  // "this is where I am"
    kLeave,    // "I take part in nothing any more"
    kQuery,    // "do your peers in that operation match mine?"
    kYes,
    kNo,
    kNoPeers,  // "I am in another operation"
    kFailed,   // "that operation has failed, because of `rank`"
  };
  Header header;
  Kind kind = kArrival;
  std::int32_t rank = 0;
  // Of the writer, with the reader.
  std::int32_t sends = 0;
  std::int32_t receives = 0;
};

struct Counters {
  std::vector<std::int64_t> bytes_sent, bytes_received, messages_sent;
  std::int64_t operations = 0;
  std::int64_t agreements = 0;
};

// A duplicate of an MPI communicator with what jfog knows about it. After its
// first failure it refuses all further work with that failure's text.
class Communicator {
 public:
  // Collective over `parent`. A communicator split off another one learns from
  // the notes of that root which ranks have left, and uses its lanes.
  Communicator(MPI_Comm parent, double timeout, std::shared_ptr<Lanes> lanes,
               std::shared_ptr<Communicator> root);
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  MPI_Comm comm() const { return comm_; }
  // For what is sent outside the ordered chain: notes and agreements.
  MPI_Comm control_comm() const { return control_comm_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }
  // The shared memory of its root, where there is any, which counts ranks in
  // the root.
  Lanes* lanes() const { return lanes_.get(); }
  std::shared_ptr<Lanes> shared_lanes() const { return lanes_; }
  // Whether all ranks are on one machine; the same on all of them.
  bool shares_memory() const { return shares_memory_; }
  int RankInRoot(int rank) const { return root_ ? root_ranks_[rank] : rank; }

  std::uint64_t NextSequence() { return sequence_.fetch_add(1); }
  // Of a request to another rank's windows.
  std::uint64_t NextRequest() { return requests_.fetch_add(1); }

  // MPI wants collectives started in one order on all ranks. Each takes a
  // ticket when it is posted in program order, and starts when its turn comes.
  std::uint64_t TakeTicket() { return tickets_.fetch_add(1); }
  std::uint64_t turn() const { return turn_.load(std::memory_order_acquire); }
  void EndTurn() { turn_.fetch_add(1, std::memory_order_acq_rel); }

  // The how-manieth graph this one is, if no operation here has used it before.
  std::optional<std::uint64_t> IfNew(std::uint64_t graph);

  // After this it is of no use to new operations.
  void Close() { closed_.store(true, std::memory_order_release); }
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  // The first failure's error, or success.
  ffi::Error Refusal();
  // Records a failure unless there is one already.
  void Fail(ffi::ErrorCode code, const std::string& text);
  bool failed() const { return failed_.load(std::memory_order_acquire); }

  // Notes are sent only when something stalls, ends, or is new.
  void AnnounceArrival(const Header& header);
  void AnnounceLeave();
  // To all ranks: an operation does not match that of a rank.
  void AnnounceFailure(const Header& header, int rank);
  // Reads what has arrived, and answers; cheap, never waits.
  void ReadControlMessages();

  // Notes whom an operation names, so that others can ask. Returns whether to
  // ask them, which is where `check` comes with that pattern for the first
  // time.
  bool RecordPattern(std::uint64_t sequence, const Pattern& pattern,
                     bool check);
  // Asks a rank whether its pattern in an operation matches.
  void Ask(int rank, const Header& header, const Pattern& pattern);
  // Its answer, once.
  std::optional<ControlMessage> TakeAnswer(int rank, std::uint64_t sequence);

  // The last that this rank of the communicator said of where it is.
  std::optional<Header> LastControlMessage(int rank);
  bool HasLeft(int rank);

  void CountSent(int peer, std::size_t bytes);
  void CountReceived(int peer, std::size_t bytes);
  void CountOperation() { operations_.fetch_add(1, kRelaxed); }
  void CountAgreement() { agreements_.fetch_add(1, kRelaxed); }
  Counters counters() const;
  void ResetCounters();

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
  using Counts = std::vector<std::atomic<std::int64_t>>;

  // What it says of itself in an operation it has been in.
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
  // An answer to a query, unless it is too early for one.
  std::optional<ControlMessage> Answer(int rank, const ControlMessage& query);

  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Comm control_comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  double timeout_;
  std::shared_ptr<Lanes> lanes_;        // null: there are none
  std::shared_ptr<Communicator> root_;  // null for a root itself
  std::vector<int> root_ranks_;  // this communicator's ranks, in the root
  bool shares_memory_ = false;
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<std::uint64_t> requests_{0};
  std::atomic<std::uint64_t> tickets_{0};
  std::atomic<std::uint64_t> turn_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> closed_{false};
  Counts bytes_sent_, bytes_received_, messages_sent_;
  std::atomic<std::int64_t> operations_{0};
  std::atomic<std::int64_t> agreements_{0};

  std::mutex mutex_;  // guards all below
  std::optional<std::pair<ffi::ErrorCode, std::string>> failure_;
  std::vector<std::optional<Header>> last_messages_;
  std::vector<bool> left_;
  std::set<std::uint64_t> graphs_;
  std::map<std::pair<std::vector<int>, std::vector<int>>, Known> patterns_;
  std::vector<Past> past_;  // by sequence, modulo its length
  std::vector<std::pair<int, ControlMessage>> queries_;
  std::map<std::pair<int, std::uint64_t>, ControlMessage> answers_;
};

// How two ranks' words on the edges between them differ; empty if they do not.
std::string Disagreement(int a, bool a_sends, bool a_receives, int b,
                         bool b_sends, bool b_receives);

// The communicators of this process, by the number that operations carry.
std::int64_t Register(std::shared_ptr<Communicator> comm);
std::shared_ptr<Communicator> Lookup(std::int64_t context);
void Unregister(std::int64_t context);
void FailAll(const std::string& text);

// The text of an MPI return code.
std::string ErrorText(int code);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COMMUNICATOR_H_
