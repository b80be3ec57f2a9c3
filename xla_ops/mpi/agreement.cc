// Agreement between ranks on what they are about to do.
#include "mpi/agreement.h"

#include <optional>
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
      : Operation(std::move(comm), "graph_agreement", number), graph_(graph) {
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

  ffi::Error Completed(std::size_t) override {
    if (numbers()[0] == ~numbers()[1]) return ffi::Error::Success();
    return Fail(ffi::ErrorCode::kFailedPrecondition,
                "finds that the ranks use different graphs: what "
                "neighbor_allreduce gets as graph must be equal on all ranks, "
                "and in the same order");
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

  std::uint64_t graph_;
  Buffer buffer_{2 * sizeof(std::uint64_t)};
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
