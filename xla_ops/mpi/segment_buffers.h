// Buffers and request slots of the segments in flight.
#ifndef JFOG_XLA_OPS_MPI_SEGMENT_BUFFERS_H_
#define JFOG_XLA_OPS_MPI_SEGMENT_BUFFERS_H_

#include <cstddef>
#include <vector>

#include "mpi/buffer_pool.h"
#include "mpi/segments.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

// Numbers of the ranks with which an average inside and between machines
// exchanges messages.
struct EdgeCounts {
  std::size_t peers = 0;         // other ranks of the machine
  std::size_t sources = 0;       // ranks of other machines
  std::size_t destinations = 0;  // the same
  std::size_t chunks = 0;        // in flight between machines
};

// Memory for messages of an average inside and between machines, and the
// numbering of its requests. Segments share it round-robin: segment s uses the
// buffers that segment s - num_in_flight() used before.
class SegmentBuffers {
 public:
  // Segments in flight, at least. Between machines they are so many that the
  // ranks of a machine have `EdgeCounts::chunks` in flight, together.
  static constexpr std::size_t kNear = 4;
  // Bytes for the header of a rank, and for the input of a short operation or
  // the claim of the channel of results that follows the header.
  static constexpr std::size_t kHeaderBytes = kEnvelope;

  // The kinds of messages, each with one request per peer, source or
  // destination.
  enum Kind {
    kHeader,      // received; from peers, then sources
    kSentHeader,  // to peers, then destinations
    // Per segment in flight:
    kInput,    // received; this rank's part, from a peer
    kPacked,   // a peer's part, to that peer
    kMeans,    // received; from a source
    kMean,     // to a destination
    kResults,  // received; a peer's part
    kMixed,    // this rank's part, to a peer
    kKinds
  };

  // The buffers and the messages in flight of one segment. Buffers of several
  // ranks are `stride` bytes apart.
  struct InFlight {
    std::byte* inputs = nullptr;   // this rank's part, from every peer
    std::byte* packed = nullptr;   // input for every peer
    std::byte* mean = nullptr;     // of this rank's part over the machine
    std::byte* means = nullptr;    // from every source
    std::byte* mixed = nullptr;    // this rank's part of the result
    std::byte* results = nullptr;  // from every peer
    std::size_t inputs_left = 0;
    std::size_t means_left = 0;
    std::size_t sends_left = 0;
    std::vector<bool> has_result;  // by peer
  };

  // A request, decoded.
  struct Message {
    Kind kind;
    std::size_t index;    // of the rank, among those of its kind
    std::size_t segment;  // modulo num_in_flight(); 0 for headers
  };

  SegmentBuffers(const Segments& segments, const EdgeCounts& edges);

  std::size_t num_in_flight() const { return in_flight_.size(); }
  InFlight& of(std::size_t segment) {
    return in_flight_[segment % num_in_flight()];
  }
  const InFlight& of(std::size_t segment) const {
    return in_flight_[segment % num_in_flight()];
  }
  std::size_t stride() const { return stride_; }
  // The header received from the e-th peer or source.
  std::byte* header(std::size_t e) const {
    return buffer_.get() + e * kHeaderBytes;
  }
  // Headers to send: one to all destinations, then one to each peer with what
  // follows it.
  std::byte* sent_headers() const { return sent_headers_; }

  std::size_t slots() const;
  std::size_t SlotOfHeader(Kind kind, std::size_t index) const {
    return first_[kind] + index;
  }
  std::size_t SlotOf(std::size_t segment, Kind kind, std::size_t index) const {
    return first_[kind] + segment % num_in_flight() * slots_per_segment_ +
           index;
  }
  Message Decode(std::size_t slot) const;

  void Leak() { buffer_.Leak(); }

 private:
  std::size_t stride_;
  Buffer buffer_;
  std::byte* sent_headers_ = nullptr;
  std::vector<InFlight> in_flight_;
  // The first slot of each kind, in the first segment, and the end of these.
  std::size_t first_[kKinds + 1] = {};
  std::size_t slots_per_segment_ = 0;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_SEGMENT_BUFFERS_H_
