// One operation on the device: its identity, its headers, its clock, its end.
#ifndef JFOG_XLA_OPS_NCCL_OPERATION_H_
#define JFOG_XLA_OPS_NCCL_OPERATION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "nccl/communicator.h"

namespace jfog::nccl {

// What one rank says of the operation it is in. It travels beside the payload
// to those that get some.
struct Header {
  std::uint64_t magic = 0;
  std::uint64_t sequence = 0;
  std::uint64_t signature = 0;
  std::uint64_t variant = 0;
  std::uint64_t bytes = 0;  // of the payload on this edge
  std::uint64_t check = 0;  // of all else: tells what has come in part only
  char operation[48] = {};
};
static_assert(sizeof(Header) == 96, "keeps what follows aligned");

// An edge to or from another rank, and the bytes that travel on it.
struct Edge {
  int rank;
  std::size_t bytes;
};

// What an operation is to be, on this rank and on all others.
struct OperationSpec {
  std::string name;
  std::uint64_t signature = 0;
  std::uint64_t variant = 0;
  std::string leaves;  // for texts
  // Of an exchange. A collective is one with all ranks.
  std::vector<Edge> sources = {};
  std::vector<Edge> destinations = {};
  bool is_collective = false;
};

// An operation is launched once, and from then on looked at by whoever has
// time: the next call, and the watchdog. The device does not wait for that.
class Operation : public std::enable_shared_from_this<Operation> {
 public:
  Operation(std::shared_ptr<Communicator> comm, OperationSpec spec);
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  // Posts it with its headers around on a stream. The clock of one that
  // somebody waits for runs from when the stream comes to it.
  ffi::Error Launch(CudaStream stream, bool is_awaited, const Post& post);
  // Comes after another one of the same call: its clock runs from there.
  void Follow(std::shared_ptr<Operation> other) { before_ = std::move(other); }

  // Says that somebody waits: once an event has passed, or in any case from now
  // on.
  void Await(std::shared_ptr<Event> reached);
  void Await();
  // Whether the device is through with it, well or not.
  bool HasEnded() const { return ended_ != nullptr && ended_->HasPassed(); }
  const std::shared_ptr<Event>& ended() const { return ended_; }

  // Ends it or fails the communicator, where there is reason to; whether it is
  // over. By one thread at a time.
  bool Poll(Clock::time_point now);
  // Looks at the headers that have come while it is under way.
  void Peek();
  // Warns of a long wait, and fails a longer one.
  ffi::Error CheckPatience(Clock::duration waited);

  // Spoils the communicator.
  ffi::Error Fail(ffi::ErrorCode code, const std::string& text);
  // The same where no call is there to answer.
  void Report(ffi::ErrorCode code, const std::string& text);
  // Turns a code of the driver into a failure.
  ffi::Error Check(int code, const char* function);

  // "neighbor_allreduce #41 on rank 0"
  std::string Title() const;
  // "ranks 1, 2"
  std::string Peers() const { return RankList(peers_); }
  Communicator& comm() const { return *comm_; }

 private:
  ffi::Error Post(CudaStream stream, const nccl::Post& post);
  ffi::Error Stage(CudaStream stream);
  void PostHeaders(Group& group) const;
  // What the headers that came say against; of those that came where `partly`.
  std::optional<std::string> FindMismatch(const Header* headers, bool partly);
  std::optional<std::string> FindMismatchOfAll(const Header& header,
                                               bool partly);
  void Release();

  const std::shared_ptr<Communicator> comm_;
  const OperationSpec spec_;
  std::vector<int> peers_;  // ascending
  std::uint64_t sequence_ = 0;

  // Headers: on the device those that go out, and those that come in; on the
  // host both, then twice what came, at the end and in between.
  std::size_t outgoing_ = 0;
  std::size_t incoming_ = 0;
  Buffer device_headers_;
  Buffer host_headers_;

  std::shared_ptr<Event> staged_;
  std::shared_ptr<Event> ended_;
  std::shared_ptr<Event> peeked_;
  std::shared_ptr<Operation> before_;
  Clock::duration next_peek_;
  std::optional<Clock::time_point> reached_at_;
  bool warned_ = false;

  std::mutex mutex_;  // guards all below
  std::shared_ptr<Event> reached_;
  bool is_awaited_ = false;
};

}  // namespace jfog::nccl

#endif  // JFOG_XLA_OPS_NCCL_OPERATION_H_
