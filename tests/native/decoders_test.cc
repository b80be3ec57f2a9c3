// Decoders of messages: what is written is read again, and corrupted bytes give
// an error or fields in range, never an access out of bounds.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "mpi/messages.h"
#include "mpi/shared_memory_channel.h"
#include "mpi/windows/requests.h"
#include "mpi/wire_format.h"

namespace jfog::mpi {
namespace {

constexpr int kSize = 5;  // of the communicator
constexpr int kTag = kChunkTag + 7;

// JFOG_FUZZ_RUNS: the number of corrupted messages for each decoder.
int Runs() {
  const char* text = std::getenv("JFOG_FUZZ_RUNS");
  return text == nullptr ? 20000 : std::atoi(text);
}

template <typename Message>
std::vector<std::byte> BytesOf(const Message& message) {
  std::vector<std::byte> bytes(sizeof(message));
  std::memcpy(bytes.data(), &message, sizeof(message));
  return bytes;
}

// Changes some bytes, and with them perhaps the length, of a valid message.
std::vector<std::byte> Corrupt(std::vector<std::byte> bytes,
                               std::mt19937_64& random) {
  if (random() % 4 == 0) bytes.resize(random() % (2 * bytes.size() + 2));
  const std::size_t front = std::min<std::size_t>(bytes.size(), sizeof(Header));
  for (std::uint64_t k = random() % 4; k > 0 && front > 0; --k) {
    bytes[random() % front] = static_cast<std::byte>(random());
  }
  // An exact allocation: AddressSanitizer sees what is read behind it.
  return std::vector<std::byte>(bytes.begin(), bytes.end());
}

// A sender with the same code, and not the wire, wrote the fields.
template <typename Message>
void FixCheck(std::vector<std::byte>* bytes) {
  if (bytes->size() < sizeof(Message)) return;
  Message message;
  std::memcpy(&message, bytes->data(), sizeof(message));
  message = WithCheck(message);
  std::memcpy(bytes->data(), &message, sizeof(message));
}

// Calls `read(bytes, count, &message)` on corrupted messages, and `check` on
// those that it accepts.
template <typename Message, typename Reader, typename Checker>
void Fuzz(const Message& valid, Reader read, Checker check,
          std::size_t behind = 0) {
  std::mt19937_64 random(sizeof(Message));
  std::vector<std::byte> whole = BytesOf(WithCheck(valid));
  whole.resize(whole.size() + behind);  // with a payload
  Message message;
  REQUIRE(read(whole.data(), whole.size(), &message) == "");
  check(message);
  int accepted = 0, refused = 0;
  for (int run = 0; run < Runs(); ++run) {
    std::vector<std::byte> bytes = Corrupt(whole, random);
    const bool is_malice = random() % 2 == 0;
    if (is_malice) FixCheck<Message>(&bytes);
    const std::string wrong = read(bytes.data(), bytes.size(), &message);
    if (!wrong.empty()) {
      REQUIRE(wrong.find('=') != std::string::npos);
      ++refused;
      continue;
    }
    ++accepted;
    check(message);
    // Without the right check no changed message is accepted.
    if (!is_malice) {
      REQUIRE(BytesOf(message) ==
              std::vector<std::byte>(bytes.begin(),
                                     bytes.begin() + sizeof(Message)));
      REQUIRE(CheckOf(message) == message.check);
    }
  }
  CHECK(accepted > 0);
  CHECK(refused > 0);
}

}  // namespace

TEST_CASE("control messages have fields in range") {
  ControlMessage valid;
  valid.header = MakeHeader("neighbor_allreduce", 3, 4, 5, 6);
  valid.kind = ControlMessage::kQuery;
  valid.rank = kSize - 1;
  valid.sends = 1;
  Fuzz(
      valid,
      [](const std::byte* bytes, std::size_t count, ControlMessage* message) {
        return Read(bytes, count, kSize, message);
      },
      [](const ControlMessage& message) {
        REQUIRE(message.kind >= 0);
        REQUIRE(message.kind < ControlMessage::kKinds);
        REQUIRE(message.rank >= 0);
        REQUIRE(message.rank < kSize);
        for (char c : NameOf(message.header)) REQUIRE((c >= ' ' && c <= '~'));
      });
}

TEST_CASE("claims name a channel") {
  Fuzz(
      ClaimMessage{77, Channels::kChannels - 1},
      [](const std::byte* bytes, std::size_t count, ClaimMessage* message) {
        return Read(bytes, count, Channels::kChannels, message);
      },
      [](const ClaimMessage& message) {
        REQUIRE(message.channel >= 0);
        REQUIRE(message.channel < Channels::kChannels);
      });
}

TEST_CASE("requests to windows fit their message and the window") {
  for (const std::uint64_t bytes : {0, 64, 6400, 1 << 20}) {
    WindowRequest valid;
    valid.bytes = bytes;
    valid.record = 2;
    valid.tag = kTag;
    Fuzz(
        valid,
        [](const std::byte* from, std::size_t count, WindowRequest* request) {
          return Read(from, count, request);
        },
        [=](const WindowRequest& request) {
          REQUIRE(request.kind >= 0);
          REQUIRE(request.kind < WindowRequest::kKinds);
          REQUIRE(request.tag >= kChunkTag);
          REQUIRE(ReplyPayloadTag(request.tag) <= 32767);
          REQUIRE(request.bytes % kCacheLine == 0);
          if (CheckRequest(request, bytes, 2).empty() &&
              request.has_payload()) {
            REQUIRE(request.bytes == bytes);
            REQUIRE(request.record == 2);
          }
        },
        valid.MessageBytes() - sizeof(valid));
  }
}

TEST_CASE("requests are compared with the window") {
  WindowRequest request;
  request.bytes = 128;
  request.record = 3;
  CHECK(CheckRequest(request, 128, 3) == "");
  CHECK(CheckRequest(request, 64, 3) == "bytes=128, which must be 64");
  CHECK(CheckRequest(request, 128, 1) == "record=3, which must be 1");
  CHECK(CheckRequest(request, 128, 0) ==
        "window=0, which has no slot for the rank");
  request.kind = WindowRequest::kGet;
  CHECK(CheckRequest(request, 64, 0) == "");
}

TEST_CASE("replies have a state and the request's tag") {
  Fuzz(
      WindowReply{1, kTag},
      [](const std::byte* bytes, std::size_t count, WindowReply* reply) {
        return Read(bytes, count, kTag, reply);
      },
      [](const WindowReply& reply) {
        REQUIRE(reply.tag == kTag);
        REQUIRE(CheckWindowState(reply.state) == "");
      });
}

TEST_CASE("headers of any bytes are described") {
  std::mt19937_64 random(1);
  const Header mine = MakeHeader("neighbor_allreduce", 3, 4, 5, 6);
  for (int run = 0; run < Runs(); ++run) {
    const std::vector<std::byte> bytes = Corrupt(BytesOf(mine), random);
    Header theirs;
    if (!bytes.empty()) {
      std::memcpy(&theirs, bytes.data(),
                  std::min(bytes.size(), sizeof(theirs)));
    }
    for (char c : Difference(mine, theirs)) REQUIRE((c >= ' ' && c <= '~'));
  }
}

TEST_CASE("a header's check covers its claim") {
  Header header = MakeHeader("neighbor_allreduce", 3, 4, 5, 6);
  header.stamp = 9;
  header.channel = 1;
  const std::uint64_t check = CheckWithClaim(header.check, header);
  header.stamp = 10;
  CHECK(CheckWithClaim(header.check, header) != check);
  header.stamp = 9;
  header.channel = 0;
  CHECK(CheckWithClaim(header.check, header) != check);
}

}  // namespace jfog::mpi
