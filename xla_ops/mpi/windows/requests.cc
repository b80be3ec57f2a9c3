// Requests to the windows of remote ranks, and replies: layout and checks.
#include "mpi/windows/requests.h"

#include <climits>

#include "mpi/windows/memory.h"

namespace jfog::mpi {
namespace {

// MPI counts the cache lines of a payload in an int.
constexpr std::uint64_t kLongest = std::uint64_t{INT_MAX} * kCacheLine;

std::string Field(const char* name, std::uint64_t value,
                  const std::string& expected) {
  return std::string(name) + "=" + std::to_string(value) + ", which " +
         expected;
}

}  // namespace

std::string Read(const std::byte* bytes, std::size_t count,
                 WindowRequest* request) {
  const std::string wrong = ReadMessage(bytes, count, request);
  if (!wrong.empty()) return wrong;
  const WindowRequest& r = *request;
  if (r.kind < 0 || r.kind >= WindowRequest::kKinds) {
    return "kind=" + std::to_string(r.kind) + ", which is none";
  }
  const bool has_bytes = r.has_payload() || r.bytes == 0;
  if (!has_bytes || r.bytes % kCacheLine != 0 || r.bytes > kLongest) {
    return Field("bytes", r.bytes, "is not the length of a payload");
  }
  if (r.tag < kChunkTag || r.tag >= kChunkTag + kChunkTags) {
    return "tag=" + std::to_string(r.tag) + ", which is not that of a reply";
  }
  return CheckLength(count, r.MessageBytes());
}

std::string CheckRequest(const WindowRequest& request,
                         std::size_t payload_bytes, int record) {
  if (!request.has_payload()) return "";
  if (request.bytes != payload_bytes) {
    return Field("bytes", request.bytes,
                 "must be " + std::to_string(payload_bytes));
  }
  if (record == 0) {
    return Field("window", request.window, "has no slot for the rank");
  }
  if (request.record == record) return "";
  return "record=" + std::to_string(request.record) + ", which must be " +
         std::to_string(record);
}

std::string Read(const std::byte* bytes, std::size_t count, int tag,
                 WindowReply* reply) {
  std::string wrong = ReadMessage(bytes, count, reply);
  if (wrong.empty()) wrong = CheckLength(count, sizeof(*reply));
  if (wrong.empty()) wrong = CheckWindowState(reply->state);
  if (!wrong.empty() || reply->tag == tag) return wrong;
  return "tag=" + std::to_string(reply->tag) + ", which must be " +
         std::to_string(tag);
}

std::string CheckWindowState(std::int32_t state) {
  switch (state) {
    case WindowMemory::kOpen:
    case WindowMemory::kFreed:
    case WindowMemory::kEnded:
      return "";
    default:
      return "state=" + std::to_string(state) + ", which is none";
  }
}

int ReplyTag(int number) { return kChunkTag + number; }

int RequestNumber(int reply_tag) { return reply_tag - kChunkTag; }

int ReplyPayloadTag(int reply_tag) { return reply_tag + kChunkTags; }

}  // namespace jfog::mpi
