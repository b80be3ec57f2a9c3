// Communicators of this process: who is there, what failed, what was counted.
#include "mpi/communicator.h"

#include <cstring>
#include <limits>
#include <map>

#include "mpi/buffers.h"

namespace jfog::mpi {
namespace {

constexpr std::uint64_t kLeft = std::numeric_limits<std::uint64_t>::max();
constexpr int kNoteTag = 3;

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

MPI_Comm Duplicate(MPI_Comm comm) {
  MPI_Comm made = MPI_COMM_NULL;
  MPI_Comm_dup(comm, &made);
  MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN);
  return made;
}

}  // namespace

std::string ErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    return "MPI error " + std::to_string(code);
  }
  return std::string(text, length);
}

Communicator::Communicator(MPI_Comm parent, double timeout,
                           std::shared_ptr<Lanes> lanes,
                           std::shared_ptr<Communicator> root)
    : comm_(Duplicate(parent)),
      aside_(Duplicate(parent)),
      timeout_(timeout),
      lanes_(std::move(lanes)),
      root_(std::move(root)) {
  MPI_Comm_rank(comm_, &rank_);
  MPI_Comm_size(comm_, &size_);
  bytes_sent_ = Counts(size_);
  bytes_received_ = Counts(size_);
  messages_sent_ = Counts(size_);
  notes_.resize(size_);
  left_.resize(size_);
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
  shares_memory_ = lanes_ != nullptr;
  for (int peer = 0; peer < size_ && shares_memory_; ++peer) {
    shares_memory_ = lanes_->Reaches(RankInRoot(peer));
  }
}

std::optional<std::uint64_t> Communicator::IfNew(std::uint64_t graph) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!graphs_.insert(graph).second) return std::nullopt;
  return graphs_.size() - 1;
}

ffi::Error Communicator::Refusal() {
  if (!failed()) return ffi::Error::Success();
  std::lock_guard<std::mutex> lock(mutex_);
  return MakeError(failure_->first, failure_->second);
}

void Communicator::Fail(ffi::ErrorCode code, const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) failure_.emplace(code, text);
  failed_.store(true, std::memory_order_release);
}

void Communicator::SendNote(int peer, const Header& header) {
  Buffer note(sizeof(header));
  std::memcpy(note.get(), &header, sizeof(header));
  MPI_Request request;
  if (MPI_Isend(note.get(), sizeof(header), MPI_BYTE, peer, kNoteTag, aside_,
                &request) == MPI_SUCCESS) {
    MPI_Request_free(&request);
  }
  note.Bury();
}

void Communicator::AnnounceArrival(const Header& header) {
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) SendNote(peer, header);
  }
}

void Communicator::AnnounceLeave() {
  Header header;
  header.sequence = kLeft;
  AnnounceArrival(header);
}

void Communicator::ReadNotes() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (;;) {
    int found = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, kNoteTag, aside_, &found, &status) !=
            MPI_SUCCESS ||
        !found) {
      return;
    }
    Header note;
    if (MPI_Recv(&note, sizeof(note), MPI_BYTE, status.MPI_SOURCE, kNoteTag,
                 aside_, MPI_STATUS_IGNORE) != MPI_SUCCESS) {
      return;
    }
    if (note.sequence == kLeft) {
      left_[status.MPI_SOURCE] = true;
    } else {
      notes_[status.MPI_SOURCE] = note;
    }
  }
}

std::optional<Header> Communicator::LastNote(int rank) {
  std::lock_guard<std::mutex> lock(mutex_);
  return notes_[rank];
}

bool Communicator::HasLeft(int rank) {
  if (root_ != nullptr) {
    root_->ReadNotes();
    return root_->HasLeft(RankInRoot(rank));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return left_[rank];
}

void Communicator::CountSent(int peer, std::size_t bytes) {
  bytes_sent_[peer].fetch_add(static_cast<std::int64_t>(bytes), kRelaxed);
  messages_sent_[peer].fetch_add(1, kRelaxed);
}

void Communicator::CountReceived(int peer, std::size_t bytes) {
  bytes_received_[peer].fetch_add(static_cast<std::int64_t>(bytes), kRelaxed);
}

Counters Communicator::counters() const {
  const auto values = [](const Counts& counts) {
    return std::vector<std::int64_t>(counts.begin(), counts.end());
  };
  return {values(bytes_sent_), values(bytes_received_), values(messages_sent_),
          operations_.load(kRelaxed)};
}

void Communicator::ResetCounters() {
  for (Counts* counts : {&bytes_sent_, &bytes_received_, &messages_sent_}) {
    for (auto& count : *counts) count.store(0, kRelaxed);
  }
  operations_.store(0, kRelaxed);
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
