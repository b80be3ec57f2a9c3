// Messages beside payloads: their layout, and checks of what other ranks send.
#ifndef JFOG_XLA_OPS_MPI_MESSAGES_H_
#define JFOG_XLA_OPS_MPI_MESSAGES_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "common/hash.h"
#include "common/operation_header.h"

namespace jfog::mpi {

using Header = OperationHeader;

// Fields of a received message are checked once, where it is read. A check
// returns what is wrong, as "kind=9, which is none", or "" if nothing is.

// A hash of all words of a message but the last, which holds it. It finds
// damage and not malice: the fields are checked as well.
template <typename Message>
std::uint64_t CheckOf(const Message& message) {
  static_assert(sizeof(Message) % sizeof(std::uint64_t) == 0);
  constexpr std::size_t kWords = sizeof(Message) / sizeof(std::uint64_t);
  std::uint64_t words[kWords];
  std::memcpy(words, &message, sizeof(message));
  std::uint64_t hash = kWords;
  for (std::size_t i = 0; i + 1 < kWords; ++i) hash = Mix(hash, words[i]);
  return hash;
}

template <typename Message>
Message WithCheck(Message message) {
  message.check = CheckOf(message);
  return message;
}

// Copies a message of `count` bytes, and compares its length and its check.
template <typename Message>
std::string ReadMessage(const std::byte* bytes, std::size_t count,
                        Message* message) {
  if (count < sizeof(Message)) {
    return "length=" + std::to_string(count) + ", which is less than " +
           std::to_string(sizeof(Message));
  }
  std::memcpy(message, bytes, sizeof(Message));
  if (message->check == CheckOf(*message)) return "";
  return "check=" + std::to_string(message->check) +
         ", which does not fit the other fields";
}

// A short message outside the ordered chain.
struct ControlMessage {
  enum Kind : std::int32_t {
    kArrival,  // the position of a waiting rank
    kLeave,    // the rank has ended its work
    kQuery,    // whether the reader names the writer as a peer, too
    kYes,
    kNo,
    kNoPeers,    // the writer runs another operation
    kFailed,     // the operation does not match that of `rank`
    kMalformed,  // the writer got a malformed message from `rank` in it
    kNoMemory,   // the writer has failed in it, mostly for lack of memory
    kAsk,        // for the header of the writer's operation of this number
    kPosted,     // that header
    kDoYouWait,  // whether the reader waits in an operation
    kWaits,      // the writer does
    kStuck,      // `rank` is stuck and to be ended
    kKinds
  };
  Header header;
  Kind kind = kArrival;
  std::int32_t rank = 0;
  // Whether the writer sends to and receives from the reader.
  std::int32_t sends = 0;
  std::int32_t receives = 0;
  std::uint64_t check = 0;
};

// Reads one of `count` bytes on a communicator of `size` ranks.
std::string Read(const std::byte* bytes, std::size_t count, int size,
                 ControlMessage* message);

// A claimed shared-memory channel, behind a header.
struct ClaimMessage {
  std::uint64_t stamp = 0;  // 0: no channel
  std::int64_t channel = 0;
  std::uint64_t check = 0;
};

// Reads one of `count` bytes, of a sender that has so many channels.
std::string Read(const std::byte* bytes, std::size_t count, int channels,
                 ClaimMessage* message);

// A header with a claim has another check, which covers the claim. A header
// without one has the check of its operation, which is `base`.
inline std::uint64_t CheckWithClaim(std::uint64_t base, const Header& header) {
  return Mix(Mix(base, header.stamp),
             static_cast<std::uint64_t>(header.channel));
}

std::string CheckChannel(std::int64_t channel, int channels);
std::string CheckLength(std::size_t count, std::size_t expected);

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_MESSAGES_H_
