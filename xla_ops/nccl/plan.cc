// Attributes of a call site, decoded once when its program is compiled.
#include "nccl/plan.h"

#include <string_view>
#include <utility>

namespace jfog::nccl {
namespace {

using Longs = ffi::Span<const std::int64_t>;

// An attribute, or its default.
std::int64_t ReadLong(const ffi::Dictionary& attributes, const char* name,
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

// A communicator of one rank has the context -1.
ffi::Error ReadPart(const ffi::Dictionary& attributes, const char* attribute,
                    const std::string& name,
                    std::shared_ptr<Communicator>* comm) {
  const std::int64_t context = ReadLong(attributes, attribute, -1);
  if (context < 0) return ffi::Error::Success();
  JFOG_ASSIGN_OR_RETURN(found, Ready(Communicators(), context, name.c_str()));
  *comm = found;
  return ffi::Error::Success();
}

}  // namespace

ffi::Error Plan::ReadCommon(const ffi::Dictionary& attributes) {
  const auto name = attributes.get<std::string_view>("operation");
  if (!name) return LacksAttributes("an operation");
  operation = std::string(*name);
  const auto context = attributes.get<std::int64_t>("context");
  if (!context) return LacksAttributes(operation);
  JFOG_ASSIGN_OR_RETURN(found,
                        Ready(Communicators(), *context, operation.c_str()));
  comm = found;
  mode = ReadLong(attributes, "mode", kWhole);
  variant = static_cast<std::uint64_t>(ReadLong(attributes, "variant", 0));
  signature = static_cast<std::uint64_t>(ReadLong(attributes, "signature", 0));
  received_bytes = ReadLongs(attributes, "received_bytes");
  return ffi::Error::Success();
}

ffi::Error ExchangePlan::Read(const ffi::Dictionary& attributes) {
  JFOG_RETURN_IF_ERROR(ReadCommon(attributes));
  selects = ReadLong(attributes, "selects", 0) != 0;
  apart = ReadLong(attributes, "apart", 0) != 0;
  source_count = ReadLong(attributes, "source_count", 0);
  send_counts = ReadLongs(attributes, "send_counts");
  receive_counts = ReadLongs(attributes, "receive_counts");
  send_slots = ReadLong(attributes, "send_slots", 1);
  slots = ReadLong(attributes, "slots", 1);
  if (selects) return ffi::Error::Success();
  return ReadRounds(attributes, operation, /*has_weights=*/false, &rounds);
}

ffi::Error CollectivePlan::Read(const ffi::Dictionary& attributes) {
  JFOG_RETURN_IF_ERROR(ReadCommon(attributes));
  reductions = ReadLongs(attributes, "reductions");
  root = ReadLong(attributes, "root", 0);
  return ffi::Error::Success();
}

ffi::Error HierarchicalPlan::Read(const ffi::Dictionary& attributes) {
  JFOG_RETURN_IF_ERROR(ReadCommon(attributes));
  JFOG_RETURN_IF_ERROR(
      ReadPart(attributes, "local_context", operation, &local));
  JFOG_RETURN_IF_ERROR(
      ReadPart(attributes, "machines_context", operation, &machines));
  slots = ReadLong(attributes, "slots", 0);
  return ReadRounds(attributes, operation, /*has_weights=*/false, &rounds);
}

}  // namespace jfog::nccl
