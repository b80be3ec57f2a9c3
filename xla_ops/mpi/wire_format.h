// Tags and lengths of the messages between ranks.
#ifndef JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_
#define JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_

#include <cstddef>

#include "mpi/communicator.h"
#include "mpi/shared_memory_channel.h"

namespace jfog::mpi {

// The first message on an edge is at most this long: all of a short payload, or
// the header alone. No rank makes room for more than that before it has seen
// the header, for Open MPI 5.0.11 writes past the end of a buffer that is too
// short for what arrives, and ranks that disagree bring just that.
constexpr std::size_t kEnvelope = 60 * 1024;
constexpr std::size_t kShort = kEnvelope - sizeof(Header);
// The length of the further ones: see benchmarks/README.md.
constexpr std::size_t kChunk = Lanes::kSlotBytes;

// First messages are sent in program order, with one tag, so that ranks in
// different operations meet. Those of later rounds of one operation are not.
constexpr int kEnvelopeTag = 1;
// Chunks of different operations overtake each other, so each operation has
// tags of its own, two for what it sends to one rank; MPI promises tags up to
// 32767.
constexpr int kChunkTags = 16000;
constexpr int kChunkTag = 16;
constexpr int kSecondTag = kChunkTag + kChunkTags;

// Buffers start at cache lines.
constexpr std::size_t RoundUp(std::size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_
