// Sockets between the ranks of a communicator, and messages that move at once.
#include "mesh.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

namespace jfog::emulation {
namespace {

constexpr std::uint32_t kMagic = 0x6a666f67;
constexpr int kTurn = 5;  // milliseconds between looks at `stop`

struct Hello {
  int rank;
  int size;
  int channel;
};

// The address of a rank: abstract, so that no file is left behind.
socklen_t Address(const std::string& name, int rank, sockaddr_un* address) {
  const std::string text =
      "jfog-emulation-" + name + "-" + std::to_string(rank);
  *address = {};
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path + 1, text.data(), text.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                text.size());
}

std::string Failure(const char* what) {
  return std::string(what) + ": " + std::strerror(errno);
}

int NewSocket() {
  return socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

bool EndsWithGarbage() {
  const char* const mode = std::getenv("JFOG_EMULATION_MISMATCH");
  return mode && std::strcmp(mode, "garbage") == 0;
}

}  // namespace

Mesh::Mesh(std::string name, int rank, int size)
    : name_(std::move(name)),
      rank_(rank),
      size_(size),
      links_(static_cast<std::size_t>(size * kChannels)) {}

Mesh::~Mesh() {
  for (Link& link : links_)
    if (link.socket >= 0) close(link.socket);
}

std::string Mesh::Connect(const std::atomic<bool>& stop) {
  struct Sockets : std::vector<int> {
    ~Sockets() {
      for (const int socket : *this) close(socket);
    }
  } accepted;
  Sockets listening;
  sockaddr_un address;
  int missing = (size_ - 1) * kChannels;
  if (missing) {
    const int listener = NewSocket();
    if (listener < 0) return Failure("socket");
    listening.push_back(listener);
    const socklen_t length = Address(name_, rank_, &address);
    if (bind(listener, reinterpret_cast<sockaddr*>(&address), length))
      return Failure("bind (is this rank there twice?)");
    if (listen(listener, size_ * kChannels)) return Failure("listen");
  }
  while (missing && !stop) {
    // To lower ranks it connects, from higher ones it accepts.
    for (int peer = 0; peer < rank_; ++peer) {
      for (int channel = 0; channel < kChannels; ++channel) {
        Link& link = At(peer, channel);
        if (link.socket >= 0) continue;
        const int one = NewSocket();
        if (one < 0) return Failure("socket");
        const socklen_t length = Address(name_, peer, &address);
        if (connect(one, reinterpret_cast<sockaddr*>(&address), length)) {
          close(one);  // not there yet
          continue;
        }
        const Hello hello{rank_, size_, channel};
        if (send(one, &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
          close(one);
          return Failure("send");
        }
        link.socket = one;
        --missing;
      }
    }
    int one;
    while ((one = accept4(listening[0], nullptr, nullptr,
                          SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
      accepted.push_back(one);
    for (std::size_t i = 0; i < accepted.size();) {
      Hello hello;
      const ssize_t bytes = recv(accepted[i], &hello, sizeof(hello), 0);
      if (bytes < 0) {
        ++i;
        continue;
      }
      if (bytes == sizeof(hello)) {
        if (hello.size != size_ || hello.rank <= rank_ || hello.rank >= size_ ||
            At(hello.rank, hello.channel).socket >= 0)
          return "rank " + std::to_string(hello.rank) + " of " +
                 std::to_string(hello.size) + " does not fit to rank " +
                 std::to_string(rank_) + " of " + std::to_string(size_);
        At(hello.rank, hello.channel).socket = accepted[i];
        --missing;
      } else {
        close(accepted[i]);
      }
      accepted.erase(accepted.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (missing) usleep(1000);
  }
  return "";
}

void Mesh::Write(Link& link) {
  while (link.next_outgoing < link.outgoing.size()) {
    Outgoing& message = link.outgoing[link.next_outgoing];
    constexpr std::size_t head = sizeof(Frame);
    const bool in_head = message.sent < head;
    const char* const from =
        in_head ? reinterpret_cast<const char*>(&message.frame) + message.sent
                : message.bytes + (message.sent - head);
    const std::size_t left =
        (in_head ? head : head + message.frame.size) - message.sent;
    if (left) {
      const ssize_t sent = send(link.socket, from, left, MSG_NOSIGNAL);
      if (sent < 0) {
        link.lost |= errno != EAGAIN && errno != EINTR;
        return;
      }
      message.sent += static_cast<std::size_t>(sent);
    }
    if (message.sent == head + message.frame.size) ++link.next_outgoing;
  }
}

void Mesh::Read(Link& link, bool garbage) {
  char unwanted[4096];
  while (link.next_incoming < link.incoming.size() && !link.stuck) {
    Incoming& message = link.incoming[link.next_incoming];
    char* to;
    std::size_t wanted;
    if (link.frame_received < sizeof(Frame)) {
      to = reinterpret_cast<char*>(&link.frame) + link.frame_received;
      wanted = sizeof(Frame) - link.frame_received;
    } else if (link.left && message.received < message.size) {
      to = message.bytes + message.received;
      wanted =
          std::min<std::uint64_t>(link.left, message.size - message.received);
    } else if (link.left && garbage) {
      to = unwanted;
      wanted = std::min<std::uint64_t>(link.left, sizeof(unwanted));
    } else {
      // All that was expected is there, or all that was sent.
      link.stuck = !garbage && (link.left || message.received < message.size);
      if (message.received == message.size || garbage) ++link.next_incoming;
      if (!link.stuck) link.frame_received = 0;
      continue;
    }
    const ssize_t bytes = recv(link.socket, to, wanted, 0);
    if (bytes <= 0) {
      link.lost |= bytes == 0 || (errno != EAGAIN && errno != EINTR);
      return;
    }
    const std::size_t received = static_cast<std::size_t>(bytes);
    if (link.frame_received < sizeof(Frame)) {
      link.frame_received += received;
      if (link.frame_received < sizeof(Frame)) continue;
      link.left = link.frame.size;
      link.stuck = link.frame.magic != kMagic ||
                   (link.frame.kind != message.kind && !garbage);
    } else {
      link.left -= received;
      if (to != unwanted) message.received += received;
    }
  }
}

bool Mesh::Move(const std::vector<Message>& sends,
                const std::vector<Message>& receives,
                const std::function<void(std::size_t)>& has_moved,
                const std::atomic<bool>& stop, std::atomic<bool>& lost) {
  for (Link& link : links_) {
    link.outgoing.clear();
    link.incoming.clear();
    link.next_outgoing = link.next_incoming = 0;
  }
  std::map<std::size_t, std::size_t> left;  // messages of an operation
  for (const Message& message : sends) {
    ++left[message.operation];
    At(message.peer, message.channel)
        .outgoing.push_back({{message.size, message.kind, kMagic},
                             message.bytes,
                             message.operation});
  }
  for (const Message& message : receives) {
    ++left[message.operation];
    At(message.peer, message.channel)
        .incoming.push_back(
            {message.bytes, message.size, message.kind, message.operation});
  }
  const auto count = [&](const auto& messages, std::size_t from,
                         std::size_t to) {
    for (; from < to; ++from)
      if (!--left[messages[from].operation])
        has_moved(messages[from].operation);
  };
  const bool garbage = EndsWithGarbage();
  std::vector<pollfd> polled;
  std::vector<Link*> links;
  while (!stop) {
    polled.clear();
    links.clear();
    bool moved_all = true;
    for (Link& link : links_) {
      const bool writes = link.next_outgoing < link.outgoing.size();
      const bool reads = link.next_incoming < link.incoming.size();
      if (!writes && !reads) continue;
      moved_all = false;
      if (link.lost) continue;
      const int events =
          (writes ? POLLOUT : 0) | (reads && !link.stuck ? POLLIN : 0);
      polled.push_back({link.socket, static_cast<short>(events), 0});
      links.push_back(&link);
    }
    if (moved_all) return true;
    poll(polled.data(), static_cast<nfds_t>(polled.size()), kTurn);
    for (std::size_t i = 0; i < links.size(); ++i) {
      Link& link = *links[i];
      if (!polled[i].revents) continue;
      const std::size_t sent = link.next_outgoing;
      const std::size_t received = link.next_incoming;
      if (link.next_outgoing < link.outgoing.size()) Write(link);
      // Also where writing has failed: what the peer sent before it closed its
      // end is still there.
      if (link.next_incoming < link.incoming.size()) {
        if (link.stuck) {
          link.lost |= (polled[i].revents & (POLLHUP | POLLERR)) != 0;
        } else {
          Read(link, garbage);
        }
      }
      count(link.outgoing, sent, link.next_outgoing);
      count(link.incoming, received, link.next_incoming);
      if (link.lost) lost = true;
    }
  }
  return false;
}

}  // namespace jfog::emulation
