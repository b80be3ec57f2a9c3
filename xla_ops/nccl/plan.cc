// Attributes of a call site, decoded once when its program is compiled.
#include "nccl/plan.h"

#include <string_view>
#include <utility>

namespace jfog::nccl {
namespace {

using Longs = ffi::Span<const std::int64_t>;

// An attribute, or its default.
std::int64_t Read(const ffi::Dictionary& attributes, const char* name,
                  std::int64_t fallback) {
  if (!attributes.contains(name)) return fallback;
  const auto value = attributes.get<std::int64_t>(name);
  return value ? *value : fallback;
}

// Empty if the attribute is missing or [-1].
std::vector<std::int64_t> ReadLongs(const ffi::Dictionary& attributes,
                                    const char* name) {
  if (!attributes.contains(name)) return {};
  const auto values = attributes.get<Longs>(name);
  if (!values || (values->size() == 1 && (*values)[0] == -1)) return {};
  return std::vector<std::int64_t>(values->begin(), values->end());
}

ffi::Error ReadCommon(const ffi::Dictionary& attributes, Plan* plan) {
  const auto operation = attributes.get<std::string_view>("operation");
  if (!operation) return LacksAttributes("an operation");
  plan->operation = std::string(*operation);
  const auto context = attributes.get<std::int64_t>("context");
  if (!context) return LacksAttributes(plan->operation);
  JFOG_ASSIGN_OR_RETURN(comm, Ready(*context, plan->operation));
  plan->comm = comm;
  plan->mode = Read(attributes, "mode", kWhole);
  plan->variant = static_cast<std::uint64_t>(Read(attributes, "variant", 0));
  plan->signature =
      static_cast<std::uint64_t>(Read(attributes, "signature", 0));
  plan->received_bytes = ReadLongs(attributes, "received_bytes");
  return ffi::Error::Success();
}

// A communicator of one rank has the context -1.
ffi::Error ReadPart(const ffi::Dictionary& attributes, const char* attribute,
                    const std::string& name,
                    std::shared_ptr<Communicator>* comm) {
  const std::int64_t context = Read(attributes, attribute, -1);
  if (context < 0) return ffi::Error::Success();
  JFOG_ASSIGN_OR_RETURN(found, Ready(context, name));
  *comm = found;
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
  return ReadRounds(attributes, plan->operation, /*has_weights=*/false,
                    &plan->rounds);
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
  return ReadRounds(attributes, plan->operation, /*has_weights=*/false,
                    &plan->rounds);
}

}  // namespace

ffi::TypeId Plan::id = {};

ffi::ErrorOr<std::shared_ptr<Communicator>> Ready(std::int64_t context,
                                                  const std::string& name) {
  std::shared_ptr<Communicator> comm = Communicators().Find(context);
  if (comm == nullptr) return ffi::Unexpected(ShutDownError(name));
  JFOG_RETURN_IF_ERROR(comm->CheckReady(name));
  return comm;
}

MadePlan MakeExchangePlan(ffi::Dictionary attributes) {
  return MakePlan<ExchangePlan, ReadExchange>(std::move(attributes));
}

MadePlan MakeCollectivePlan(ffi::Dictionary attributes) {
  return MakePlan<CollectivePlan, ReadCollective>(std::move(attributes));
}

MadePlan MakeHierarchicalPlan(ffi::Dictionary attributes) {
  return MakePlan<HierarchicalPlan, ReadHierarchical>(std::move(attributes));
}

}  // namespace jfog::nccl
