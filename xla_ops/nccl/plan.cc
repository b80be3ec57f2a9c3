// What a call site's attributes say, read once when its program is made.
#include "nccl/plan.h"

#include <string_view>
#include <utility>

namespace jfog::nccl {
namespace {

using Ints = ffi::Span<const std::int32_t>;
using Longs = ffi::Span<const std::int64_t>;
using MadePlan = ffi::ErrorOr<std::unique_ptr<Plan>>;

// An attribute, or what it is where there is none.
std::int64_t Read(const ffi::Dictionary& attributes, const char* name,
                  std::int64_t otherwise) {
  if (!attributes.contains(name)) return otherwise;
  const auto value = attributes.get<std::int64_t>(name);
  return value ? *value : otherwise;
}

// Empty where there is none, or where it is [-1].
std::vector<std::int64_t> ReadLongs(const ffi::Dictionary& attributes,
                                    const char* name) {
  if (!attributes.contains(name)) return {};
  const auto values = attributes.get<Longs>(name);
  if (!values || (values->size() == 1 && (*values)[0] == -1)) return {};
  return std::vector<std::int64_t>(values->begin(), values->end());
}

ffi::Error Lacks(const std::string& name) {
  return MakeError(ffi::ErrorCode::kInternal, name + " lacks attributes");
}

ffi::Error ReadCommon(const ffi::Dictionary& attributes, Plan* plan) {
  const auto operation = attributes.get<std::string_view>("operation");
  if (!operation) return Lacks("an operation");
  plan->operation = std::string(*operation);
  const auto context = attributes.get<std::int64_t>("context");
  if (!context) return Lacks(plan->operation);
  auto comm = Ready(*context, plan->operation);
  if (!comm) return comm.error();
  plan->comm = *comm;
  plan->mode = Read(attributes, "mode", kWhole);
  plan->variant = static_cast<std::uint64_t>(Read(attributes, "variant", 0));
  plan->signature =
      static_cast<std::uint64_t>(Read(attributes, "signature", 0));
  plan->received_bytes = ReadLongs(attributes, "received_bytes");
  return ffi::Error::Success();
}

// Round t's part of the table lies at [begin[t], begin[t + 1]).
ffi::Error ReadRounds(const ffi::Dictionary& attributes,
                      const std::string& name, std::vector<Round>* rounds) {
  const auto source_begin = attributes.get<Ints>("source_begin");
  const auto sources = attributes.get<Ints>("sources");
  const auto destination_begin = attributes.get<Ints>("destination_begin");
  const auto destinations = attributes.get<Ints>("destinations");
  if (!(source_begin && sources && destination_begin && destinations)) {
    return Lacks(name);
  }
  const auto cut = [](const Ints& begin, const Ints& values, std::size_t t) {
    return std::vector<int>(values.begin() + begin[t],
                            values.begin() + begin[t + 1]);
  };
  for (std::size_t t = 0; t + 1 < source_begin->size(); ++t) {
    rounds->push_back({cut(*source_begin, *sources, t),
                       cut(*destination_begin, *destinations, t)});
  }
  return ffi::Error::Success();
}

// A communicator of one rank has the context -1.
ffi::Error ReadPart(const ffi::Dictionary& attributes, const char* attribute,
                    const std::string& name,
                    std::shared_ptr<Communicator>* comm) {
  const std::int64_t context = Read(attributes, attribute, -1);
  if (context < 0) return ffi::Error::Success();
  auto found = Ready(context, name);
  if (!found) return found.error();
  *comm = *found;
  return ffi::Error::Success();
}

template <typename P, ffi::Error (*kRead)(const ffi::Dictionary&, P*)>
MadePlan MakePlan(ffi::Dictionary attributes) {
  auto plan = std::make_unique<P>();
  ffi::Error error = ReadCommon(attributes, plan.get());
  if (error.success()) error = kRead(attributes, plan.get());
  if (error.failure()) return ffi::Unexpected(std::move(error));
  plan->is_made.store(true, std::memory_order_release);
  return std::unique_ptr<Plan>(std::move(plan));
}

ffi::Error ReadExchange(const ffi::Dictionary& attributes, ExchangePlan* plan) {
  plan->selects = Read(attributes, "selects", 0) != 0;
  plan->apart = Read(attributes, "apart", 0) != 0;
  plan->source_count = Read(attributes, "source_count", 0);
  plan->send_counts = ReadLongs(attributes, "send_counts");
  plan->receive_counts = ReadLongs(attributes, "receive_counts");
  plan->send_slots = Read(attributes, "send_slots", 1);
  plan->slots = Read(attributes, "slots", 1);
  if (plan->selects) return ffi::Error::Success();
  return ReadRounds(attributes, plan->operation, &plan->rounds);
}

ffi::Error ReadCollective(const ffi::Dictionary& attributes,
                          CollectivePlan* plan) {
  plan->reductions = ReadLongs(attributes, "reductions");
  plan->root = Read(attributes, "root", 0);
  return ffi::Error::Success();
}

ffi::Error ReadHierarchical(const ffi::Dictionary& attributes,
                            HierarchicalPlan* plan) {
  JFOG_RETURN_IF_ERROR(
      ReadPart(attributes, "local_context", plan->operation, &plan->local));
  JFOG_RETURN_IF_ERROR(ReadPart(attributes, "machines_context", plan->operation,
                                &plan->machines));
  plan->slots = Read(attributes, "slots", 0);
  return ReadRounds(attributes, plan->operation, &plan->rounds);
}

}  // namespace

ffi::TypeId Plan::id = {};

ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const std::string& name) {
  std::shared_ptr<Communicator> comm = Lookup(context);
  if (comm == nullptr) {
    return ffi::Unexpected(
        MakeError(ffi::ErrorCode::kFailedPrecondition,
                  name + " on a communicator that was shut down"));
  }
  ffi::Error error = comm->CheckReady(name);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  return comm;
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

#define JFOG_DEFINE_PLAN(symbol, P, read)                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, (MakePlan<P, read>), \
                                ffi::Ffi::BindInstantiate().Attrs())

JFOG_DEFINE_PLAN(NcclMakeExchange, ExchangePlan, ReadExchange);
JFOG_DEFINE_PLAN(NcclMakeCollective, CollectivePlan, ReadCollective);
JFOG_DEFINE_PLAN(NcclMakeHierarchical, HierarchicalPlan, ReadHierarchical);

}  // namespace jfog::nccl
