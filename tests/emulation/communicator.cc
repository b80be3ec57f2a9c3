// Communicators of the emulation: polls, and the execution of a group.
#include "communicator.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace jfog::emulation {

using nccl::kInvalidArgument;
using nccl::kRemoteError;
using nccl::kSuccess;
using nccl::kSystemError;

namespace {

// The number of polls that return "in progress" for each launched group.
constexpr int kPolls[] = {0, 0, 1, 0, 3};

bool Overlap(const Range& a, const Range& b) {
  return a.begin < b.begin + b.size && b.begin < a.begin + a.size;
}

}  // namespace

std::string& LastError() {
  thread_local std::string text;
  return text;
}

Result Refuse(Result result, const char* function, const std::string& why) {
  LastError() = std::string(function) + ": " + why;
  return result;
}

Result Wrong(Result result, const char* function, const std::string& why) {
  Fault(std::string(function) + ": " + why);
  return Refuse(result, function, why);
}

Registry<Communicator>& Communicators() {
  static auto& communicators = *new Registry<Communicator>;
  return communicators;
}

void Communicator::Start() {
  const bool hangs = Setting("JFOG_EMULATION_HANG_INIT", -1) == rank;
  connecting_ = std::thread([this, hangs] {
    std::string failure;
    if (hangs) {
      Hang();
    } else {
      failure = mesh_.Connect(stop_);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    state_ = failure.empty() ? kSuccess : kSystemError;
    failure_ = failure;
    changed_.notify_all();
  });
  if (!blocking) return;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return state_ != kInProgress; });
}

Result Communicator::Poll() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (lost_ && state_ == kSuccess) {
    state_ = kRemoteError;
    failure_ = "a rank has closed its connection";
  }
  if (state_ != kSuccess) {
    if (state_ != kInProgress) LastError() = failure_;
    return state_;
  }
  if (polls_) {
    if (--polls_) return kInProgress;
    if (launch_) std::exchange(launch_, nullptr)();
  }
  return finalized_ && finished_ < launched_ ? kInProgress : kSuccess;
}

Result Communicator::Ready(const char* function) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (lost_ && state_ == kSuccess) {
    state_ = kRemoteError;
    failure_ = "a rank has closed its connection";
  }
  if (state_ == kInProgress || polls_)
    return Wrong(kInvalidArgument, function,
                 "the communicator's previous call is still in progress");
  if (state_ != kSuccess) return Refuse(state_, function, failure_);
  return kSuccess;
}

bool Communicator::Claim() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (finalized_) return false;
  const std::thread::id self = std::this_thread::get_id();
  if (owner_ != std::thread::id() && owner_ != self) return false;
  owner_ = self;
  return true;
}

void Communicator::Unclaim() {
  std::lock_guard<std::mutex> lock(mutex_);
  owner_ = {};
}

Result Communicator::Launch(std::vector<Operation> operations,
                            std::shared_ptr<Stream> stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::uint64_t turn = launched_++;
  const std::chrono::milliseconds delay(Setting("JFOG_EMULATION_DELAY_MS", 0));
  auto enqueue = [self = shared_from_this(), stream = std::move(stream),
                  operations = std::move(operations), turn, delay] {
    stream->Enqueue([=] { self->Run(operations, turn, delay); });
  };
  polls_ = blocking ? 0 : kPolls[groups_++ % std::size(kPolls)];
  if (!polls_) {
    enqueue();
    return kSuccess;
  }
  launch_ = std::move(enqueue);
  return kInProgress;
}

Result Communicator::Finalize() {
  std::unique_lock<std::mutex> lock(mutex_);
  finalized_ = true;
  if (!blocking) {
    polls_ = 1;
    return kInProgress;
  }
  changed_.wait(lock, [this] { return finished_ == launched_ || stop_; });
  return kSuccess;
}

void Communicator::Drain() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return finished_ == launched_; });
    stop_ = true;
  }
  if (connecting_.joinable()) connecting_.join();
}

void Communicator::Abort() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stop_ = true;
    launch_ = nullptr;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !running_; });
  }
  if (connecting_.joinable()) connecting_.join();
}

void Communicator::Hang() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return stop_.load(); });
}

