// Communicators of this process and the operations that run on them.
#include "mpi/communicator.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>

namespace jfog::mpi {
namespace {

constexpr std::uint64_t kMagic = 0x6a666f6731303031u;
constexpr std::uint64_t kLeft = std::numeric_limits<std::uint64_t>::max();
constexpr int kEnvelopeTag = 1;
constexpr int kBulkTag = 2;
constexpr int kNoteTag = 3;
// A message up to this size travels whole; of a longer one the header goes
// ahead and the receiver makes room for the rest when it has seen it. For Open
// MPI writes past the end of a buffer that is too short for what arrives (seen
// with 5.0.11), and ranks that disagree bring just that.
constexpr std::size_t kEnvelope = 32 * 1024;
// MPI counts bytes in an int; longer messages travel in pieces of this size.
constexpr std::size_t kPiece = std::size_t{1} << 30;
// A wait polls, then yields, then sleeps: small messages want the first, more
// ranks than cores the second, a long wait for a slow rank the third.
constexpr int kPolls = 64;
constexpr std::chrono::milliseconds kYieldFor{2};
constexpr std::chrono::milliseconds kStalledAfter{50};
constexpr long kNapNanoseconds = 50'000;

double Seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::string Format(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

std::string RankList(const std::vector<int>& ranks) {
  if (ranks.empty()) return "the other ranks";
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

std::string ErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    return "MPI error " + std::to_string(code);
  }
  return std::string(text, length);
}

// What MPI may still read or write after a failure, and after its communicator
// is gone, lives as long as the process.
void Bury(std::vector<std::unique_ptr<std::byte[]>> buffers) {
  static std::mutex* mutex = new std::mutex;
  static auto* graveyard =
      new std::vector<std::vector<std::unique_ptr<std::byte[]>>>;
  std::lock_guard<std::mutex> lock(*mutex);
  graveyard->push_back(std::move(buffers));
}

struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, std::shared_ptr<Communicator>> communicators;
  std::int64_t next = 0;
};

// Never destroyed: operations may still end while the process does.
Registry& TheRegistry() {
  static Registry* registry = new Registry;
  return *registry;
}

}  // namespace

Communicator::Communicator(MPI_Comm comm, double timeout,
                           std::shared_ptr<Communicator> root)
    : timeout_(timeout), root_(std::move(root)) {
  MPI_Comm_dup(comm, &comm_);
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm_, &rank_);
  MPI_Comm_size(comm_, &size_);
  MPI_Comm_dup(comm, &notes_);
  MPI_Comm_set_errhandler(notes_, MPI_ERRORS_RETURN);
  last_note_.assign(size_, 0);
  counters_.bytes_sent.assign(size_, 0);
  counters_.bytes_received.assign(size_, 0);
  counters_.messages_sent.assign(size_, 0);
  if (root_ != nullptr) {
    MPI_Group own, all;
    MPI_Comm_group(comm_, &own);
    MPI_Comm_group(root_->comm_, &all);
    std::vector<int> ranks(size_);
    for (int i = 0; i < size_; ++i) ranks[i] = i;
    root_ranks_.resize(size_);
    MPI_Group_translate_ranks(own, size_, ranks.data(), all,
                              root_ranks_.data());
    MPI_Group_free(&own);
    MPI_Group_free(&all);
  }
}

Communicator::~Communicator() {
  // MPI_Comm_free is collective in some libraries, and ranks end in their own
  // time: what is left is freed with the process.
}

ffi::Error Communicator::Refusal() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) return ffi::Error::Success();
  return MakeError(failure_->first, failure_->second);
}

void Communicator::Fail(ffi::ErrorCode code, const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) failure_.emplace(code, text);
}

bool Communicator::failed() {
  std::lock_guard<std::mutex> lock(mutex_);
  return failure_.has_value();
}

void Communicator::SendNote(int peer, std::uint64_t value) {
  std::vector<std::unique_ptr<std::byte[]>> note;
  note.push_back(std::unique_ptr<std::byte[]>(new std::byte[sizeof(value)]));
  std::memcpy(note.back().get(), &value, sizeof(value));
  MPI_Request request;
  if (MPI_Isend(note.back().get(), 1, MPI_UINT64_T, peer, kNoteTag, notes_,
                &request) == MPI_SUCCESS) {
    MPI_Request_free(&request);
  }
  Bury(std::move(note));
}

void Communicator::AnnounceArrival(std::uint64_t sequence) {
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendNote(peer, sequence + 1);
  }
}

void Communicator::AnnounceLeave() {
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendNote(peer, kLeft);
  }
}

