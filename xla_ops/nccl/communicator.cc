// Communicators of this process: NCCL's, what failed, what was counted.
#include "nccl/communicator.h"

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "common/process_wide.h"

namespace jfog::nccl {
namespace {

// A call polls NCCL without a pause first, then naps between polls.
constexpr int kPolls = 1000;
constexpr std::chrono::microseconds kCommunicatorNap{50};
// Grace period for a thread inside NCCL to return before an abort.
constexpr std::chrono::seconds kInsideWithin{2};
// Grace period before ncclCommAbort, so that in-flight headers reach peers and
// they report the mismatch themselves.
constexpr std::chrono::milliseconds kGrace{200};
// Seconds that a closing rank waits for the others to close.
constexpr double kLeaveWithin = 10;

Clock::time_point After(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(seconds));
}

}  // namespace

Communicator::Communicator(std::shared_ptr<Device> device, int rank, int size,
                           double timeout, bool blocking)
    : device_(std::move(device)),
      rank_(rank),
      size_(size),
      timeout_(timeout),
      blocking_(blocking),
      traffic_(size) {}

std::shared_ptr<Communicator> Communicator::Make(
    const std::vector<UniqueId>& ids, int rank, int size, int device,
    double timeout) {
  const std::string who = "NCCL's communicator of " + std::to_string(size) +
                          " ranks on rank " + std::to_string(rank);
  std::string text;
  const std::shared_ptr<Device> opened = Device::Open(device, &text);
  if (opened == nullptr) {
    throw std::runtime_error("jfog: INTERNAL: " + who + " " + text);
  }
  const bool blocking = ids.size() > 1;
  std::shared_ptr<Communicator> comm(
      new Communicator(opened, rank, size, timeout, blocking));
  const ContextGuard guard(opened->context());
  const Clock::time_point begin = Clock::now();
  const Clock::time_point limit = After(timeout);
  const KeepsWaiting keeps_waiting = [limit] { return Clock::now() < limit; };
  Result code;
  {
    Config config;
    config.blocking = 0;
    if (blocking) config.min_ctas = config.max_ctas = 1;
    std::lock_guard<std::timed_mutex> lock(comm->handle_);
    code = Nccl().comm_init_rank_config(&comm->non_blocking(), size, ids[0],
                                        rank, &config);
    if (code != kSuccess && code != kInProgress) {
      text = Explain(comm->non_blocking(), code);
    }
  }
  if (code == kSuccess || code == kInProgress) {
    code = comm->AwaitReady(keeps_waiting, &text);
  }
  if (code == kSuccess && blocking) {
    // All ranks are at this point, so this does not wait for long.
    const auto made = comm->RunOnThread(
        [self = comm.get(), id = ids[1], rank, size](NcclCall& called) {
          Config config;
          config.blocking = 1;
          called.code = Nccl().comm_init_rank_config(&self->comm_, size, id,
                                                     rank, &config);
          if (called.code != kSuccess) {
            called.text = Explain(nullptr, called.code);
          }
        },
        keeps_waiting);
    code = made->ended ? made->code : kInProgress;
    if (made->ended) text = made->text;
  }
  if (code == kSuccess) {
    Watchdog::Get().Watch(comm);
    return comm;
  }
  comm->Abort();
  comm->AwaitAbort(After(kLeaveWithin));
  if (code == kInProgress) {
    throw std::runtime_error(
        "jfog: DEADLINE_EXCEEDED: " + who + " waited " +
        Format(Clock::now() - begin) +
        " for the other ranks; is one dead or slow? (the limit is "
        "jfog.init(timeout=...))");
  }
  throw std::runtime_error("jfog: INTERNAL: " + who +
                           " failed in ncclCommInitRankConfig: " + text);
}

Communicator::~Communicator() {
  const ContextGuard guard(device_->context());
  for (CudaStream stream : {second_, rendezvous_stream_}) {
    if (stream != nullptr) Cuda().stream_destroy(stream);
  }
}

std::vector<int> Communicator::Others() const {
  std::vector<int> ranks;
  for (int rank = 0; rank < size_; ++rank) {
    if (rank != rank_) ranks.push_back(rank);
  }
  return ranks;
}

