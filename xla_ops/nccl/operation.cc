// One operation on the device: its identity, its headers, its clock, its end.
#include "nccl/operation.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <set>
#include <thread>

#include "common/hash.h"

namespace jfog::nccl {
namespace {

// Time without progress before the headers of an operation are checked.
constexpr std::chrono::milliseconds kStalledAfter{50};
constexpr std::chrono::milliseconds kPeekWithin{20};
constexpr std::chrono::microseconds kOperationNap{100};

// Names by number: a collective reduces the headers of all ranks to one, which
// keeps only the number of a name.
constexpr const char* kNames[] = {
    "another operation",
    "allreduce",
    "broadcast",
    "allgather",
    "barrier",
    "neighbor_allreduce",
    "neighbor_allgather",
    "hierarchical_neighbor_allreduce",
    "finite_time_average",
    "pair_gossip",
};

std::uint64_t NumberOf(const std::string& name) {
  const auto found = std::find(std::begin(kNames), std::end(kNames), name);
  return found == std::end(kNames) ? 0 : found - std::begin(kNames);
}

// A collective reduces the maximum over all ranks of every word and of its
// complement. All ranks match exactly if both maxima are those of this rank.
struct ReducedHeader {
  enum { kIdentity, kName, kSequence, kSignature, kVariant, kCount };
  std::uint64_t words[2 * kCount];
};
static_assert(sizeof(ReducedHeader) <= sizeof(Header),
              "takes a header's place");
constexpr std::size_t kWords = 2 * ReducedHeader::kCount;

std::uint64_t HashOf(const std::string& text) { return Mix(text.size(), text); }

std::uint64_t CheckOf(Header header) {
  header.check = 0;
  std::uint64_t words[sizeof(Header) / 8];
  std::memcpy(words, &header, sizeof(header));
  std::uint64_t hash = 0;
  for (const std::uint64_t word : words) hash = Mix(hash, word);
  return hash;
}

ReducedHeader WordsOf(const std::string& name, const Header& header) {
  const std::uint64_t values[] = {
      Mix(Mix(Mix(HashOf(name), header.sequence), header.signature),
          header.variant),
      NumberOf(name), header.sequence, header.signature, header.variant};
  ReducedHeader words;
  for (std::size_t i = 0; i < ReducedHeader::kCount; ++i) {
    words.words[2 * i] = values[i];
    words.words[2 * i + 1] = ~values[i];
  }
  return words;
}

}  // namespace

Operation::Operation(std::shared_ptr<Communicator> comm, OperationSpec spec)
    : comm_(std::move(comm)),
      spec_(std::move(spec)),
      next_peek_(kStalledAfter),
      deadline_(comm_->timeout()) {
  if (spec_.is_collective) {
    peers_ = comm_->Others();
    outgoing_ = incoming_ = 1;
    return;
  }
  std::set<int> ranks;
  for (const Edge& edge : spec_.sources) ranks.insert(edge.rank);
  for (const Edge& edge : spec_.destinations) ranks.insert(edge.rank);
  peers_.assign(ranks.begin(), ranks.end());
  outgoing_ = spec_.destinations.size();
  incoming_ = spec_.sources.size();
}

std::string Operation::Title() const {
  return jfog::Title(spec_.name, sequence_, comm_->rank());
}

ffi::Error Operation::Fail(ffi::ErrorCode code, const std::string& text) {
  // With several operations in flight another one may have failed before.
  comm_->Fail(code, Title() + " " + text);
  return comm_->Refusal();
}

void Operation::Report(ffi::ErrorCode code, const std::string& text) {
  if (!comm_->Fail(code, Title() + " " + text)) return;
  std::fprintf(stderr, "jfog: %s %s\n", Title().c_str(), text.c_str());
  std::fflush(stderr);
}

ffi::Error Operation::Launch(CudaStream stream, bool is_awaited,
                             const nccl::Post& post) {
  std::lock_guard<std::mutex> order(comm_->order());
  JFOG_RETURN_IF_ERROR(CheckReady(comm_.get(), spec_.name.c_str()));
  comm_->PollOldest(Clock::now());
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  sequence_ = comm_->NextSequence();
  comm_->traffic().CountOperation();
  ended_ = comm_->device().MakeEvent();
  if (is_awaited) {
    reached_ = comm_->device().MakeEvent();
    is_awaited_ = true;
    JFOG_RETURN_IF_ERROR(Check(reached_->Record(stream), "cuEventRecord"));
  }
  ffi::Error error = Post(stream, post);
  if (error.failure()) {
    // The device may still access them.
    device_headers_.Leak();
    host_headers_.Leak();
    return error;
  }
  if (spec_.is_collective) return error;
  for (const Edge& edge : spec_.destinations) {
    comm_->traffic().CountSent(edge.rank, edge.bytes);
  }
  for (const Edge& edge : spec_.sources) {
    comm_->traffic().CountReceived(edge.rank, edge.bytes);
  }
  return error;
}

ffi::Error Operation::Post(CudaStream stream, const nccl::Post& post) {
  const bool meets = spec_.is_collective || !peers_.empty();
  if (meets) {
    JFOG_RETURN_IF_ERROR(Stage(stream));
    JFOG_RETURN_IF_ERROR(comm_->Run(*this, spec_, stream, [&](Group& group) {
      PostHeaders(group);
      post(group);
    }));
    if (incoming_ > 0) {
      JFOG_RETURN_IF_ERROR(Check(
          Cuda().copy_to_host(
              host_headers_.host() + (outgoing_ + incoming_) * sizeof(Header),
              device_headers_.device() + outgoing_ * sizeof(Header),
              incoming_ * sizeof(Header), stream),
          "cuMemcpyDtoHAsync"));
    }
  }
  JFOG_RETURN_IF_ERROR(Check(ended_->Record(stream), "cuEventRecord"));
  comm_->Enter(shared_from_this());
  return ffi::Error::Success();
}

ffi::Error Operation::Stage(CudaStream stream) {
  Device& device = comm_->device();
  const std::size_t count = outgoing_ + incoming_;
  const std::size_t bytes = count * sizeof(Header);
  JFOG_RETURN_IF_ERROR(
      Check(device.pinned().Take((count + 2 * incoming_) * sizeof(Header),
                                 stream, &host_headers_),
            "cuMemAllocHost"));
  JFOG_RETURN_IF_ERROR(Check(
      device.memory().Take(bytes, stream, &device_headers_), "cuMemAlloc"));
  // Zeroed, so that a peek can tell received headers from missing ones.
  std::memset(host_headers_.host(), 0,
              (count + 2 * incoming_) * sizeof(Header));
  Header header = MakeHeader(spec_.name, sequence_, spec_.signature,
                             spec_.variant, /*leaves=*/0);
  if (spec_.is_collective) {
    const ReducedHeader words = WordsOf(spec_.name, header);
    std::memcpy(host_headers_.host(), &words, sizeof(words));
  } else {
    for (std::size_t k = 0; k < outgoing_; ++k) {
      header.leaves = spec_.destinations[k].bytes;
      header.check = CheckOf(header);
      std::memcpy(host_headers_.host() + k * sizeof(Header), &header,
                  sizeof(header));
    }
  }
  JFOG_RETURN_IF_ERROR(
      Check(Cuda().copy_to_device(device_headers_.device(),
                                  host_headers_.host(), bytes, stream),
            "cuMemcpyHtoDAsync"));
  staged_ = device.MakeEvent();
  return Check(staged_->Record(stream), "cuEventRecord");
}

void Operation::PostHeaders(Group& group) const {
  const DevicePointer out = device_headers_.device();
  const DevicePointer in = out + outgoing_ * sizeof(Header);
  if (spec_.is_collective) {
    return group.AllReduce(out, in, kWords, kUint64, kMax);
  }
  for (std::size_t k = 0; k < outgoing_; ++k) {
    group.Send(out + k * sizeof(Header), sizeof(Header),
               spec_.destinations[k].rank);
  }
  for (std::size_t k = 0; k < incoming_; ++k) {
    group.Receive(in + k * sizeof(Header), sizeof(Header),
                  spec_.sources[k].rank);
  }
}

void Operation::Await(std::shared_ptr<Event> reached) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_awaited_) return;
  reached_ = std::move(reached);
  is_awaited_ = true;
}

