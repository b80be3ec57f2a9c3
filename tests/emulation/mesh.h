// Sockets between the ranks of a communicator, and messages that move at once.
#ifndef JFOG_TESTS_EMULATION_MESH_H_
#define JFOG_TESTS_EMULATION_MESH_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace jfog::emulation {

// Point-to-point messages do not block collectives, nor the other way around.
enum Channel : int { kPointToPoint = 0, kCollective = 1, kChannels = 2 };

struct Message {
  int peer;
  Channel channel;
  char* bytes;
  std::size_t size;
  std::uint32_t kind;  // the sender's and the receiver's are equal, or it hangs
  std::size_t operation;
};

class Mesh {
 public:
  Mesh(std::string name, int rank, int size);
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  // Connects to all ranks; an empty text, or what went wrong. Ends on `stop`.
  std::string Connect(const std::atomic<bool>& stop);

  // Moves all messages concurrently; those of one pair and channel match in
  // order. Tells when the last of an operation's has moved. Returns once all
  // have, or on `stop`; true if all have. A peer that has closed its end leaves
  // `lost` true, and the call waits on.
  bool Move(const std::vector<Message>& sends,
            const std::vector<Message>& receives,
            const std::function<void(std::size_t)>& has_moved,
            const std::atomic<bool>& stop, std::atomic<bool>& lost);

 private:
  struct Frame {
    std::uint64_t size;
    std::uint32_t kind;
    std::uint32_t magic;
  };
  struct Outgoing {
    Frame frame;
    const char* bytes;
    std::size_t operation;
    std::size_t sent = 0;  // of the frame and the bytes
  };
  struct Incoming {
    char* bytes;
    std::size_t size;
    std::uint32_t kind;
    std::size_t operation;
    std::size_t received = 0;
  };
  // One socket. What is half read stays here until the next call.
  struct Link {
    int socket = -1;
    bool lost = false;
    bool stuck = false;  // bytes without a receive lie before the next
    Frame frame{};
    std::size_t frame_received = 0;
    std::uint64_t left = 0;  // bytes of the frame's message
    std::size_t next_outgoing = 0;
    std::size_t next_incoming = 0;
    std::vector<Outgoing> outgoing;
    std::vector<Incoming> incoming;
  };

  Link& At(int peer, int channel) {
    return links_[static_cast<std::size_t>(peer * kChannels + channel)];
  }
  static void Write(Link& link);
  // With `garbage`, messages of unequal sizes end.
  static void Read(Link& link, bool garbage);

  const std::string name_;
  const int rank_;
  const int size_;
  std::vector<Link> links_;
};

}  // namespace jfog::emulation

#endif  // JFOG_TESTS_EMULATION_MESH_H_