int Communicator::SecondStream(CudaStream* stream) {
  std::lock_guard<std::mutex> lock(order_);
  if (second_ == nullptr) {
    const int code = Cuda().stream_create(&second_, kStreamNonBlocking);
    if (code != kCudaSuccess) return code;
  }
  *stream = second_;
  return kCudaSuccess;
}

bool Communicator::Fail(ffi::ErrorCode code, const std::string& text) {
  if (!failure_.Set(code, text)) return false;
  Abort();
  return true;
}

std::string Communicator::Explain(Comm comm, Result code) {
  std::string text = Nccl().get_error_string(code);
  const char* last = comm == nullptr ? nullptr : Nccl().get_last_error(comm);
  if (last != nullptr && *last != 0) text += std::string(" (") + last + ")";
  return text;
}

Result Communicator::State(std::string* text) {
  std::lock_guard<std::timed_mutex> lock(handle_);
  const Comm comm = non_blocking();
  if (comm == nullptr) {
    *text = "it was aborted";
    return kInternalError;
  }
  Result state = kSuccess;
  const Result code = Nccl().comm_get_async_error(comm, &state);
  if (code != kSuccess) state = code;
  if (state != kSuccess && state != kInProgress) *text = Explain(comm, state);
  return state;
}

Result Communicator::AwaitReady(const KeepsWaiting& keeps_waiting,
                                std::string* text) {
  for (int polls = 0;; ++polls) {
    const Result state = State(text);
    if (state != kInProgress || !keeps_waiting()) return state;
    if (polls < kPolls) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kCommunicatorNap);
    }
  }
}

std::shared_ptr<Communicator::NcclCall> Communicator::RunOnThread(
    std::function<void(NcclCall&)> call, const KeepsWaiting& keeps_waiting) {
  auto called = std::make_shared<NcclCall>();
  // The thread owns all it uses: if NCCL does not return, it is left behind.
  std::thread([self = shared_from_this(), called, call = std::move(call)] {
    {
      const ContextGuard guard(self->device_->context());
      std::lock_guard<std::timed_mutex> lock(self->handle_);
      call(*called);
    }
    called->ended.store(true, std::memory_order_release);
  }).detach();
  while (!called->ended.load(std::memory_order_acquire) && keeps_waiting()) {
    std::this_thread::sleep_for(kCommunicatorNap);
  }
  return called;
}

void Communicator::PostGroup(Comm comm, CudaStream stream, const Post& post,
                             NcclCall& called) {
  if (comm == nullptr) {
    called.code = kInternalError;
    called.function = "ncclGroupStart";
    called.text = "it was aborted";
    return;
  }
  called.function = "ncclGroupStart";
  called.code = Nccl().group_start();
  if (called.code == kSuccess) {
    Group group(comm, stream);
    post(group);
    const Result ended = Nccl().group_end();
    called.code = group.code();
    called.function = group.function();
    if (called.code == kSuccess) {
      called.code = ended;
      called.function = "ncclGroupEnd";
    }
  }
  if (called.code != kSuccess && called.code != kInProgress && !failed()) {
    called.text = Explain(comm, called.code);
  }
}

ffi::Error Communicator::EndLaunch(InFlightOperation& operation,
                                   NcclCall& called,
                                   const KeepsWaiting& keeps_waiting) {
  // Where peers connect, a non-blocking communicator waits for them here.
  if (called.code == kInProgress) {
    called.code = AwaitReady(keeps_waiting, &called.text);
  }
  if (called.code == kSuccess) return ffi::Error::Success();
  return FailIn(operation, called.function, called.text);
}

std::set<Communicator::Connection> Communicator::NewConnections(
    const OperationSpec& spec) const {
  std::set<Connection> connections;
  const auto add = [&](const Edge& edge, bool receives) {
    const Connection connection{edge.rank, receives};
    if (connected_.count(connection) == 0) connections.insert(connection);
  };
  if (!blocking_ || spec.is_collective) return connections;
  for (const Edge& edge : spec.sources) {
    add(edge, /*receives=*/true);
  }
  for (const Edge& edge : spec.destinations) {
    add(edge, /*receives=*/false);
  }
  return connections;
}

