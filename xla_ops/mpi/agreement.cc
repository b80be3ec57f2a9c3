// Agreement between ranks on what they are about to do.
#include "mpi/agreement.h"

#include <optional>
#include <string>
#include <vector>

#include "mpi/buffers.h"
#include "mpi/engine.h"
#include "mpi/operation.h"

namespace jfog::mpi {
namespace {

// The greatest graph number and the greatest complement of one: each other's
// complement exactly where all ranks brought the same number.
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
    JFOG_MPI_RETURN_IF_ERROR(MPI_Iallreduce(MPI_IN_PLACE, numbers(), 2,
                                            MPI_UINT64_T, MPI_MAX,
                                            comm().aside(), Slot(0)));
    return ffi::Error::Success();
  }

  ffi::Error Completed(std::size_t) override { return ffi::Error::Success(); }

  ffi::Error Drained(bool* ended) override {
    *ended = numbers()[0] == ~numbers()[1];
    if (*ended) return ffi::Error::Success();
    if (!comparing_) {
      // All ranks see the disagreement, so all can name the two sides of it.
      comparing_ = true;
      *own() = graph_;
      JFOG_MPI_RETURN_IF_ERROR(MPI_Iallgather(own(), 1, MPI_UINT64_T, all(), 1,
                                              MPI_UINT64_T, comm().aside(),
                                              Slot(0)));
      return ffi::Error::Success();
    }
    for (int rank = 0; rank < comm().size(); ++rank) {
      if (all()[rank] == graph_) continue;
      return Fail(ffi::ErrorCode::kFailedPrecondition,
                  "does not match rank " + std::to_string(rank) +
                      ": neighbor_allreduce gets another graph there; the "
                      "graph must be equal on all ranks");
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
  void Bury() override { buffer_.Bury(); }

  std::uint64_t* numbers() const {
    return reinterpret_cast<std::uint64_t*>(buffer_.get());
  }

  // Behind the two numbers this rank's, then those of all.
  std::uint64_t* own() const { return numbers() + 2; }
  std::uint64_t* all() const { return numbers() + 3; }

  std::uint64_t graph_;
  bool comparing_ = false;
  Buffer buffer_;
};

}  // namespace

void AgreeOnGraph(const std::shared_ptr<Communicator>& comm,
                  std::uint64_t graph) {
  if (comm->size() == 1) return;
  const std::optional<std::uint64_t> number = comm->IfNew(graph);
  if (!number) return;
  auto agreement = std::make_shared<GraphAgreement>(comm, *number, graph);
  agreement->Start();
  Engine::Get().Submit(std::move(agreement), nullptr);
}

}  // namespace jfog::mpi
