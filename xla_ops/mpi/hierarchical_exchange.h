// Exchange of an average inside and between machines.
#ifndef JFOG_XLA_OPS_MPI_HIERARCHICAL_EXCHANGE_H_
#define JFOG_XLA_OPS_MPI_HIERARCHICAL_EXCHANGE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/operation.h"
#include "mpi/plan.h"
#include "mpi/segment_buffers.h"
#include "mpi/segments.h"
#include "mpi/shared_memory_channel.h"

namespace jfog::mpi {

// The payload is cut into segments, and each segment into one part per rank of
// the machine. With m the mean of a part over the machine, each rank
//
//   1. receives its own part from the other ranks of its machine (inputs), and
//      computes m;
//   2. sends m to the same local rank of the neighboring machines, receives
//      theirs (means), and computes the weighted sum;
//   3. sends that to the other ranks of its machine (results).
//
// So each link between machines carries a part of the payload, at the same time
// as the others. Several segments are in flight, each in its own step, which
// overlaps the links inside a machine with those between machines. Between the
// ranks of one machine the payload goes through shared-memory channels where
// one is free: in step 1 one chunk for each part but the sender's own, in step
// 3 one for each segment. Otherwise it goes in messages.
//
// Outputs may alias inputs: a part is overwritten only after all ranks that
// read it have received it, see `Mix` and `TakeResult`.
class HierarchicalExchange : public Operation {
 public:
  // `members` are the ranks of this machine; `round` names its peers by rank.
  HierarchicalExchange(std::shared_ptr<Communicator> comm, const char* name,
                       Payload payload, std::uint64_t variant,
                       const std::vector<int>& members, Round round);

 private:
  // Another rank of this machine.
  struct Peer {
    int rank = 0;
    std::size_t part = 0;  // its index on the machine
    // The peer's channels; without one it sends messages.
    std::optional<Channels::Claim> inputs, results;
    std::size_t next_input = 0;  // chunk of its inputs, to be read or skipped
    bool taken = false;          // its result of segment `gathered_` is read
  };

  ffi::Error Post() override;
  ffi::Error Completed(std::size_t slot) override;
  bool is_waiting() const override;
  ffi::Error Resume(bool* moved) override;
  void Ended() override;
  void Leak() override { buffers_.Leak(); }
  std::vector<int> Missing() const override;

  // Messages.
  int tag(SegmentBuffers::Kind kind) const;
  ffi::Error SendHeaders();
  // Starts the first segments, when messages with tags are allowed.
  ffi::Error StartSegments();
  ffi::Error HeaderReceived(std::size_t e);
  ffi::Error SendInputs(std::size_t segment);
  ffi::Error ReceiveSegment(std::size_t segment);
  int RankOfHeader(std::size_t e) const;
  int RankOfSlot(std::size_t slot) const;

  // Step 1.
  std::size_t InputChunks() const { return segments_.size() * peers_.size(); }
  std::size_t PartOfChunk(std::size_t chunk, std::size_t sender) const;
  bool PublishInput();
  const std::byte* FindInput(const Peer& peer) const;
  void InputDone(Peer& peer);
  bool SkipInputs(Peer& peer);
  bool HasInputs();
  ffi::Error TakeMean();
  // Step 2.
  ffi::Error Mix();
  // Step 3.
  bool PublishResult();
  const std::byte* FindResult(const Peer& peer) const;
  bool TakeResult(std::size_t p);
  bool IsGathered() const;
  ffi::Error EndSegment();

  Channels& channels() const { return *comm().channels(); }
  int RankInRoot(const Peer& peer) const {
    return comm().RankInRoot(peer.rank);
  }

  const Round round_;
  std::size_t me_ = 0;  // this rank's index on its machine, and its part
  std::vector<Peer> peers_;
  std::vector<Term> mean_terms_, mix_terms_;
  const Segments segments_;
  SegmentBuffers buffers_;
  TagUse tags_;
  std::vector<int> readers_;      // of this rank's channels, in the root
  bool shares_channels_ = false;  // channels reach all peers
  std::optional<Channels::Claim> inputs_channel_, results_channel_;

  // Segments that have completed a step: averaged_ >= mixed_ >= gathered_.
  std::size_t averaged_ = 0;
  std::size_t mixed_ = 0;
  std::size_t gathered_ = 0;
  std::size_t unchecked_ = 0;          // ranks whose header has not arrived
  std::size_t published_inputs_ = 0;   // chunks
  std::size_t published_results_ = 0;  // chunks
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_HIERARCHICAL_EXCHANGE_H_
