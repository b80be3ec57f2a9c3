// Puts, accumulates and gets: operations on windows of other ranks.
#include "mpi/windows/transfer.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

namespace jfog::mpi {

WindowTransfer::WindowTransfer(std::shared_ptr<Window> window, const char* name,
                               WindowRequest::Kind kind, Payload result,
                               Payload value, std::vector<int> peers,
                               std::vector<double> weights)
    : Operation(window->comm(), name, window->NextOperation()),
      window_(std::move(window)),
      kind_(kind),
      value_(std::move(value)),
      peers_(std::move(peers)),
      weights_(std::move(weights)) {
  mutable_leaves() = std::move(result);
  comm().CountOperation();
  window_->BeginOperation();
}

ffi::Error WindowTransfer::Post() {
  comm().LookForGone();
  JFOG_RETURN_IF_ERROR(comm().Refusal());
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    if (comm().IsGone(peers_[i])) {
      JFOG_RETURN_IF_ERROR(LeaveOut(peers_[i]));
      continue;
    }
    if (!window_->part(peers_[i])) {
      RemoteTransfer& remote = remote_transfers_.emplace_back();
      remote.peer = i;
      continue;
    }
    // An error at one peer, which may have freed the window, does not keep the
    // transfers to the others from completing.
    const std::int64_t since = trace().Now();
    ffi::Error error = TransferShared(i);
    if (error.success()) RecordTransfer(since, peers_[i]);
    if (error.failure() && comm().IsGone(peers_[i])) {
      JFOG_RETURN_IF_ERROR(LeaveOut(peers_[i]));
      continue;
    }
    if (outcome_.success()) outcome_ = std::move(error);
  }
  if (remote_transfers_.empty()) return ffi::Error::Success();
  // MPI sends from buffers of this operation: the operands are XLA's, and may
  // be reused before a send completes that fails or is abandoned.
  if (has_payload() && value_.payload_bytes > WindowRequest::kShort) {
    value_.Stage();
  }
  messages_ = kPayload + (has_payload() ? Pieces(value_.payload_bytes) : 0);
  Resize(remote_transfers_.size() * messages_);
  for (std::size_t i = 0; i < remote_transfers_.size(); ++i) {
    JFOG_RETURN_IF_ERROR(SendRequest(i));
  }
  return ffi::Error::Success();
}

ffi::Error WindowTransfer::TransferShared(std::size_t peer) {
  const int rank = peers_[peer];
  const WindowMemory& there = window_->part(rank);
  const std::size_t bytes = window_->layout().bytes;
  const auto title = [this] { return Title(); };
  if (kind_ == WindowRequest::kGet) {
    // This rank's slot stays locked while it waits for record 0 of the peer. A
    // holder of a record 0 waits for no other lock, so they cannot deadlock.
    JFOG_RETURN_IF_ERROR(CheckState(rank, there.state()));
    TicketLock& lock = there.record(0).lock;
    WindowMemory::Record& slot = window_->own().record(window_->RecordOf(rank));
    JFOG_RETURN_IF_ERROR(window_->Acquire(slot.lock, comm().rank(), title));
    ffi::Error error = window_->Acquire(lock, rank, title);
    if (error.success()) {
      WriteScaled(window_->PayloadAt(there.payload(0)), weights_[peer],
                  window_->own().payload(window_->RecordOf(rank)));
      slot.version.fetch_add(1, std::memory_order_relaxed);
      lock.Release();
      comm().CountReceived(rank, bytes);
    }
    slot.lock.Release();
    return error;
  }
  const int record = window_->RecordAt(rank);
  TicketLock& lock = there.record(record).lock;
  JFOG_RETURN_IF_ERROR(window_->Acquire(lock, rank, title));
  // Under the lock, after a wait in which the peer may have freed the window.
  ffi::Error error = CheckState(rank, there.state());
  if (error.success()) {
    if (kind_ == WindowRequest::kPut) {
      WriteScaled(value_, weights_[peer], there.payload(record));
    } else {
      AddScaled(value_, weights_[peer], there.payload(record));
    }
    there.record(record).version.fetch_add(1, std::memory_order_relaxed);
    comm().CountSent(rank, bytes);
  }
  lock.Release();
  return error;
}

