// Point-to-point exchange with neighbors, in chunks.
#ifndef JFOG_XLA_OPS_MPI_EXCHANGE_H_
#define JFOG_XLA_OPS_MPI_EXCHANGE_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "mpi/buffer_pool.h"
#include "mpi/consistency_check.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// The edges of one rank in an exchange. Both ends of an edge give it the same
// length.
struct Edges {
  std::vector<int> sources;
  std::vector<int> destinations;
  // All destinations receive the same bytes, a condition for a shared-memory
  // channel; otherwise each receives bytes of its own.
  bool same_payload = true;
  // A later round of an operation: it starts when the round before it ends, not
  // in program order.
  bool is_followup = false;
  // Payload bytes on each edge; empty: those of the leaves, on all edges.
  std::vector<std::size_t> source_bytes = {};
  std::vector<std::size_t> destination_bytes = {};
};

// Sends a payload to some ranks and receives one from others.
//
// Chunk 0 is a header and, of a short payload, all of it. A longer payload
// follows in chunks that fit into the cache; while chunks are in flight, the
// one before them is consumed. Between ranks of one machine chunk 0 goes
// through a mailbox, and the further ones are read in place, from a
// shared-memory channel of the sender; other ranks receive messages, through
// sets of buffers in turn. Outputs may alias inputs, since a chunk is consumed
// after it was packed.
class Exchange : public Operation {
 public:
  // For peers that are arguments of each rank, before the start: see
  // consistency_check.h. With `check`, a stalled exchange checks them again.
  ffi::Error AgreeOnPeers(bool check);

 protected:
  // A chunk from a source: bytes [begin, end) of its payload; null without any.
  struct Part {
    const std::byte* bytes = nullptr;
    std::size_t begin = 0;
    std::size_t end = 0;
  };

  Exchange(std::shared_ptr<Communicator> comm, const char* name, Payload leaves,
           std::uint64_t variant, Edges edges);

  // Writes bytes [begin, end) of the payload for a destination, by its index.
  virtual void Pack(std::size_t destination, std::size_t begin, std::size_t end,
                    std::byte* to) = 0;
  // Consumes a chunk from every source, in their order. [begin, end) is the
  // chunk's range in this rank's own payload.
  virtual ffi::Error Consume(std::size_t begin, std::size_t end,
                             const std::vector<Part>& received) = 0;
  // The name of `Consume` in the timeline.
  virtual const char* phase() const { return "sum"; }
  // Bytes for the traffic counters, by the index of the rank.
  virtual std::size_t CountOfSource(std::size_t) const {
    return leaves().bytes;
  }
  virtual std::size_t CountOfDestination(std::size_t) const {
    return leaves().bytes;
  }

  const std::vector<int>& sources() const { return edges_.sources; }
  const std::vector<int>& destinations() const { return edges_.destinations; }

  // Lets it go on without the neighbors that have failed, if the communicator
  // reweights: `Consume` gets null for what they have not sent.
  void AllowMissing() { allows_missing_ = true; }

  // Whether something is left out.
  bool is_missing_any() const { return !lost_from_.empty(); }

  // See Operation::Renew.
  void Renew();

  bool waits_for_memory() const override { return waits_for_memory_; }
  ffi::Error Post() override;
  ffi::Error Resume(bool* moved) override;
  bool is_waiting() const override {
    return consumed_ < chunks_ || published_ < own_chunks_;
  }
  ffi::Error Completed(std::size_t slot) override;
  void Ended() override;
  std::vector<int> Missing() const override;
  void Leak() override { buffer_.Leak(); }
  ffi::Error GoOnWithout(const std::vector<int>& gone) override;
  ffi::Error RequestFailed(std::size_t slot) override;
  ffi::Error Stalled() override;

 private:
  // Pairs of buffers, and so chunks in flight, on one machine.
  static constexpr std::size_t kNearPairs = 2;

  // The buffers of one chunk, to all destinations and from all sources.
  struct BufferPair {
    std::size_t outstanding = 0;  // messages
    std::byte* sent = nullptr;
    std::byte* received = nullptr;
  };
  BufferPair& BuffersOf(std::size_t chunk) {
    return buffer_pairs_[chunk % buffer_pairs_.size()];
  }

  // Chunk 0 of an edge, if it goes through a mailbox.
  struct Mail {
    bool is_used = false;
    bool is_open = false;  // still to be written or read
    std::uint64_t number = 0;
    const Mailboxes::Message* message = nullptr;  // once it has arrived
  };
  Mailboxes& mailboxes() const { return *comm().mailboxes(); }
  bool UsesMailbox(int rank, std::size_t bytes) const;

  void ComputeOffsets();
  void EnterTags();
  std::size_t PairsNeeded() const;
  // The number of chunks of a payload, and the offset of one of them.
  std::size_t ChunksOf(std::size_t bytes) const;
  std::size_t Begin(std::size_t bytes, std::size_t chunk) const;
  int tag(std::size_t chunk) const;
  Header Envelope() const;
  std::size_t FirstSlot(std::size_t chunk) const;
  // Posts the first messages with tags of their own, when that is allowed.
  ffi::Error PostTagged();
  ffi::Error PostSends(std::size_t chunk);
  ffi::Error PostReceives(std::size_t chunk);
  ffi::Error PostFirstReceives();
  void WriteMail(bool* moved);
  ffi::Error ReadMail(bool* moved);
  // Takes the checked header of a source.
  ffi::Error HeaderArrived(std::size_t source, const Header& theirs);
  // Whether to go on without a rank, which has failed.
  bool LeavesOut(int rank) const;
  // From a chunk on nothing comes from a source; without a header if that is 0.
  ffi::Error Lose(std::size_t source, std::size_t chunk);
  bool IsLost(std::size_t source, std::size_t chunk) const {
    return !lost_from_.empty() && chunk >= lost_from_[source];
  }
  // The number of headers to come has changed.
  ffi::Error HeaderSettled();
  // Whether a chunk has been sent and has arrived from all sources; if so, sets
  // `parts_`.
  bool HasArrived(std::size_t chunk);
  ffi::Error ConsumeChunk(std::size_t chunk);

  Edges edges_;               // with all lengths filled in
  std::size_t payload_;       // bytes of the leaves
  std::vector<int> readers_;  // destinations on this machine, in the root
  std::size_t chunks_;        // of the longest edge
  std::size_t own_chunks_;    // of this rank's payload
  std::size_t consumed_;      // chunks
  std::size_t published_;     // chunks, in the channel; all without one
  std::size_t unchecked_;     // sources whose header has not arrived
  std::size_t stride_;        // bytes between the buffers of a pair
  std::optional<Channels::Claim> channel_;
  std::vector<std::optional<Channels::Claim>> source_channels_;
  std::vector<Mail> sent_mail_, received_mail_;  // by destination, by source
  std::size_t unwritten_ = 0;                    // open ones of these
  std::size_t unread_ = 0;
  bool waits_for_memory_ = false;  // and for no MPI message
  bool allows_missing_ = false;
  std::vector<std::size_t> lost_from_;  // chunk, by source; empty: none is lost
  std::vector<BufferPair> buffer_pairs_;
  Buffer buffer_;
  std::vector<Part> parts_;
  std::optional<PeerCheck> check_;
  TagUse tags_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_EXCHANGE_H_
