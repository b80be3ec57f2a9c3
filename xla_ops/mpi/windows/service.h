// Service of this rank's windows to remote ranks: requests, replies, tags.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_

#include <mpi.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common/cache_line.h"
#include "mpi/communicator.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

// First message of a remote operation. A short payload of a put or an
// accumulate lies behind it in the same message, a longer one follows it.
struct WindowRequest {
  enum Kind : std::int32_t { kPut, kAccumulate, kGet, kLock, kUnlock };
  std::uint64_t window = 0;  // its global id
  std::uint64_t bytes = 0;   // of the payload
  double weight = 1;
  Kind kind = kPut;
  std::int32_t record = 0;
  std::int32_t tag = 0;  // of the reply
  std::int32_t padding = 0;

  // Where a payload lies in the message.
  static constexpr std::size_t kPayload = kCacheLine;
  // The longest short payload.
  static constexpr std::size_t kShort = kEnvelope - kPayload;
  std::size_t MessageBytes() const {
    return bytes > 0 && bytes <= kShort ? kPayload + bytes
                                        : sizeof(WindowRequest);
  }
};
static_assert(sizeof(WindowRequest) <= WindowRequest::kPayload);

// Completes a request. The payload of a get follows it.
struct WindowReply {
  std::int32_t state = 0;  // a WindowMemory::State; kOpen: success
};

// Tags on the communicator of control messages. A request's number selects the
// tags of its reply and of the reply's payload.
constexpr int kRequestTag = 5;
constexpr int kRequestPayloadTag = 6;
int ReplyTag(std::uint64_t request);
int ReplyPayloadTag(int reply_tag);

// A payload that follows its request goes in pieces, as MPI sends a message of
// their length at once; a long one leaves it to MPI, which then asks the
// receiver first, to cut it.
constexpr std::size_t kLongestInPieces = 4 << 20;
// The length of all pieces but the last.
constexpr std::size_t PieceBytes(std::size_t payload) {
  return payload <= kLongestInPieces ? kChunk : payload;
}
constexpr std::size_t Pieces(std::size_t payload) {
  return (payload + PieceBytes(payload) - 1) / PieceBytes(payload);
}
static_assert(kChunk % kCacheLine == 0);

// Payloads are counted in cache lines, to which they are padded, since MPI
// counts in an int.
constexpr int kLineBytes = static_cast<int>(kCacheLine);
MPI_Datatype Line();

// Serves the requests of remote ranks on the progress thread that reads control
// messages, also while this rank computes or sleeps.
void ServeWindows(const std::shared_ptr<Communicator>& comm);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_SERVICE_H_