void Operation::Await() {
  std::lock_guard<std::mutex> lock(mutex_);
  reached_ = nullptr;
  is_awaited_ = true;
}

bool Operation::Poll(Clock::time_point now) {
  const int code = ended_->Query();
  if (code == kCudaSuccess) {
    if (!comm_->failed() && incoming_ > 0) {
      const auto* headers = reinterpret_cast<const Header*>(
          host_headers_.host() + (outgoing_ + incoming_) * sizeof(Header));
      if (const auto mismatch = FindMismatch(headers, /*partly=*/false)) {
        Report(ffi::ErrorCode::kFailedPrecondition, *mismatch);
      }
    }
    Release();
    return true;
  }
  if (code != kCudaNotReady) {
    Report(ffi::ErrorCode::kInternal,
           "failed on the device: " + CudaErrorText(code));
    device_headers_.Leak();
    host_headers_.Leak();
    return true;
  }
  // The abort drains the device.
  if (comm_->failed()) return false;
  if (!reached_at_) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!is_awaited_) return false;
    if (reached_ != nullptr && !reached_->HasPassed()) return false;
    if (before_ != nullptr && !before_->HasEnded()) return false;
    reached_at_ = now;
    before_ = nullptr;
  }
  const Clock::duration waited = now - *reached_at_;
  const bool is_overdue = deadline_.HasExpired(waited);
  if (waited > next_peek_ || is_overdue) {
    next_peek_ = 2 * waited;
    // An earlier operation that no caller waits for may delay this one.
    for (const auto& operation : comm_->OperationsInFlight()) operation->Peek();
    if (comm_->failed()) return false;
  }
  std::shared_ptr<InFlightOperation> first = shared_from_this();
  if (is_overdue) {
    for (const auto& operation : comm_->OperationsInFlight()) {
      if (operation->HasEnded()) continue;
      first = operation;
      break;
    }
  }
  if (first->CheckDeadline(waited).failure()) {
    std::fprintf(stderr, "%s\n", comm_->Refusal().message().c_str());
    std::fflush(stderr);
  }
  return false;
}