ffi::Error WindowTransfer::SendRequest(std::size_t number) {
  RemoteTransfer& remote = remote_transfers_[number];
  const int rank = peers_[remote.peer];
  WindowRequest request;
  request.window = window_->global_id();
  request.bytes = has_payload() ? value_.payload_bytes : 0;
  request.weight = weights_[remote.peer];
  request.kind = kind_;
  request.record = has_payload() ? window_->RecordAt(rank) : 0;
  remote.since = trace().Now();
  const std::optional<int> free = comm().requests().Take();
  if (!free) {
    return Fail(ffi::ErrorCode::kResourceExhausted,
                "finds too many requests to windows of other machines in "
                "flight; wait on their handles");
  }
  request.tag = remote.tag = ReplyTag(*free);
  request = WithCheck(request);
  const std::size_t bytes = request.MessageBytes();
  const bool is_short = bytes > sizeof(request);
  remote.request = Buffer(bytes);
  std::memcpy(remote.request.get(), &request, sizeof(request));
  if (is_short) {
    value_.CopyOut(0, request.bytes,
                   remote.request.get() + WindowRequest::kPayload);
  }
  remote.reply = Buffer(sizeof(WindowReply));
  const std::size_t first = number * messages_;
  comm().duplicates().CountSent(rank);
  // The receive goes first, so that the reply finds it posted.
  JFOG_RETURN_IF_ERROR(
      Started(MPI_Irecv(remote.reply.get(), sizeof(WindowReply), MPI_BYTE, rank,
                        remote.tag, comm().control_comm(),
                        Slot(first + kReply, kAnyLength)),
              "in MPI_Irecv", first + kReply));
  JFOG_RETURN_IF_ERROR(Started(
      MPI_Isend(remote.request.get(), static_cast<int>(bytes), MPI_BYTE, rank,
                kRequestTag, comm().control_comm(), Slot(first + kRequest)),
      "in MPI_Isend", first + kRequest));
  if (!has_payload() || remote.answered) return ffi::Error::Success();
  comm().CountSent(rank, value_.bytes);
  if (is_short) return ffi::Error::Success();
  std::size_t slot = first + kPayload;
  for (std::size_t at = 0; at < request.bytes;
       at += PieceBytes(request.bytes)) {
    const std::size_t piece =
        std::min(PieceBytes(request.bytes), request.bytes - at);
    comm().duplicates().CountSent(rank);
    JFOG_RETURN_IF_ERROR(Started(
        MPI_Isend(value_.staging.get() + at,
                  static_cast<int>(piece / kLineBytes), Line(), rank,
                  kRequestPayloadTag, comm().control_comm(), Slot(slot)),
        "in MPI_Isend", slot));
    ++slot;
  }
  return ffi::Error::Success();
}

ffi::Error WindowTransfer::Completed(std::size_t slot) {
  RemoteTransfer& remote = remote_transfers_[slot / messages_];
  const int rank = peers_[remote.peer];
  switch (slot % messages_) {
    case kReply: {
      WindowReply reply;
      JFOG_RETURN_IF_ERROR(CheckMessage(
          rank, Read(remote.reply.get(), length(slot), remote.tag, &reply)));
      const auto state = static_cast<WindowMemory::State>(reply.state);
      ffi::Error error = CheckState(rank, state);
      if (error.success() && kind_ == WindowRequest::kGet) {
        // The value follows a reply of success only, so its receive, into a
        // buffer of the payload's length, is not posted before.
        const std::size_t bytes = window_->layout().payload_bytes;
        remote.value = Buffer(bytes);
        const std::size_t value = slot - kReply + kValue;
        return Started(
            MPI_Irecv(remote.value.get(), static_cast<int>(bytes / kLineBytes),
                      Line(), rank, ReplyPayloadTag(remote.tag),
                      comm().control_comm(), Slot(value, bytes)),
            "in MPI_Irecv", value);
      }
      Answered(remote);
      if (error.failure() && comm().IsGone(rank)) return LeaveOut(rank);
      if (error.success()) RecordTransfer(remote.since, rank);
      if (outcome_.success()) outcome_ = std::move(error);
      return ffi::Error::Success();
    }
    case kValue:
      Answered(remote);
      RecordTransfer(remote.since, rank);
      return WriteSlot(rank, weights_[remote.peer], remote.value.get());
    default:
      return ffi::Error::Success();
  }
}

