// Requests to the windows of remote ranks, and replies: layout and checks.
#ifndef JFOG_XLA_OPS_MPI_WINDOWS_REQUESTS_H_
#define JFOG_XLA_OPS_MPI_WINDOWS_REQUESTS_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/cache_line.h"
#include "mpi/messages.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {

// First message of a remote operation. A short payload of a put or an
// accumulate lies behind it in the same message, a longer one follows it.
struct WindowRequest {
  enum Kind : std::int32_t { kPut, kAccumulate, kGet, kLock, kUnlock, kKinds };
  std::uint64_t window = 0;  // its global id
  std::uint64_t bytes = 0;   // of the payload
  double weight = 1;
  Kind kind = kPut;
  std::int32_t record = 0;
  std::int32_t tag = 0;  // of the reply
  std::int32_t padding = 0;
  std::uint64_t check = 0;

  // Where a payload lies in the message.
  static constexpr std::size_t kPayload = kCacheLine;
  // The longest short payload.
  static constexpr std::size_t kShort = kEnvelope - kPayload;
  std::size_t MessageBytes() const {
    return bytes > 0 && bytes <= kShort ? kPayload + bytes
                                        : sizeof(WindowRequest);
  }
  bool has_payload() const { return kind == kPut || kind == kAccumulate; }
};
static_assert(sizeof(WindowRequest) <= WindowRequest::kPayload);

// Reads one of `count` bytes.
std::string Read(const std::byte* bytes, std::size_t count,
                 WindowRequest* request);
// Compares a request with the window that it names: the bytes of a payload
// there, and the record of the request's source.
std::string CheckRequest(const WindowRequest& request,
                         std::size_t payload_bytes, int record);

// Completes a request. The payload of a get follows it.
struct WindowReply {
  std::int32_t state = 0;  // a WindowMemory::State; kOpen: success
  std::int32_t tag = 0;    // of the request
  std::uint64_t check = 0;
};

// Reads one of `count` bytes, for a request with this tag.
std::string Read(const std::byte* bytes, std::size_t count, int tag,
                 WindowReply* reply);
// The check of a state, also of one in shared memory.
std::string CheckWindowState(std::int32_t state);

// Tags on the communicator of control messages. A request's number selects the
// tags of its reply and of the reply's payload.
constexpr int kRequestTag = 5;
constexpr int kRequestPayloadTag = 6;
int ReplyTag(int number);
// The number of a request with that tag.
int RequestNumber(int reply_tag);
int ReplyPayloadTag(int reply_tag);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_WINDOWS_REQUESTS_H_