void Communicator::ReadNotes() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (;;) {
    int found = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, kNoteTag, notes_, &found, &status) !=
            MPI_SUCCESS ||
        !found) {
      return;
    }
    std::uint64_t value = 0;
    if (MPI_Recv(&value, 1, MPI_UINT64_T, status.MPI_SOURCE, kNoteTag, notes_,
                 MPI_STATUS_IGNORE) != MPI_SUCCESS) {
      return;
    }
    std::uint64_t& last = last_note_[status.MPI_SOURCE];
    last = std::max(last, value);
  }
}

bool Communicator::HasArrived(int rank, std::uint64_t sequence) {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_note_[rank] != kLeft && last_note_[rank] > sequence;
}

bool Communicator::HasLeft(int rank) {
  if (root_ != nullptr) {
    root_->ReadNotes();
    return root_->HasLeft(root_ranks_[rank]);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return last_note_[rank] == kLeft;
}

void Communicator::CountSent(int peer, std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.bytes_sent[peer] += static_cast<std::int64_t>(bytes);
  counters_.messages_sent[peer] += 1;
}

void Communicator::CountReceived(int peer, std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.bytes_received[peer] += static_cast<std::int64_t>(bytes);
}

void Communicator::CountOperation() {
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.operations += 1;
}

Counters Communicator::counters() {
  std::lock_guard<std::mutex> lock(mutex_);
  return counters_;
}

void Communicator::ResetCounters() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::fill(counters_.bytes_sent.begin(), counters_.bytes_sent.end(), 0);
  std::fill(counters_.bytes_received.begin(), counters_.bytes_received.end(),
            0);
  std::fill(counters_.messages_sent.begin(), counters_.messages_sent.end(), 0);
  counters_.operations = 0;
}

Operation::Operation(std::shared_ptr<Communicator> comm, const char* name,
                     std::uint64_t signature, std::uint64_t variant,
                     std::string description)
    : comm_(std::move(comm)),
      name_(name),
      sequence_(comm_->NextSequence()),
      signature_(signature),
      variant_(variant),
      description_(std::move(description)) {
  comm_->CountOperation();
}

Operation::~Operation() { Release(); }

void Operation::Release() {
  const bool pending =
      std::any_of(requests_.begin(), requests_.end(),
                  [](MPI_Request r) { return r != MPI_REQUEST_NULL; });
  if (pending) {
    // MPI may still write into the receive buffers and read the others. The
    // communicator has failed, so nobody will look at them again.
    comm_->Fail(ffi::ErrorCode::kInternal,
                Title() + " was given up with messages pending");
    Bury(std::move(buffers_));
  }
  buffers_.clear();
  requests_.clear();
}

std::string Operation::Title() const {
  return std::string(name_) + " #" + std::to_string(sequence_) + " on rank " +
         std::to_string(comm_->rank());
}

Header Operation::MakeHeader(std::size_t bytes) const {
  Header header{};
  header.magic = kMagic;
  header.sequence = sequence_;
  header.signature = signature_;
  header.variant = variant_;
  header.bytes = bytes;
  std::strncpy(header.operation, name_, sizeof(header.operation) - 1);
  return header;
}

std::byte* Operation::Allocate(std::size_t bytes) {
  buffers_.push_back(std::unique_ptr<std::byte[]>(new std::byte[bytes]));
  return buffers_.back().get();
}

ffi::Error Operation::Fail(ffi::ErrorCode code, const std::string& text) {
  const std::string full = Title() + " " + text;
  comm_->Fail(code, full);
  return MakeError(code, full);
}

ffi::Error Operation::Check(int code, const char* expression) {
  if (code == MPI_SUCCESS) return ffi::Error::Success();
  return Fail(ffi::ErrorCode::kInternal,
              std::string("failed in ") + expression + ": " + ErrorText(code));
}

MPI_Request* Operation::Add(Pending pending) {
  requests_.push_back(MPI_REQUEST_NULL);
  pending_.push_back(pending);
  return &requests_.back();
}

ffi::Error Operation::PostReceive(int source, std::size_t bytes,
                                  const std::byte** buffer) {
  std::byte* envelope = Allocate(std::max(bytes, kEnvelope));
  *buffer = envelope;
  MPI_Request* request = Add({source, envelope, bytes});
  JFOG_MPI_RETURN_IF_ERROR(
      *this, MPI_Irecv(envelope, static_cast<int>(kEnvelope), MPI_BYTE, source,
                       kEnvelopeTag, comm_->comm(), request));
  return ffi::Error::Success();
}

