// Consistency checks between ranks before and beside an operation.
#include "mpi/consistency_check.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mpi/buffer_pool.h"
#include "mpi/operation.h"
#include "mpi/progress_engine.h"

namespace jfog::mpi {
namespace {

// Reduces the maximum of a graph's hash and of its complement. The two maxima
// are complements of each other exactly if all ranks contribute equal hashes.
class GraphAgreement : public Operation {
 public:
  GraphAgreement(std::shared_ptr<Communicator> comm, std::uint64_t number,
                 std::uint64_t graph)
      : Operation(std::move(comm), "graph_agreement", number),
        graph_(graph),
        buffer_((3 + this->comm().size()) * sizeof(graph)) {
    Resize(1);
  }

 private:
  ffi::Error Post() override {
    numbers()[0] = graph_;
    numbers()[1] = ~graph_;
    return Started(MPI_Iallreduce(MPI_IN_PLACE, numbers(), 2, MPI_UINT64_T,
                                  MPI_MAX, comm().agreement_comm(), Slot(0)),
                   "in MPI_Iallreduce", 0);
  }

  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }

  ffi::Error Drained(bool* ended) override {
    *ended = has_given_up_ || numbers()[0] == ~numbers()[1];
    if (*ended) return ffi::Error::Success();
    if (!comparing_) {
      // All ranks see the mismatch, so all enter the gather that names a rank.
      comparing_ = true;
      *own() = graph_;
      return Started(
          MPI_Iallgather(own(), 1, MPI_UINT64_T, all(), 1, MPI_UINT64_T,
                         comm().agreement_comm(), Slot(0)),
          "in MPI_Iallgather", 0);
    }
    for (int rank = 0; rank < comm().size(); ++rank) {
      if (all()[rank] == graph_) continue;
      return Fail(ffi::ErrorCode::kFailedPrecondition,
                  "does not match rank " + std::to_string(rank) +
                      ": an operation gets another graph there; the graph "
                      "must be equal on all ranks");
    }
    return Fail(ffi::ErrorCode::kInternal, "disagrees for unknown reasons");
  }

  std::vector<int> Missing() const override {
    std::vector<int> others;
    for (int rank = 0; rank < comm().size(); ++rank) {
      if (rank != comm().rank()) others.push_back(rank);
    }
    return others;
  }
  void Leak() override { buffer_.Leak(); }
  // Averages go on without a rank that has failed, and unchecked.
  ffi::Error GoOnWithout(const std::vector<int>& gone) override {
    if (comm().reweights()) return GiveUp();
    return Operation::GoOnWithout(gone);
  }
  ffi::Error RequestFailed(std::size_t slot) override {
    if (comm().reweights()) return GiveUp();
    return Operation::RequestFailed(slot);
  }
  ffi::Error GiveUp() {
    buffer_.Leak();
    DropRequests();
    has_given_up_ = true;
    return ffi::Error::Success();
  }
  // Its number counts graphs and not operations.
  bool is_ordered() const override { return false; }

  std::uint64_t* numbers() const {
    return reinterpret_cast<std::uint64_t*>(buffer_.get());
  }

  // The buffer holds the two maxima, this rank's hash, then those of all ranks.
  std::uint64_t* own() const { return numbers() + 2; }
  std::uint64_t* all() const { return numbers() + 3; }

  std::uint64_t graph_;
  bool comparing_ = false;
  bool has_given_up_ = false;
  Buffer buffer_;
};

// Waits until all new peers have answered.
class PeerAgreement : public Operation {
 public:
  PeerAgreement(std::shared_ptr<Communicator> comm, const Operation& operation,
                Pattern pattern)
      : Operation(std::move(comm), operation), check_(std::move(pattern)) {}

 private:
  ffi::Error Post() override {
    check_.Ask(comm(), header());
    return ffi::Error::Success();
  }

  ffi::Error Resume(bool* moved) override {
    comm().ReadControlMessages();
    const std::size_t before = check_.open().size();
    if (const auto text = check_.ReadAnswers(comm(), header())) {
      return Fail(ffi::ErrorCode::kFailedPrecondition, *text);
    }
    *moved = check_.open().size() < before;
    return ffi::Error::Success();
  }

  bool is_waiting() const override { return !check_.open().empty(); }
  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }
  std::vector<int> Missing() const override { return check_.open(); }
  void Leak() override {}
  // The exchange that follows goes on without them, or fails.
  ffi::Error GoOnWithout(const std::vector<int>& gone) override {
    if (comm().reweights()) return ffi::Error::Success();
    return Operation::GoOnWithout(gone);
  }

  PeerCheck check_;
};

}  // namespace

PeerCheck::PeerCheck(Pattern pattern) : pattern_(std::move(pattern)) {}

void PeerCheck::Ask(Communicator& comm, const Header& header) {
  if (asked_) return;
  asked_ = true;
  for (int rank = 0; rank < comm.size(); ++rank) {
    if (rank == comm.rank()) continue;
    if (!pattern_.Sends(rank) && !pattern_.Receives(rank)) continue;
    comm.Ask(rank, header, pattern_);
    open_.push_back(rank);
  }
}

std::optional<std::string> PeerCheck::ReadAnswers(Communicator& comm,
                                                  const Header& header) {
  std::optional<std::string> text;
  const auto ends = [&](int rank) {
    if (comm.reweights() && comm.IsGone(rank)) return true;
    const std::optional<ControlMessage> answer =
        comm.TakeAnswer(rank, header.sequence);
    if (!answer || text) return answer.has_value();
    if (answer->kind == ControlMessage::kYes) return true;
    text = "does not match rank " + std::to_string(rank) + ": ";
    *text += answer->kind == ControlMessage::kNoPeers
                 ? "that is in another operation"
                 : Disagreement(comm.rank(), pattern_.Sends(rank),
                                pattern_.Receives(rank), rank, answer->sends,
                                answer->receives);
    comm.AnnounceFailure(header, rank);
    return true;
  };
  open_.erase(std::remove_if(open_.begin(), open_.end(), ends), open_.end());
  return text;
}

ffi::Error AgreeOnPeers(const std::shared_ptr<Communicator>& comm,
                        const Operation& operation, Pattern pattern,
                        bool check) {
  if (comm->size() == 1) return ffi::Error::Success();
  Engine::Get().Watch(comm);
  const bool asks = comm->RecordPattern(operation.sequence(), pattern, check);
  const bool is_alone = pattern.sources.empty() && pattern.destinations.empty();
  if (!asks || is_alone) return ffi::Error::Success();
  comm->CountAgreement();
  PeerAgreement agreement(comm, operation, std::move(pattern));
  agreement.Start();
  return agreement.Complete();
}

void AgreeOnGraph(const std::shared_ptr<Communicator>& comm,
                  std::uint64_t graph) {
  if (comm->size() == 1) return;
  if (comm->reweights() && comm->any_gone()) return;
  const std::optional<std::uint64_t> number = comm->IfNew(graph);
  if (!number) return;
  comm->CountAgreement();
  auto agreement = std::make_shared<GraphAgreement>(comm, *number, graph);
  agreement->Start();
  Engine::Get().Submit(std::move(agreement), nullptr);
}

}  // namespace jfog::mpi
