// Weighted sum of a rank's own payload and those of its neighbors.
#include "mpi/neighbor_average.h"

#include <utility>

namespace jfog::mpi {

NeighborAverage::NeighborAverage(std::shared_ptr<Communicator> comm,
                                 const char* name, Payload payload,
                                 std::uint64_t variant, const Round& round,
                                 bool is_followup)
    : Exchange(
          std::move(comm), name, std::move(payload), variant,
          {round.sources, round.destinations,
           /*same_payload=*/round.destination_weights.empty(), is_followup}),
      self_weight_(round.self_weight),
      destination_weights_(round.destination_weights),
      difference_(round.difference) {
  for (double weight : round.source_weights) {
    terms_.push_back({nullptr, weight});
  }
}

bool NeighborAverage::Renew(ffi::RemainingArgs args,
                            ffi::RemainingRets results) {
  if (!FindLeaves(args, results, &mutable_leaves())) return false;
  Exchange::Renew();
  return true;
}

void NeighborAverage::Pack(std::size_t destination, std::size_t begin,
                           std::size_t end, std::byte* to) {
  if (destination_weights_.empty()) return leaves().CopyOut(begin, end, to);
  leaves().ForEachRun(begin, end,
                      [&](const Leaf& leaf, std::size_t first,
                          std::size_t count, std::size_t at) {
                        WeightedSum(leaf.type, count,
                                    leaf.input + first * SizeOf(leaf.type),
                                    destination_weights_[destination], {},
                                    /*difference=*/false, to + at);
                      });
}

// In difference form a term that is left out counts as the own payload by
// itself.
std::vector<Term> NeighborAverage::TermsOf(const std::vector<Part>& received,
                                           double* own) const {
  std::vector<Term> terms;
  for (std::size_t k = 0; k < received.size(); ++k) {
    if (received[k].bytes == nullptr) {
      *own += terms_[k].weight;
    } else {
      terms.push_back({received[k].bytes, terms_[k].weight});
    }
  }
  return terms;
}

ffi::Error NeighborAverage::Consume(std::size_t begin, std::size_t end,
                                    const std::vector<Part>& received) {
  if (is_missing_any()) {
    double own = self_weight_;
    const std::vector<Term> present = TermsOf(received, &own);
    leaves().ForEachRun(begin, end,
                        [&](const Leaf& leaf, std::size_t first,
                            std::size_t count, std::size_t at) {
                          std::vector<Term> terms = present;
                          for (Term& term : terms) {
                            term.values =
                                static_cast<const std::byte*>(term.values) + at;
                          }
                          const std::size_t start = first * SizeOf(leaf.type);
                          WeightedSum(leaf.type, count, leaf.input + start, own,
                                      terms, difference_, leaf.output + start);
                        });
    return ffi::Error::Success();
  }
  leaves().ForEachRun(begin, end,
                      [&](const Leaf& leaf, std::size_t first,
                          std::size_t count, std::size_t at) {
                        for (std::size_t k = 0; k < received.size(); ++k) {
                          terms_[k].values = received[k].bytes + at;
                        }
                        const std::size_t start = first * SizeOf(leaf.type);
                        WeightedSum(leaf.type, count, leaf.input + start,
                                    self_weight_, terms_, difference_,
                                    leaf.output + start);
                      });
  return ffi::Error::Success();
}

}  // namespace jfog::mpi