// On the stream's thread.
void Communicator::Run(const std::vector<Operation>& operations,
                       std::uint64_t turn, std::chrono::milliseconds delay) {
  bool runs;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stop_ || finished_ == turn; });
    changed_.wait_for(lock, delay, [this] { return stop_.load(); });
    runs = !stop_;
    running_ |= runs;
  }
  if (runs) {
    if (CheckAll(operations)) {
      Execute(operations);
      CheckAll(operations);
    } else {
      Hang();
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (runs) running_ = false;
  finished_ = std::max(finished_, turn + 1);
  changed_.notify_all();
}

std::vector<Range> Communicator::ReadBy(const Operation& operation) const {
  const std::size_t bytes = operation.bytes();
  if (!operation.from || !bytes) return {};
  if (operation.kind == Kind::kBroadcast && operation.peer != rank) return {};
  const bool parts = operation.kind == Kind::kReduceScatter;
  return {
      {operation.from, parts ? bytes * static_cast<std::size_t>(size) : bytes}};
}

std::vector<Range> Communicator::Written(const Operation& operation) const {
  const std::size_t bytes = operation.bytes();
  if (!operation.to || !bytes) return {};
  const bool parts = operation.kind == Kind::kAllGather;
  return {
      {operation.to, parts ? bytes * static_cast<std::size_t>(size) : bytes}};
}

bool Communicator::CheckAll(const std::vector<Operation>& operations) {
  bool right = true;
  for (const Operation& operation : operations) {
    for (const Range& range : ReadBy(operation))
      right &= CheckMemory(operation.function, range.begin, range.size,
                           Memory::kDevice);
    for (const Range& range : Written(operation))
      right &= CheckMemory(operation.function, range.begin, range.size,
                           Memory::kDevice);
  }
  // No other operation may touch the memory that one writes, but for NCCL's
  // in-place forms of one collective.
  for (std::size_t i = 0; i < operations.size(); ++i) {
    for (const Range& written : Written(operations[i])) {
      for (std::size_t j = 0; j < operations.size(); ++j) {
        const Operation& other = operations[j];
        bool meets = false;
        if (i != j)
          for (const Range& range : Written(other))
            meets |= Overlap(written, range);
        const std::size_t shift =
            other.bytes() * static_cast<std::size_t>(rank);
        const bool in_place = i == j && (other.kind == Kind::kAllGather
                                             ? other.from == other.to + shift
                                         : other.kind == Kind::kReduceScatter
                                             ? other.to == other.from + shift
                                             : other.from == other.to);
        if (!in_place)
          for (const Range& range : ReadBy(other))
            meets |= Overlap(written, range);
        if (!meets) continue;
        Fault(std::string(operations[i].function) + " writes what " +
              other.function + " of the same group uses");
        right = false;
      }
    }
  }
  return right;
}

void Communicator::Execute(const std::vector<Operation>& operations) {
  std::vector<Message> sends, receives;
  // Buffers that reductions receive into.
  std::vector<std::vector<char>> parts(operations.size());
  std::vector<const Operation*> to_self, from_self;
  for (std::size_t i = 0; i < operations.size(); ++i) {
    const Operation& operation = operations[i];
    const std::size_t bytes = operation.bytes();
    const Channel channel =
        operation.collective() ? kCollective : kPointToPoint;
    const std::uint32_t kind = operation.signature();
    const auto send = [&](int peer, const char* from) {
      sends.push_back({peer, channel, const_cast<char*>(from), bytes, kind, i});
    };
    const auto receive = [&](int peer, char* to) {
      receives.push_back({peer, channel, to, bytes, kind, i});
    };
    switch (operation.kind) {
      case Kind::kSend:
        if (operation.peer == rank) {
          to_self.push_back(&operation);
        } else {
          send(operation.peer, operation.from);
        }
        break;
      case Kind::kRecv:
        if (operation.peer == rank) {
          from_self.push_back(&operation);
        } else {
          receive(operation.peer, operation.to);
        }
        break;
      case Kind::kBroadcast:
        if (operation.peer != rank) {
          receive(operation.peer, operation.to);
          break;
        }
        for (int peer = 0; peer < size; ++peer)
          if (peer != rank) send(peer, operation.from);
        break;
      default:
        if (operation.kind != Kind::kAllGather)
          parts[i].resize(bytes * static_cast<std::size_t>(size));
        for (int peer = 0; peer < size; ++peer) {
          const std::size_t shift = bytes * static_cast<std::size_t>(peer);
          if (peer == rank) continue;
          send(peer, operation.kind == Kind::kReduceScatter
                         ? operation.from + shift
                         : operation.from);
          receive(peer, operation.kind == Kind::kAllGather
                            ? operation.to + shift
                            : parts[i].data() + shift);
        }
    }
  }
  bool matched = to_self.size() == from_self.size();
  for (std::size_t i = 0; i < std::min(to_self.size(), from_self.size()); ++i) {
    matched &= to_self[i]->bytes() == from_self[i]->bytes();
    std::memcpy(from_self[i]->to, to_self[i]->from,
                std::min(to_self[i]->bytes(), from_self[i]->bytes()));
  }
  // One operation may end while others of its group hang.
  const auto end = [&](std::size_t i) { End(operations[i], parts[i]); };
  if (size == 1)
    for (std::size_t i = 0; i < operations.size(); ++i) end(i);
  if (mesh_.Move(sends, receives, end, stop_, lost_) && !matched) Hang();
}

// Runs after all sends and receives, when in-place buffers may be written.
void Communicator::End(const Operation& operation,
                       const std::vector<char>& parts) {
  const std::size_t bytes = operation.bytes();
  const std::size_t own = bytes * static_cast<std::size_t>(rank);
  switch (operation.kind) {
    case Kind::kSend:
    case Kind::kRecv:
      return;
    case Kind::kBroadcast:
      if (operation.peer == rank)
        std::memmove(operation.to, operation.from, bytes);
      return;
    case Kind::kAllGather:
      std::memmove(operation.to + own, operation.from, bytes);
      return;
    default:
      break;
  }
  std::vector<const char*> inputs;
  for (int peer = 0; peer < size; ++peer)
    inputs.push_back(parts.data() + bytes * static_cast<std::size_t>(peer));
  inputs[static_cast<std::size_t>(rank)] =
      operation.from + (operation.kind == Kind::kReduceScatter ? own : 0);
  Reduce(operation.type, operation.reduction, operation.count, inputs,
         operation.to);
}

}  // namespace jfog::emulation