ffi::Error Operation::ReceivePieces(int source, std::byte* buffer,
                                    std::size_t bytes) {
  for (std::size_t start = 0; start < bytes; start += kPiece) {
    const int count = static_cast<int>(std::min(kPiece, bytes - start));
    MPI_Request* request = Add({source, nullptr, 0});
    JFOG_MPI_RETURN_IF_ERROR(
        *this, MPI_Irecv(buffer + start, count, MPI_BYTE, source, kBulkTag,
                         comm_->comm(), request));
  }
  return ffi::Error::Success();
}

ffi::Error Operation::PostSend(int destination, const std::byte* buffer,
                               std::size_t bytes) {
  const std::size_t first = bytes <= kEnvelope ? bytes : sizeof(Header);
  JFOG_RETURN_IF_ERROR(SendPieces(destination, buffer, first, kEnvelopeTag));
  JFOG_RETURN_IF_ERROR(
      SendPieces(destination, buffer + first, bytes - first, kBulkTag));
  comm_->CountSent(destination, bytes - sizeof(Header));
  return ffi::Error::Success();
}

ffi::Error Operation::SendPieces(int destination, const std::byte* buffer,
                                 std::size_t bytes, int tag) {
  for (std::size_t start = 0; start < bytes; start += kPiece) {
    const int count = static_cast<int>(std::min(kPiece, bytes - start));
    MPI_Request* request = Add({destination, nullptr, 0});
    JFOG_MPI_RETURN_IF_ERROR(
        *this, MPI_Isend(buffer + start, count, MPI_BYTE, destination, tag,
                         comm_->comm(), request));
  }
  return ffi::Error::Success();
}

MPI_Request* Operation::AddCollective() { return Add({-1, nullptr, 0}); }

ffi::Error Operation::WaitAll() {
  const Clock::time_point start = Clock::now();
  std::vector<MPI_Status> statuses;
  std::vector<int> indices;
  std::size_t done = 0;
  for (int polls = 0; done < requests_.size(); ++polls) {
    statuses.resize(requests_.size());
    indices.resize(requests_.size());
    int count = 0;
    const int code =
        MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(),
                     &count, indices.data(), statuses.data());
    if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) {
      return Check(code, "MPI_Testsome");
    }
    if (count == MPI_UNDEFINED) break;
    if (count > 0) {
      for (int i = 0; i < count; ++i) {
        JFOG_RETURN_IF_ERROR(
            Completed(indices[i], statuses[i], code == MPI_ERR_IN_STATUS));
      }
      done += count;
      polls = 0;
      continue;
    }
    if (polls < kPolls) continue;
    const Clock::duration waited = Clock::now() - start;
    if (waited < kYieldFor) {
      sched_yield();
      continue;
    }
    if (waited > kStalledAfter) JFOG_RETURN_IF_ERROR(CheckStall(start));
    const timespec nap{0, kNapNanoseconds};
    nanosleep(&nap, nullptr);
  }
  requests_.clear();
  pending_.clear();
  return ffi::Error::Success();
}

ffi::Error Operation::Completed(std::size_t index, const MPI_Status& status,
                                bool failed) {
  const Pending pending = pending_[index];  // by value: posting more moves it
  if (failed && status.MPI_ERROR != MPI_SUCCESS) {
    return Fail(ffi::ErrorCode::kInternal,
                "exchanging with rank " + std::to_string(pending.peer) + ": " +
                    ErrorText(status.MPI_ERROR));
  }
  if (pending.envelope == nullptr) return ffi::Error::Success();
  Header theirs;
  std::memcpy(&theirs, pending.envelope, sizeof(theirs));
  JFOG_RETURN_IF_ERROR(CheckHeader(pending.peer, theirs));
  comm_->CountReceived(pending.peer, pending.bytes - sizeof(Header));
  if (pending.bytes <= kEnvelope) return ffi::Error::Success();
  return ReceivePieces(pending.peer, pending.envelope + sizeof(Header),
                       pending.bytes - sizeof(Header));
}

ffi::Error Operation::CheckHeader(int source, const Header& theirs) {
  const auto mismatch = [&](const std::string& what) {
    return Fail(ffi::ErrorCode::kFailedPrecondition,
                "(" + description_ + ") does not match rank " +
                    std::to_string(source) + ": " + what);
  };
  if (theirs.magic != kMagic) return mismatch("not a message of jfog");
  const std::string operation(
      theirs.operation, strnlen(theirs.operation, sizeof(theirs.operation)));
  if (operation != name_ || theirs.sequence != sequence_) {
    return mismatch("it is in " + operation + " #" +
                    std::to_string(theirs.sequence) +
                    "; all ranks must run the same operations in one order");
  }
  if (theirs.signature != signature_) {
    return mismatch("it sent other dtypes or shapes (" +
                    std::to_string(theirs.bytes) + " bytes)");
  }
  if (theirs.variant != variant_) {
    return mismatch("it uses another graph or another step");
  }
  return ffi::Error::Success();
}

