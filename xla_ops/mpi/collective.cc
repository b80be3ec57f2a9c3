// Base of collectives over all ranks: a consistency check, then MPI's
// collective.
#include "mpi/collective.h"

#include <cstring>
#include <optional>
#include <utility>

namespace jfog::mpi {

std::byte* Collective::Allocate(std::size_t bytes) {
  buffers_.emplace_back(bytes);
  return buffers_.back().get();
}

void Collective::Reserve(std::size_t requests) {
  used_ = 0;
  Resize(requests);
}

void Collective::Count(std::size_t sent, std::size_t received) {
  CountSent(comm().rank(), sent);
  CountReceived(comm().rank(), received);
}

// The ticket is taken when the operation is posted, in program order. The check
// starts when all collectives posted before have ended, because MPI requires
// the same order of collectives on all ranks.
ffi::Error Collective::Post() {
  ticket_ = comm().TakeTicket();
  stage_since_ = trace().Now();
  return StartCheck();
}

ffi::Error Collective::Resume(bool* moved) {
  *moved = stage_ == kQueued && comm().turn() == ticket_;
  return *moved ? StartCheck() : ffi::Error::Success();
}

ffi::Error Collective::StartCheck() {
  if (comm().turn() != ticket_) return ffi::Error::Success();
  stage_ = kChecking;
  trace().RecordSince(stage_since_, "queue");
  stage_since_ = trace().Now();
  // max(v) over the ranks is the minimum exactly if max(v) = ~max(~v): one
  // reduction shows whether all ranks brought the same value.
  const std::uint64_t own = Fingerprint();
  check_ = reinterpret_cast<std::uint64_t*>(Allocate(2 * sizeof(own)));
  check_[0] = own;
  check_[1] = ~own;
  Reserve(1);
  JFOG_MPI_RETURN_IF_ERROR(MPI_Iallreduce(MPI_IN_PLACE, check_, 2, MPI_UINT64_T,
                                          MPI_MAX, comm().collective_comm(),
                                          Add()));
  return ffi::Error::Success();
}

ffi::Error Collective::Drained(bool* ended) {
  switch (stage_) {
    case kChecking:
      if (check_[0] != ~check_[1]) return StartCompare();
      // The check ends when the last rank has come.
      trace().RecordSince(stage_since_, "wait");
      stage_since_ = trace().Now();
      stage_ = kMoving;
      return Begin();
    case kComparing:
      for (int rank = 0; rank < comm().size(); ++rank) {
        JFOG_RETURN_IF_ERROR(CheckHeader(rank, headers_[rank]));
      }
      return Fail(ffi::ErrorCode::kInternal, "disagrees for unknown reasons");
    default: {
      bool has_more = false;
      JFOG_RETURN_IF_ERROR(Continue(&has_more));
      if (has_more) return ffi::Error::Success();
      *ended = true;
      trace().RecordSince(stage_since_, "exchange");
      Phase phase(trace(), "copy");
      return Finish();
    }
  }
}

// Gathers the headers of all ranks. Every rank has the result of the failed
// check, so every rank takes part, and reports both sides of the mismatch.
ffi::Error Collective::StartCompare() {
  stage_ = kComparing;
  const Header& mine = header();
  std::byte* sent = Allocate(sizeof(Header));
  std::memcpy(sent, &mine, sizeof(mine));
  headers_ = reinterpret_cast<Header*>(
      Allocate(sizeof(Header) * static_cast<std::size_t>(comm().size())));
  Reserve(1);
  JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgather(sent, sizeof(Header), MPI_BYTE,
                                          headers_, sizeof(Header), MPI_BYTE,
                                          comm().collective_comm(), Add()));
  return ffi::Error::Success();
}

// MPI does not report the ranks that a collective waits for: the ranks whose
// last control message is not from this operation.
std::vector<int> Collective::Missing() const {
  std::vector<int> missing;
  for (int rank = 0; rank < comm().size(); ++rank) {
    const std::optional<Header> message = comm().LastControlMessage(rank);
    const bool is_here = HasPosted(rank) || (message && Matches(*message));
    if (rank != comm().rank() && !is_here) missing.push_back(rank);
  }
  return missing;
}

void Collective::Leak() {
  for (Buffer& buffer : buffers_) buffer.Leak();
}

// Also after a failure, so that the collectives queued behind this one start,
// and end with the communicator's error.
void Collective::Ended() { comm().EndTurn(); }

ffi::Error RecordGather::Begin() {
  std::byte* sent = Allocate(bytes_);
  std::memcpy(sent, own_, bytes_);
  gathered_ = Allocate(bytes_ * static_cast<std::size_t>(comm().size()));
  const int count = static_cast<int>(bytes_);
  Reserve(1);
  JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgather(sent, count, MPI_BYTE, gathered_,
                                          count, MPI_BYTE,
                                          comm().collective_comm(), Add()));
  return ffi::Error::Success();
}

ffi::Error RecordGather::Finish() {
  std::memcpy(all_, gathered_,
              bytes_ * static_cast<std::size_t>(comm().size()));
  return ffi::Error::Success();
}

ffi::Error CheckedBarrier(const std::shared_ptr<Communicator>& comm,
                          const char* name, Payload payload,
                          std::uint64_t variant) {
  BarrierOperation barrier(comm, name, std::move(payload), variant);
  barrier.Start();
  return barrier.Complete();
}

}  // namespace jfog::mpi