ffi::Error Operation::CheckDeadline(Clock::duration waited) {
  if (deadline_.TakeWarning(waited)) {
    Deadline::Warn(waited, Title(), Peers());
  }
  if (!deadline_.HasExpired(waited)) return ffi::Error::Success();
  return Fail(ffi::ErrorCode::kDeadlineExceeded,
              Deadline::Expired(waited, Peers(), spec_.leaves));
}

std::optional<std::string> Operation::FindMismatch(const Header* headers,
                                                   bool partly) {
  if (spec_.is_collective) return FindMismatchOfAll(*headers, partly);
  const Header mine =
      MakeHeader(spec_.name, sequence_, spec_.signature, spec_.variant, 0);
  for (std::size_t k = 0; k < incoming_; ++k) {
    const Header& theirs = headers[k];
    const bool is_ours = IsValid(theirs) && theirs.check == CheckOf(theirs);
    if (!is_ours && partly) continue;
    const Edge& source = spec_.sources[k];
    std::string difference = "not a message of jfog";
    if (is_ours) {
      difference = Difference(mine, theirs);
      if (difference.empty() && theirs.leaves != source.bytes) {
        difference = "it sent other dtypes or shapes: " +
                     Summary::Describe(theirs.leaves);
      }
    }
    if (difference.empty()) continue;
    return "(" + spec_.leaves + ") does not match rank " +
           std::to_string(source.rank) + ": " + difference;
  }
  return std::nullopt;
}

std::optional<std::string> Operation::FindMismatchOfAll(const Header& header,
                                                        bool partly) {
  ReducedHeader all;
  std::memcpy(&all, &header, sizeof(all));
  const Header own =
      MakeHeader(spec_.name, sequence_, spec_.signature, spec_.variant, 0);
  const ReducedHeader mine = WordsOf(spec_.name, own);
  if (std::memcmp(&all, &mine, sizeof(all)) == 0) return std::nullopt;
  // A complete maximum is at least the value of this rank.
  for (std::size_t i = 0; i < kWords && partly; ++i) {
    if (all.words[i] < mine.words[i]) return std::nullopt;
  }
  // If a word differs, its maximum or its minimum comes from another rank.
  const auto others = [&](std::size_t i) {
    return all.words[2 * i] != mine.words[2 * i] ? all.words[2 * i]
                                                 : ~all.words[2 * i + 1];
  };
  const std::uint64_t name = others(ReducedHeader::kName);
  std::string difference =
      Difference(own, MakeHeader(name == NumberOf(spec_.name) ? spec_.name
                                 : name < std::size(kNames)   ? kNames[name]
                                                              : kNames[0],
                                 others(ReducedHeader::kSequence),
                                 others(ReducedHeader::kSignature),
                                 others(ReducedHeader::kVariant), 0));
  if (difference.empty()) difference = "it is in another operation";
  return "(" + spec_.leaves + ") does not match " +
         (peers_.size() == 1 ? RankList(peers_) : "another rank") + ": " +
         difference;
}

// A second stream copies beside the kernel that waits for its peers.
void Operation::Peek() {
  if (incoming_ == 0 || !host_headers_) return;
  // Before that the memory holds the headers of an earlier operation.
  if (!staged_->HasPassed()) return;
  if (peeked_ != nullptr && !peeked_->HasPassed()) return;
  Device& device = comm_->device();
  std::byte* const to =
      host_headers_.host() + (outgoing_ + 2 * incoming_) * sizeof(Header);
  if (peeked_ == nullptr) peeked_ = device.MakeEvent();
  if (Cuda().copy_to_host(
          to, device_headers_.device() + outgoing_ * sizeof(Header),
          incoming_ * sizeof(Header), device.header_stream()) != kCudaSuccess ||
      peeked_->Record(device.header_stream()) != kCudaSuccess) {
    return;
  }
  const Clock::time_point limit = Clock::now() + kPeekWithin;
  while (!peeked_->HasPassed()) {
    if (Clock::now() > limit) return;
    std::this_thread::sleep_for(kOperationNap);
  }
  if (const auto mismatch =
          FindMismatch(reinterpret_cast<const Header*>(to), /*partly=*/true)) {
    Report(ffi::ErrorCode::kFailedPrecondition, *mismatch);
  }
}

void Operation::Release() {
  device_headers_.UsedUntil(peeked_);
  host_headers_.UsedUntil(peeked_);
  device_headers_.Release();
  host_headers_.Release();
}

}  // namespace jfog::nccl
