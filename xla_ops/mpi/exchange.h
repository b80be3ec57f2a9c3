// Point-to-point exchanges with neighbors, in chunks.
#ifndef JFOG_XLA_OPS_MPI_EXCHANGE_H_
#define JFOG_XLA_OPS_MPI_EXCHANGE_H_

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "mpi/buffer_pool.h"
#include "mpi/consistency_check.h"
#include "mpi/operation.h"

namespace jfog::mpi {

// Who exchanges with whom, and what: both ends of an edge know its length.
struct Edges {
  std::vector<int> sources;
  std::vector<int> destinations;
  // Whether all destinations get the same bytes; only then is a lane used.
  bool alike = true;
  // Whether it starts out of program order, behind another one.
  bool late = false;
  // Of the payload on each edge; where empty, that of the leaves.
  std::vector<std::size_t> source_bytes = {};
  std::vector<std::size_t> destination_bytes = {};
};

// Sends a payload to some ranks and receives one from others. One that is not
// short travels in chunks that stay in the cache: while one is on its way, the
// one before it is used. Ranks of one machine read them in a lane of the
// sender, to others they are messages through two sets of buffers. Results may
// lie in the place of the input, since a chunk is used after it was sent.
class Exchange : public Operation {
 public:
  // For peers that each rank names for itself, before the start: see
  // agreement.h. With `check` it asks them also when nothing comes for long.
  ffi::Error AgreeOnPeers(bool check);

 protected:
  // A source's bytes [begin, end) of a chunk.
  struct Part {
    const std::byte* bytes = nullptr;
    std::size_t begin = 0;
    std::size_t end = 0;
  };

  Exchange(std::shared_ptr<Communicator> comm, const char* name, Payload leaves,
           std::uint64_t variant, Edges edges);

  // Writes the payload's bytes [begin, end) for a destination, by its index.
  virtual void Pack(std::size_t destination, std::size_t begin, std::size_t end,
                    std::byte* to) = 0;
  // Takes in a chunk, in which the leaves' own payload has [begin, end), from
  // every source, in their order.
  virtual ffi::Error Consume(std::size_t begin, std::size_t end,
                             const std::vector<Part>& received) = 0;
  // Bytes that count, by the index of the rank.
  virtual std::size_t CountOfSource(std::size_t) const {
    return leaves().bytes;
  }
  virtual std::size_t CountOfDestination(std::size_t) const {
    return leaves().bytes;
  }

  const std::vector<int>& sources() const { return edges_.sources; }
  const std::vector<int>& destinations() const { return edges_.destinations; }

  // See Operation::Renew.
  void Renew();

  ffi::Error Post() override;
  ffi::Error Resume(bool* moved) override;
  bool is_waiting() const override {
    return used_ < chunks_ || packed_ < lane_chunks_;
  }
  ffi::Error Completed(std::size_t slot) override;
  void Ended() override;
  std::vector<int> Missing() const override;
  void Leak() override { buffer_.Leak(); }
  ffi::Error Stalled() override;

 private:
  static constexpr int kWindows = 2;

  // The messages of one chunk.
  struct Window {
    std::size_t outstanding = 0;
    std::byte* sent = nullptr;
    std::byte* received = nullptr;
  };
  Window& WindowOf(std::size_t chunk) { return windows_[chunk % kWindows]; }

  void ComputeOffsets();
  // The number of chunks of so many bytes, and where one of them begins.
  std::size_t ChunksOf(std::size_t bytes) const;
  std::size_t Begin(std::size_t bytes, std::size_t chunk) const;
  int tag(std::size_t chunk) const;
  Header Envelope() const;
  std::size_t FirstSlot(std::size_t chunk) const;
  ffi::Error PostSends(std::size_t chunk);
  ffi::Error PostReceives(std::size_t chunk);
  // Whether a chunk has been sent, and all that is received of it is there.
  bool IsThere(std::size_t chunk);
  ffi::Error Use(std::size_t chunk);

  Edges edges_;               // with all lengths
  std::size_t payload_;       // bytes of the leaves
  std::vector<int> sharing_;  // the destinations on this machine, in the root
  std::size_t chunks_;        // of the longest edge
  std::size_t lane_chunks_;   // of the own payload
  std::size_t used_;          // the first chunk that is not used
  std::size_t packed_;        // the first that is to go into the lane
  std::size_t unchecked_;     // sources whose header has not come
  std::size_t stride_;        // bytes between the buffers of a window
  std::optional<Lanes::Claim> lane_;
  std::vector<std::optional<Lanes::Claim>> source_lanes_;
  std::array<Window, kWindows> windows_;
  Buffer buffer_;
  std::vector<Part> parts_;
  std::optional<PeerCheck> check_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_EXCHANGE_H_
