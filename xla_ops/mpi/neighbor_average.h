// Weighted sum of a rank's own payload and those of its neighbors.
#ifndef JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_
#define JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/exchange.h"
#include "mpi/plan.h"

namespace jfog::mpi {

// y = self_weight x + sum_j source_weights[j] x_j over the sources j of a
// round. With destination weights, the senders scale: x_j is what source j
// weighted for this rank.
class NeighborAverage : public Exchange {
 public:
  NeighborAverage(std::shared_ptr<Communicator> comm, const char* name,
                  Payload payload, std::uint64_t variant, const Round& round,
                  bool is_followup = false);

  using Exchange::AllowMissing;

  // Prepares a completed average for the operands and results of another call.
  // False if their number, types or lengths differ.
  bool Renew(ffi::RemainingArgs args, ffi::RemainingRets results);

 private:
  void Pack(std::size_t destination, std::size_t begin, std::size_t end,
            std::byte* to) override;
  ffi::Error Consume(std::size_t begin, std::size_t end,
                     const std::vector<Part>& received) override;

  // The terms of a chunk, and in *own the weight of the own payload: with that
  // of each source that has failed, whose term is left out.
  std::vector<Term> TermsOf(const std::vector<Part>& received,
                            double* own) const;

  const double self_weight_;
  const std::vector<double>
      destination_weights_;  // empty: senders do not scale
  const bool difference_;
  std::vector<Term> terms_;  // of the sources
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_
