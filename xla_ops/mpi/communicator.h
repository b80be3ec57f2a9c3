// Communicators of this process and the operations that run on them.
#ifndef JFOG_XLA_OPS_MPI_COMMUNICATOR_H_
#define JFOG_XLA_OPS_MPI_COMMUNICATOR_H_

#include <mpi.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"

namespace jfog::mpi {

using Clock = std::chrono::steady_clock;

// What one rank says of the operation it is in; the first bytes of every
// point-to-point message, so that ranks that disagree find out.
struct Header {
  std::uint64_t magic;
  std::uint64_t sequence;   // the how-manieth operation of this communicator
  std::uint64_t signature;  // dtypes and element counts of all leaves, in order
  std::uint64_t variant;    // the graph and its round, the reduction, the root
  std::uint64_t bytes;      // of the payload
  char operation[24];
};
static_assert(sizeof(Header) == 64, "keeps what follows aligned");

struct Counters {
  std::vector<std::int64_t> bytes_sent, bytes_received, messages_sent;
  std::int64_t operations = 0;
};

// A duplicate of an MPI communicator with what jfog knows about it. After its
// first failure it refuses all further work with that failure's text.
class Communicator {
 public:
  // Collective over `parent`. `world_ranks` maps ranks to those of the root
  // communicator, whose `notes` channel tells of ranks that have left.
  Communicator(MPI_Comm comm, double timeout,
               std::shared_ptr<Communicator> root);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  MPI_Comm comm() const { return comm_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  double timeout() const { return timeout_; }

  std::uint64_t NextSequence() { return sequence_.fetch_add(1); }

  // The first failure's error, or success.
  ffi::Error Refusal();
  // Records a failure unless there is one already.
  void Fail(ffi::ErrorCode code, const std::string& text);
  bool failed();

  // Notes: small messages outside the ordered chain, sent only when something
  // stalls or ends. "I have reached operation `sequence`."
  void AnnounceArrival(std::uint64_t sequence);
  // "I take part in nothing any more."
  void AnnounceLeave();
  // Reads what has arrived; cheap, never waits.
  void ReadNotes();
  // Whether this rank of the communicator said that it reached `sequence`.
  bool HasArrived(int rank, std::uint64_t sequence);
  bool HasLeft(int rank);

  void CountSent(int peer, std::size_t bytes);
  void CountReceived(int peer, std::size_t bytes);
  void CountOperation();
  Counters counters();
  void ResetCounters();

 private:
  void SendNote(int peer, std::uint64_t value);

  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Comm notes_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  double timeout_;
  std::shared_ptr<Communicator> root_;  // null for a root itself
  std::vector<int> root_ranks_;  // this communicator's ranks, in the root
  std::atomic<std::uint64_t> sequence_{0};

  std::mutex mutex_;  // guards all below
  std::optional<std::pair<ffi::ErrorCode, std::string>> failure_;
  std::vector<std::uint64_t> last_note_;
  Counters counters_;
};

// One operation in flight: its number, its pending requests and the buffers
// they use. Either everything completes in `WaitAll` or the communicator fails.
class Operation {
 public:
  Operation(std::shared_ptr<Communicator> comm, const char* name,
            std::uint64_t signature, std::uint64_t variant,
            std::string description);
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  // The header of this rank's messages.
  Header MakeHeader(std::size_t bytes) const;
  // A buffer that lives as long as MPI may need it.
  std::byte* Allocate(std::size_t bytes);

  // Point to point: messages of `bytes` bytes that start with a header, which
  // the receiver compares with its own. The buffer of a receive is allocated.
  ffi::Error PostReceive(int source, std::size_t bytes,
                         const std::byte** buffer);
  ffi::Error PostSend(int destination, const std::byte* buffer,
                      std::size_t bytes);
  // A pending request of a collective, started by the caller.
  MPI_Request* AddCollective();

  // Completes everything that was posted, within the communicator's timeout.
  ffi::Error WaitAll();

  // Turns an MPI return code into a failure of the communicator.
  ffi::Error Check(int code, const char* expression);
  ffi::Error Fail(ffi::ErrorCode code, const std::string& text);

  // All ranks compare what they are about to do; a collective that must not
  // start on ranks that disagree comes after it.
  ffi::Error Agree();

  Communicator& comm() { return *comm_; }
  // "neighbor_allreduce #41 on rank 0"
  std::string Title() const;

 private:
  struct Pending {
    int peer;             // -1 for a collective
    std::byte* envelope;  // of a first message on its way in, else null
    std::size_t bytes;    // of the whole message on its way in
  };

  ffi::Error ReceivePieces(int source, std::byte* buffer, std::size_t bytes);
  ffi::Error SendPieces(int destination, const std::byte* buffer,
                        std::size_t bytes, int tag);
  MPI_Request* Add(Pending pending);
  ffi::Error Completed(std::size_t index, const MPI_Status& status,
                       bool failed);
  ffi::Error CheckHeader(int source, const Header& theirs);
  // Looks for a reason to stop waiting: a rank that left, the deadline.
  ffi::Error CheckStall(Clock::time_point start);
  std::vector<int> MissingRanks();
  void Release();

  std::shared_ptr<Communicator> comm_;
  const char* name_;
  std::uint64_t sequence_;
  std::uint64_t signature_;
  std::uint64_t variant_;
  std::string description_;
  std::vector<MPI_Request> requests_;
  std::vector<Pending> pending_;
  std::vector<std::unique_ptr<std::byte[]>> buffers_;
  bool warned_ = false;
  bool announced_ = false;
};

#define JFOG_MPI_RETURN_IF_ERROR(operation, expression) \
  JFOG_RETURN_IF_ERROR((operation).Check((expression), #expression))

// The communicators of this process, by the number that operations carry.
std::int64_t Register(std::shared_ptr<Communicator> comm);
std::shared_ptr<Communicator> Lookup(std::int64_t context);
void Unregister(std::int64_t context);
void FailAll(const std::string& text);

// Mixes a value into a running 64-bit hash (the finaliser of SplitMix64).
inline std::uint64_t Mix(std::uint64_t hash, std::uint64_t value) {
  std::uint64_t z = hash + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_COMMUNICATOR_H_
