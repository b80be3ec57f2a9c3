// Wire format: tags and lengths of the messages between ranks.
#ifndef JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_
#define JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_

#include <cstddef>

#include "mpi/messages.h"
#include "mpi/shared_memory_channel.h"

namespace jfog::mpi {

// Maximum length of the first message on an edge: the header, and all of a
// short payload. Longer messages are received only after the header is checked:
// Open MPI 5.0.11 writes past the end of a buffer that is shorter than the
// message, as it is when ranks disagree on the payload.
constexpr std::size_t kEnvelope = 60 * 1024;
constexpr std::size_t kShort = kEnvelope - sizeof(Header);
// Length of the further messages; see benchmarks/README.md.
constexpr std::size_t kChunk = Channels::kSlotBytes;

// First messages have one tag and are sent in program order, so ranks in
// different operations receive each other's headers and report the mismatch.
// Later rounds of one operation start out of program order and use other tags.
constexpr int kEnvelopeTag = 1;
// Chunks of operations in flight are not ordered among each other, so each
// operation has its own two tags. MPI guarantees tags up to 32767.
constexpr int kChunkTags = 16000;
constexpr int kChunkTag = 16;
constexpr int kSecondTag = kChunkTag + kChunkTags;

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WIRE_FORMAT_H_
