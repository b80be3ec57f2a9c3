// The leaves of one operation: their layout inside a message, their signature.
#include "mpi/leaves.h"

#include "mpi/communicator.h"

namespace jfog::mpi {
namespace {

constexpr std::size_t kAlignment = 16;
constexpr std::size_t kDescribed = 3;

// Dtypes and element counts, in order.
std::uint64_t Signature(const Leaves& leaves) {
  std::uint64_t hash = leaves.size();
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    hash = Mix(hash, static_cast<std::uint64_t>(leaves.types[i]));
    hash = Mix(hash, leaves.counts[i]);
  }
  return hash;
}

}  // namespace

std::string Leaves::Describe() const {
  std::string text = std::to_string(size());
  text += size() == 1 ? " leaf" : " leaves";
  for (std::size_t i = 0; i < size() && i < kDescribed; ++i) {
    text += std::string(", ") + NameOf(types[i]) + " x " +
            std::to_string(counts[i]);
  }
  if (size() > kDescribed) text += ", ...";
  return text;
}

ffi::ErrorOr<Leaves> ReadLeaves(ffi::RemainingArgs args, std::size_t first,
                                ffi::RemainingRets results) {
  Leaves leaves;
  const std::size_t size = results.size();
  if (args.size() != first + size) {
    return ffi::Unexpected(MakeError(
        ffi::ErrorCode::kInternal, "got " + std::to_string(args.size()) +
                                       " operands for " + std::to_string(size) +
                                       " results"));
  }
  std::size_t offset = sizeof(Header);
  for (std::size_t i = 0; i < size; ++i) {
    auto x = args.get<ffi::AnyBuffer>(first + i);
    if (!x) return ffi::Unexpected(x.error());
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!y) return ffi::Unexpected(y.error());
    leaves.types.push_back(x->element_type());
    leaves.counts.push_back(x->element_count());
    leaves.output_counts.push_back((*y)->element_count());
    leaves.inputs.push_back(x->untyped_data());
    leaves.outputs.push_back((*y)->untyped_data());
    leaves.offsets.push_back(offset);
    offset += (leaves.bytes(i) + kAlignment - 1) / kAlignment * kAlignment;
  }
  leaves.message_bytes = offset;
  leaves.signature = Signature(leaves);
  return leaves;
}

}  // namespace jfog::mpi
