// The weighted sum of one's own values and those of neighbors.
#ifndef JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_
#define JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "common/weighted_sum.h"
#include "mpi/exchange.h"
#include "mpi/plan.h"

namespace jfog::mpi {

// The weighted sum of one's own payload and those of the sources.
class Average : public Exchange {
 public:
  Average(std::shared_ptr<Communicator> comm, const char* name, Payload leaves,
          std::uint64_t variant, Round round, bool late = false)
      : Exchange(std::move(comm), name, std::move(leaves), variant,
                 {std::move(round.sources), std::move(round.destinations),
                  round.destination_weights.empty(), late}),
        round_(std::move(round)) {
    for (double weight : round_.source_weights) {
      terms_.push_back({nullptr, weight});
    }
  }

  // The same average again, of the operands of a later call.
  // False if they are others.
  bool Renew(ffi::RemainingArgs args, ffi::RemainingRets results) {
    if (!FindLeaves(args, results, &mutable_leaves())) return false;
    Exchange::Renew();
    return true;
  }

 private:
  void Pack(std::size_t destination, std::size_t begin, std::size_t end,
            std::byte* to) override {
    leaves().ForEachRun(begin, end,
                        [&](const Leaf& leaf, std::size_t first,
                            std::size_t count, std::size_t at) {
                          const std::size_t width = SizeOf(leaf.type);
                          const std::byte* x = leaf.input + first * width;
                          if (round_.destination_weights.empty()) {
                            std::memcpy(to + at, x, count * width);
                          } else {
                            WeightedSum(leaf.type, count, x,
                                        round_.destination_weights[destination],
                                        {}, false, to + at);
                          }
                        });
  }

  ffi::Error Consume(std::size_t begin, std::size_t end,
                     const std::vector<Part>& received) override {
    leaves().ForEachRun(begin, end,
                        [&](const Leaf& leaf, std::size_t first,
                            std::size_t count, std::size_t at) {
                          for (std::size_t k = 0; k < received.size(); ++k) {
                            terms_[k].values = received[k].bytes + at;
                          }
                          const std::size_t start = first * SizeOf(leaf.type);
                          WeightedSum(leaf.type, count, leaf.input + start,
                                      round_.self_weight, terms_,
                                      round_.difference, leaf.output + start);
                        });
    return ffi::Error::Success();
  }

  Round round_;
  std::vector<Term> terms_;
};

}  // namespace jfog::mpi

#endif  // JFOG_XLA_OPS_MPI_NEIGHBOR_AVERAGE_H_