// In the timeline, without requests for a mutex.
void WindowTransfer::RecordTransfer(std::int64_t since, int rank) {
  if (!has_payload() && kind_ != WindowRequest::kGet) return;
  trace().RecordSince(since,
                      has_payload() ? TimelineEvent::kPut : TimelineEvent::kGot,
                      comm().RankInRoot(rank), window_->layout().bytes);
}

void WindowTransfer::Answered(RemoteTransfer& remote) {
  remote.answered = true;
  comm().requests().GiveBack(RequestNumber(remote.tag));
}

ffi::Error WindowTransfer::WriteSlot(int rank, double weight,
                                     const std::byte* value) {
  const int record = window_->RecordOf(rank);
  WindowMemory::Record& slot = window_->own().record(record);
  JFOG_RETURN_IF_ERROR(
      window_->Acquire(slot.lock, comm().rank(), [this] { return Title(); }));
  WriteScaled(window_->PayloadAt(value), weight,
              window_->own().payload(record));
  slot.version.fetch_add(1, std::memory_order_relaxed);
  slot.lock.Release();
  comm().CountReceived(rank, window_->layout().bytes);
  return ffi::Error::Success();
}

ffi::Error WindowTransfer::CheckState(int rank, WindowMemory::State state) {
  switch (state) {
    case WindowMemory::kFreed:
      return MakeError(ffi::ErrorCode::kFailedPrecondition,
                       Title() + " accesses the window of rank " +
                           std::to_string(rank) +
                           ", which has freed the window; call jfog.barrier "
                           "before jfog.win_free");
    case WindowMemory::kEnded:
      if (comm().is_fault_tolerant()) {
        // It has ended its program, or has called jfog.recover.
        comm().FindGone();
        JFOG_RETURN_IF_ERROR(comm().Refusal());
        comm().MarkGone(rank);
      }
      return MakeError(ffi::ErrorCode::kAborted,
                       Title() + " accesses the window of rank " +
                           std::to_string(rank) +
                           ", which has already ended; all ranks call "
                           "jfog.barrier after their last step");
    default:
      return CheckMessage(rank, CheckWindowState(state));
  }
}

ffi::Error WindowTransfer::LeaveOut(int rank) {
  return window_->LeaveOut(Title(), {rank});
}

// Nothing to do: MPI ends the messages with a rank that has failed.
ffi::Error WindowTransfer::GoOnWithout(const std::vector<int>& gone) {
  if (comm().reweights()) return ffi::Error::Success();
  return window_->LeaveOut(Title(), gone);
}

ffi::Error WindowTransfer::RequestFailed(std::size_t slot) {
  RemoteTransfer& remote = remote_transfers_[slot / messages_];
  comm().FindGone();  // fails if it is a recovery that has ended the message
  JFOG_RETURN_IF_ERROR(comm().Refusal());
  if (remote.answered) return ffi::Error::Success();
  const int rank = peers_[remote.peer];
  comm().MarkGone(rank);
  Answered(remote);
  return LeaveOut(rank);
}

ffi::Error WindowTransfer::Drained(bool* ended) {
  *ended = true;
  if (outcome_.success() && leaves().size() > 0) {
    WriteHandle(*window_, reinterpret_cast<std::uint32_t*>(leaves()[0].output));
  }
  return outcome_;
}

std::vector<int> WindowTransfer::Missing() const {
  std::vector<int> missing;
  for (const RemoteTransfer& remote : remote_transfers_) {
    if (!remote.answered) missing.push_back(peers_[remote.peer]);
  }
  return missing;
}

void WindowTransfer::Leak() {
  for (RemoteTransfer& remote : remote_transfers_) {
    if (remote.answered) continue;
    remote.request.Leak();
    remote.reply.Leak();
    remote.value.Leak();
    value_.staging.Leak();
  }
}

ffi::Error RequestMutex(std::shared_ptr<Window> window,
                        WindowRequest::Kind kind, int rank) {
  WindowTransfer transfer(std::move(window), "win_mutex", kind, Payload(),
                          Payload(), {rank}, {1.0});
  transfer.Start();
  return transfer.Complete();
}

}  // namespace jfog::mpi
