// A communicator of the emulation: connecting, and the operations of its
// groups.
#ifndef JFOG_TESTS_EMULATION_COMMUNICATOR_H_
#define JFOG_TESTS_EMULATION_COMMUNICATOR_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulation.h"
#include "mesh.h"
#include "reduction.h"

namespace jfog::emulation {

using nccl::ElementType;
using nccl::kInProgress;
using nccl::ReductionKind;
using nccl::Result;

// The text of ncclGetLastError.
std::string& LastError();

Result Refuse(Result result, const char* function, const std::string& why);

// Refuses a call that production must not make, and counts a fault.
Result Wrong(Result result, const char* function, const std::string& why);

enum class Kind {
  kSend,
  kRecv,
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast
};

struct Operation {
  const char* function;
  Kind kind;
  const char* from;  // null where nothing is read
  char* to;          // null where nothing is written
  std::size_t count;
  ElementType type;
  ReductionKind reduction;
  int peer;  // or the root

  std::size_t bytes() const { return count * SizeOf(type); }
  bool collective() const { return kind > Kind::kRecv; }
  // Fields that must be equal on both sides of a collective's message.
  std::uint32_t signature() const {
    if (!collective()) return 0;
    std::uint32_t value = 17;
    for (const int part : {static_cast<int>(kind), static_cast<int>(type),
                           static_cast<int>(reduction), peer})
      value = value * 31 + static_cast<std::uint32_t>(part);
    return value;
  }
};

struct Range {
  const char* begin;
  std::size_t size;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  Communicator(std::string name, int rank, int size, bool blocking)
      : rank(rank),
        size(size),
        blocking(blocking),
        mesh_(std::move(name), rank, size) {}

  const int rank;
  const int size;
  const bool blocking;

  // Connects in the background.
  void Start();
  // The result of ncclCommGetAsyncError; a poll.
  Result Poll();
  // Whether it can be used now; else a text is left behind.
  Result Ready(const char* function);
  // Enqueues a group's operations as one piece of work, now or by a later poll.
  Result Launch(std::vector<Operation> operations,
                std::shared_ptr<Stream> stream);
  Result Finalize();
  // Waits until nothing runs any more.
  void Drain();
  void Abort();
  // Claims the communicator for a group of this thread; false if it is another
  // thread's.
  bool Claim();
  void Unclaim();

 private:
  void Run(const std::vector<Operation>& operations, std::uint64_t turn,
           std::chrono::milliseconds delay);
  void Execute(const std::vector<Operation>& operations);
  void End(const Operation& operation, const std::vector<char>& parts);
  bool CheckAll(const std::vector<Operation>& operations);
  std::vector<Range> Written(const Operation& operation) const;
  std::vector<Range> ReadBy(const Operation& operation) const;
  void Hang();

  Mesh mesh_;
  std::thread connecting_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> lost_{false};  // a peer has gone

  std::mutex mutex_;
  std::condition_variable changed_;
  Result state_ = kInProgress;
  std::string failure_;
  bool finalized_ = false;
  int polls_ = 0;
  std::function<void()> launch_;
  std::uint64_t groups_ = 0;
  std::uint64_t launched_ = 0;
  std::uint64_t finished_ = 0;
  bool running_ = false;
  std::thread::id owner_;
};

Registry<Communicator>& Communicators();

}  // namespace jfog::emulation

#endif  // JFOG_TESTS_EMULATION_COMMUNICATOR_H_