std::vector<int> Operation::MissingRanks() {
  std::vector<int> missing;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL) continue;
    if (pending_[i].peer < 0) {
      for (int rank = 0; rank < comm_->size(); ++rank) {
        if (rank != comm_->rank() && !comm_->HasArrived(rank, sequence_)) {
          missing.push_back(rank);
        }
      }
    } else {
      missing.push_back(pending_[i].peer);
    }
  }
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  return missing;
}

ffi::Error Operation::CheckStall(Clock::time_point start) {
  JFOG_RETURN_IF_ERROR(comm_->Refusal());
  comm_->ReadNotes();
  // What a rank that left has sent before may still be on its way.
  const double waited = Seconds(Clock::now() - start);
  std::vector<int> left;
  for (int rank : MissingRanks()) {
    if (comm_->HasLeft(rank)) left.push_back(rank);
  }
  if (!left.empty() && waited > 1) {
    return Fail(ffi::ErrorCode::kAborted, "(" + description_ + ") waits for " +
                                              RankList(left) +
                                              ", which has already ended");
  }
  if (!announced_ && waited > 0.05 * comm_->timeout()) {
    announced_ = true;
    comm_->AnnounceArrival(sequence_);
  }
  if (!warned_ && waited > 0.1 * comm_->timeout()) {
    warned_ = true;
    std::fprintf(stderr, "jfog: %s has waited %s for %s\n", Title().c_str(),
                 Format(waited).c_str(), RankList(MissingRanks()).c_str());
    std::fflush(stderr);
  }
  if (waited > comm_->timeout()) {
    return Fail(ffi::ErrorCode::kDeadlineExceeded,
                "(" + description_ + ") waited " + Format(waited) + " for " +
                    RankList(MissingRanks()) +
                    "; is it dead, slow, or in another operation? The limit "
                    "is jfog.init(timeout=...)");
  }
  return ffi::Error::Success();
}

ffi::Error Operation::Agree() {
  // The maximum of a value and of its complement are each other's complement
  // exactly where all ranks brought the same value.
  std::uint64_t own = Mix(Mix(sequence_, signature_), variant_);
  for (const char* c = name_; *c != 0; ++c) own = Mix(own, *c);
  auto* both = reinterpret_cast<std::uint64_t*>(Allocate(sizeof(own) * 2));
  both[0] = own;
  both[1] = ~own;
  MPI_Request* request = AddCollective();
  JFOG_MPI_RETURN_IF_ERROR(
      *this, MPI_Iallreduce(MPI_IN_PLACE, both, 2, MPI_UINT64_T, MPI_MAX,
                            comm_->comm(), request));
  JFOG_RETURN_IF_ERROR(WaitAll());
  if (both[0] == ~both[1]) return ffi::Error::Success();
  // All ranks see the disagreement, so all can name the two sides of it.
  const Header mine = MakeHeader(0);
  auto* all = reinterpret_cast<Header*>(
      Allocate(sizeof(Header) * static_cast<std::size_t>(comm_->size())));
  std::byte* sent = Allocate(sizeof(Header));
  std::memcpy(sent, &mine, sizeof(mine));
  request = AddCollective();
  JFOG_MPI_RETURN_IF_ERROR(
      *this, MPI_Iallgather(sent, sizeof(Header), MPI_BYTE, all, sizeof(Header),
                            MPI_BYTE, comm_->comm(), request));
  JFOG_RETURN_IF_ERROR(WaitAll());
  for (int rank = 0; rank < comm_->size(); ++rank) {
    JFOG_RETURN_IF_ERROR(CheckHeader(rank, all[rank]));
  }
  return Fail(ffi::ErrorCode::kInternal, "disagrees for an unknown reason");
}

std::int64_t Register(std::shared_ptr<Communicator> comm) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.communicators.emplace(registry.next, std::move(comm));
  return registry.next++;
}

std::shared_ptr<Communicator> Lookup(std::int64_t context) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.communicators.find(context);
  return found == registry.communicators.end() ? nullptr : found->second;
}

void Unregister(std::int64_t context) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.communicators.erase(context);
}

void FailAll(const std::string& text) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (auto& [context, comm] : registry.communicators) {
    comm->Fail(ffi::ErrorCode::kAborted, text);
  }
}

}  // namespace jfog::mpi
