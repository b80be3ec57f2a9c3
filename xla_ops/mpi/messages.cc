// Messages beside payloads: their layout, and checks of what other ranks send.
#include "mpi/messages.h"

namespace jfog::mpi {
namespace {

std::string OutOf(const char* field, std::int64_t value, std::int64_t end) {
  return std::string(field) + "=" + std::to_string(value) +
         ", which is not from 0 to " + std::to_string(end - 1);
}

bool IsIn(std::int64_t value, std::int64_t end) {
  return 0 <= value && value < end;
}

}  // namespace

std::string CheckChannel(std::int64_t channel, int channels) {
  return IsIn(channel, channels) ? "" : OutOf("channel", channel, channels);
}

std::string CheckLength(std::size_t count, std::size_t expected) {
  if (count == expected) return "";
  return "length=" + std::to_string(count) + ", which must be " +
         std::to_string(expected);
}

std::string Read(const std::byte* bytes, std::size_t count, int size,
                 ControlMessage* message) {
  std::string wrong = ReadMessage(bytes, count, message);
  if (wrong.empty()) wrong = CheckLength(count, sizeof(*message));
  if (!wrong.empty()) return wrong;
  const ControlMessage& m = *message;
  if (!IsIn(m.kind, ControlMessage::kKinds)) {
    return OutOf("kind", m.kind, ControlMessage::kKinds);
  }
  const bool has_header =
      m.kind == ControlMessage::kArrival || m.kind == ControlMessage::kQuery ||
      m.kind == ControlMessage::kFailed ||
      m.kind == ControlMessage::kMalformed ||
      m.kind == ControlMessage::kNoMemory || m.kind == ControlMessage::kAsk ||
      m.kind == ControlMessage::kPosted;
  if (has_header && !IsValid(m.header)) {
    return "magic=" + std::to_string(m.header.magic) +
           ", which is not that of jfog";
  }
  if (!IsIn(m.rank, size)) return OutOf("rank", m.rank, size);
  if (!IsIn(m.sends, 2)) return OutOf("sends", m.sends, 2);
  if (!IsIn(m.receives, 2)) return OutOf("receives", m.receives, 2);
  return "";
}

std::string Read(const std::byte* bytes, std::size_t count, int channels,
                 ClaimMessage* message) {
  const std::string wrong = ReadMessage(bytes, count, message);
  return wrong.empty() ? CheckChannel(message->channel, channels) : wrong;
}

}  // namespace jfog::mpi