ffi::Error Communicator::FailIn(InFlightOperation& operation,
                                const char* function, const std::string& text) {
  JFOG_RETURN_IF_ERROR(Refusal());
  return operation.Fail(ffi::ErrorCode::kAborted,
                        std::string("failed in ") + function + ": " + text +
                            "; it exchanges with " + operation.Peers());
}

ffi::Error Communicator::Rendezvous(InFlightOperation& operation,
                                    const std::set<Connection>& connections) {
  const Clock::time_point begin = Clock::now();
  const KeepsWaiting keeps_waiting = [&] {
    return operation.CheckDeadline(Clock::now() - begin).success() && !failed();
  };
  if (rendezvous_stream_ == nullptr) {
    JFOG_RETURN_IF_ERROR(operation.Check(
        Cuda().stream_create(&rendezvous_stream_, kStreamNonBlocking),
        "cuStreamCreate"));
  }
  // One outgoing byte, then one placeholder for each incoming byte.
  Buffer bytes;
  JFOG_RETURN_IF_ERROR(operation.Check(
      device_->memory().Take(1 + size_, rendezvous_stream_, &bytes),
      "cuMemAlloc"));
  JFOG_RETURN_IF_ERROR(operation.Check(
      Cuda().set_bytes(bytes.device(), 0, 1 + size_, rendezvous_stream_),
      "cuMemsetD8Async"));
  NcclCall called;
  {
    std::lock_guard<std::timed_mutex> lock(handle_);
    PostGroup(
        rendezvous_, rendezvous_stream_,
        [&](Group& group) {
          for (const Connection& connection : connections) {
            const int peer = connection.peer;
            if (connection.receives) {
              group.Receive(bytes.device() + 1 + peer, 1, peer);
            } else {
              group.Send(bytes.device(), 1, peer);
            }
          }
        },
        called);
  }
  ffi::Error error = EndLaunch(operation, called, keeps_waiting);
  const std::shared_ptr<Event> passed = device_->MakeEvent();
  if (error.success()) {
    error =
        operation.Check(passed->Record(rendezvous_stream_), "cuEventRecord");
  }
  while (error.success() && !passed->HasPassed()) {
    // The state reports a peer that dies.
    const Result state = State(&called.text);
    if (state != kSuccess && state != kInProgress) {
      error = FailIn(operation, "a rendezvous", called.text);
    } else if (!keeps_waiting()) {
      error = Refusal();
    }
    std::this_thread::yield();
  }
  // Otherwise the kernel may still write it.
  if (error.failure()) bytes.Leak();
  return error;
}

ffi::Error Communicator::Run(InFlightOperation& operation,
                             const OperationSpec& spec, CudaStream stream,
                             const Post& post) {
  const Clock::time_point begin = Clock::now();
  const KeepsWaiting keeps_waiting = [&] {
    return operation.CheckDeadline(Clock::now() - begin).success() && !failed();
  };
  const std::set<Connection> connections = NewConnections(spec);
  if (connections.empty()) {
    NcclCall called;
    {
      std::lock_guard<std::timed_mutex> lock(handle_);
      PostGroup(comm_, stream, post, called);
    }
    return EndLaunch(operation, called, keeps_waiting);
  }
  JFOG_RETURN_IF_ERROR(Rendezvous(operation, connections));
  const std::shared_ptr<NcclCall> called =
      RunOnThread([this, stream, post](
                      NcclCall& call) { PostGroup(comm_, stream, post, call); },
                  keeps_waiting);
  JFOG_RETURN_IF_ERROR(Refusal());
  JFOG_RETURN_IF_ERROR(EndLaunch(operation, *called, keeps_waiting));
  connected_.insert(connections.begin(), connections.end());
  return ffi::Error::Success();
}

void Communicator::Enter(std::shared_ptr<InFlightOperation> operation) {
  in_flight_.Enter(std::move(operation));
  Watchdog::Get().Wake();
}

bool Communicator::PollOldest(Clock::time_point now) {
  const ContextGuard guard(device_->context());
  return in_flight_.PollOldest(now);
}

