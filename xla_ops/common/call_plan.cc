// The FFI state of a call site: its attributes, decoded when its program is
// compiled.
#include "common/call_plan.h"

#include <utility>

namespace jfog {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using Doubles = ffi::Span<const double>;

}  // namespace

ffi::Error LacksAttributes(const std::string& name) {
  return MakeError(ffi::ErrorCode::kInternal, name + " lacks attributes");
}

// The arrays concatenate all rounds; those of round t lie at
// [begin[t], begin[t + 1]).
ffi::Error ReadRounds(const ffi::Dictionary& attributes,
                      const std::string& name, bool has_weights,
                      std::vector<Round>* rounds) {
  const auto source_begin = attributes.get<Ints>("source_begin");
  const auto sources = attributes.get<Ints>("sources");
  const auto destination_begin = attributes.get<Ints>("destination_begin");
  const auto destinations = attributes.get<Ints>("destinations");
  if (!(source_begin && sources && destination_begin && destinations)) {
    return LacksAttributes(name);
  }
  const auto cut = [](const auto& begin, const auto& values, std::size_t t) {
    return std::vector(values->begin() + (*begin)[t],
                       values->begin() + (*begin)[t + 1]);
  };
  for (std::size_t t = 0; t + 1 < source_begin->size(); ++t) {
    Round round;
    round.sources = cut(source_begin, sources, t);
    round.destinations = cut(destination_begin, destinations, t);
    rounds->push_back(std::move(round));
  }
  if (!has_weights) return ffi::Error::Success();
  const auto source_weights = attributes.get<Doubles>("source_weights");
  const auto self_weights = attributes.get<Doubles>("self_weights");
  const auto difference = attributes.get<Ints>("difference");
  if (!(source_weights && self_weights && difference)) {
    return LacksAttributes(name);
  }
  for (std::size_t t = 0; t < rounds->size(); ++t) {
    Round& round = (*rounds)[t];
    round.source_weights = cut(source_begin, source_weights, t);
    round.self_weight = (*self_weights)[t];
    round.difference = (*difference)[t] != 0;
  }
  return ffi::Error::Success();
}

ffi::ErrorOr<const Round*> FindRound(const std::vector<Round>& rounds,
                                     std::int64_t step) {
  if (step < 0 || step >= static_cast<std::int64_t>(rounds.size())) {
    return ffi::Unexpected(MakeError(ffi::ErrorCode::kInternal,
                                     "step " + std::to_string(step) +
                                         " of a period of " +
                                         std::to_string(rounds.size())));
  }
  return &rounds[step];
}

}  // namespace jfog