bool Communicator::PollAll(Clock::time_point now) {
  const ContextGuard guard(device_->context());
  return in_flight_.PollAll(now, [this] { CheckAsyncError(); });
}

void Communicator::CheckAsyncError() {
  if (failed()) return;
  Result state = kSuccess;
  std::string text;
  {
    std::unique_lock<std::timed_mutex> lock(handle_, std::try_to_lock);
    if (!lock.owns_lock() || comm_ == nullptr) return;
    const Result code = Nccl().comm_get_async_error(comm_, &state);
    if (code != kSuccess) state = code;
    if (state == kSuccess || state == kInProgress) return;
    text = Explain(comm_, state);
  }
  const InFlight::Operations operations = in_flight_.All();
  if (operations.empty()) return;
  // A peer that found a mismatch has ended; a header here may name the reason.
  for (const auto& operation : operations) operation->Peek();
  const std::shared_ptr<InFlightOperation>& oldest = operations.front();
  oldest->Report(
      ffi::ErrorCode::kAborted,
      "failed in NCCL: " + text + "; it exchanges with " + oldest->Peers());
}

// Aborts after a grace period, so that peers that find the same mismatch report
// it, and not the end of this rank. On a thread of its own: freeing the memory
// of one communicator can wait for the kernels of another, which the watchdog
// then has to abort as well.
void Communicator::Abort() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (abort_ != kNotAborted) return;
    abort_ = kAborting;
  }
  std::thread([self = shared_from_this()] {
    if (self->failed()) std::this_thread::sleep_for(kGrace);
    // A thread stays inside NCCL for long only if it waits for the device or
    // for peers; then only the abort releases it. Since NCCL 2.19 the abort may
    // come from another thread (NVIDIA/nccl#992).
    std::unique_lock<std::timed_mutex> inside(self->handle_, kInsideWithin);
    const Comm comms[] = {std::exchange(self->rendezvous_, nullptr),
                          std::exchange(self->comm_, nullptr)};
    if (inside.owns_lock()) inside.unlock();
    {
      const ContextGuard guard(self->device_->context());
      for (const Comm comm : comms) {
        if (comm != nullptr) Nccl().comm_abort(comm);
      }
    }
    std::lock_guard<std::mutex> lock(self->mutex_);
    self->abort_ = kAborted;
    self->aborted_.notify_all();
  }).detach();
}

void Communicator::AwaitAbort(Clock::time_point until) {
  std::unique_lock<std::mutex> lock(mutex_);
  aborted_.wait_until(lock, until, [this] { return abort_ != kAborting; });
}

void Communicator::Drain() {
  while (!failed() && PollAll(Clock::now())) {
    for (const auto& operation : in_flight_.All()) operation->Await();
    std::this_thread::sleep_for(kCommunicatorNap);
  }
}

void Communicator::Close() {
  if (closed_.exchange(true)) return;
  const ContextGuard guard(device_->context());
  std::lock_guard<std::mutex> order(order_);
  Drain();
  if (!failed()) Finalize();
  Abort();  // nothing is left to abort if that went well
  AwaitAbort(After(std::min(timeout_, kLeaveWithin)));
}

void Communicator::Finalize() {
  const Clock::time_point limit = After(std::min(timeout_, kLeaveWithin));
  RunOnThread(
      [this, limit](NcclCall& called) {
        for (Comm* comm : {&comm_, &rendezvous_}) {
          if (*comm == nullptr) continue;
          called.code = Nccl().comm_finalize(*comm);
          while (called.code == kInProgress && Clock::now() < limit) {
            std::this_thread::sleep_for(kCommunicatorNap);
            Result state = kSuccess;
            called.code = Nccl().comm_get_async_error(*comm, &state);
            if (called.code == kSuccess) called.code = state;
          }
          if (called.code != kSuccess) return;
          Nccl().comm_destroy(std::exchange(*comm, nullptr));
        }
      },
      [limit] { return Clock::now() < limit; });
}

Registry<Communicator>& Communicators() {
  return ProcessWide<Registry<Communicator>>();
}

}  // namespace jfog::nccl
